"""Graphs compiled ahead of time with AOTInductor."""
