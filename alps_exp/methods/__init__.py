"""ALPS, and what any method can be given: a refit."""
