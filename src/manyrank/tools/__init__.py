"""Commands around a run; each can be deleted without the rest noticing."""
