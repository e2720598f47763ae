"""A page about a run, or about several runs."""
