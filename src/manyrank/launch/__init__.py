"""A recipe and a machine to a command and its processes. No torch."""
