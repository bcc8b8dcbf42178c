"""Images by the ten thousand: sampling them over many processes, and judging them."""
