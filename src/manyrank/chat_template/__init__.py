"""Messages to token ids, and which of them are learned."""
