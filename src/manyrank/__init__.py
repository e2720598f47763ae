"""manyrank: one recipe fine-tunes a language model on any topology."""

__version__ = "0.1.0"
