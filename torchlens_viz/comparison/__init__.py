"""What sets two networks apart, layer by layer: `compare`."""
