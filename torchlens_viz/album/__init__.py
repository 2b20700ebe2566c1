"""Pictures for a page: those that a network is shown, and many small ones in a few large ones."""
