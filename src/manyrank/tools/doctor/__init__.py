"""Whether machines are ready for a training."""
