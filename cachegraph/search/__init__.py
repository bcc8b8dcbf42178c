"""A schedule for a budget: found on the final image, at a cost that was measured."""
