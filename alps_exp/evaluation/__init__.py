"""Perplexity, tasks of lm-eval, and samples."""
