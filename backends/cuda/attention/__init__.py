"""Attention on NVIDIA GPUs: one file per library, each an implementation of its own."""
