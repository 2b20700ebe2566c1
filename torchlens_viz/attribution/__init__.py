"""What made a network say so: the evidence in an image for an output, or for a unit."""
