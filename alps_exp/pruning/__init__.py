"""The block loop, its stages, and what it keeps on the disk."""
