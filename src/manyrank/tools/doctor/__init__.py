"""Examine whether machines are ready for a training."""
