"""Which supports are allowed, and how they are written. Nothing here needs torch before a mask is asked for."""

from .nm import NM
from .pattern import Pattern, Scope
from .tiles import Block, Column, Row
from .transposable import Transposable
from .unstructured import Unstructured
from .written import parse_sparsity

__all__ = ["NM", "Block", "Column", "Pattern", "Row", "Scope", "Transposable", "Unstructured", "parse_sparsity"]
