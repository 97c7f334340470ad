"""Texts, and the windows of tokens made of them."""
