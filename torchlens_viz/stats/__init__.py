"""Numbers per channel."""
