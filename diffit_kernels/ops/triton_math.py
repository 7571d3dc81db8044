"""Device functions that several stages' Triton kernels share."""
