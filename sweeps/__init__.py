"""One yaml per table or figure: the grid of runs behind it."""
