"""Step graphs: cache operations, text, binding times, weights, and what must hold of them."""
