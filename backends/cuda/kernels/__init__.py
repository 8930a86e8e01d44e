"""Triton kernels, one idea per file. They are compiled on first use."""
