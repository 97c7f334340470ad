"""A network cut into blocks, in memory or read from files, and its hidden states."""
