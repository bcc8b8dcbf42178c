"""What must hold of a step graph after every pass."""
