"""One layer to prune, as numbers, and what a solver is."""
