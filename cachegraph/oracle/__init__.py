"""The plan by plain Python hooks on the eager model: slow, obvious, for checking."""
