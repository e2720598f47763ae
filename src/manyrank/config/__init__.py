"""Recipes: the keys, and how YAML, presets and the command line become one typed value. No torch."""
