"""Pictures of a model: the public `*_grid` and `save_*` functions."""
