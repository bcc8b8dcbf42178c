"""The way from a model and a schedule to compiled step graphs, and what they cost."""
