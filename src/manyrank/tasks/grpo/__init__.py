"""GRPO with trl's loss and generation."""
