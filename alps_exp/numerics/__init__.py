"""Matrices on a device: products, triangular inverses, resolvents, fits on a support, kernels."""
