"""Model shapes, loading, adapters, fused kernels and generation."""
