"""Loss, answers and benchmarks of models."""
