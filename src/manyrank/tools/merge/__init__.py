"""Merge an adapter into its base, and check the result."""
