"""Pipelines of diffusers whose transformers run compiled, from one line."""
