"""Faster CPU kernels for layers of transformers models."""
