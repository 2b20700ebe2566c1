"""Which pixels a position of a layer sees."""
