"""Answer all prompts of a file."""
