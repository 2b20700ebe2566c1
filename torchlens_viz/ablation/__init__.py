"""What a network loses with a channel: `ablate`."""
