"""Examine machines, GPUs, links and files before a training."""
