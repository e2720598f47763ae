"""Rules: what is refused before a launch, why, and how to fix it. No torch."""
