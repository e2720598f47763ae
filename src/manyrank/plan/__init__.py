"""Memory and speed before a launch. No torch."""
