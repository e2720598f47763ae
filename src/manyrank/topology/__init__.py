"""Ranks, GPUs and strategies. No torch."""
