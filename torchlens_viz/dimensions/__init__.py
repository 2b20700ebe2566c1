"""What each dimension of a tensor counts, through the operations of a network."""
