"""Which layers are pruned, and how sparse."""
