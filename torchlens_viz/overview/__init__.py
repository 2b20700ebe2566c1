"""What there is to look at: the layers of a network in execution order, with what each puts out."""
