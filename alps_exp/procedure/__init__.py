"""How a model is pruned from beginning to end: what the dense model tells first, the method, and gradients after it."""
