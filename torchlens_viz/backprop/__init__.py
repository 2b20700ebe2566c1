"""Gradients with respect to the input: a private copy of the network, cut, redirected, scored."""
