"""A report on a compiled loop: one HTML file, or the same data as JSON."""
