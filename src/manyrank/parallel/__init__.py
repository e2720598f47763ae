"""Strategies as one interface: single and DDP, FSDP2, DeepSpeed."""
