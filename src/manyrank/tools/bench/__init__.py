"""Speed, memory and losses against trl and bare loops."""
