"""Plans, graphs and images for the eye."""
