"""Which supports are allowed, and how they are written. Nothing here needs torch before a mask is asked for."""

from .nested import VNM, Hierarchical
from .nm import NM
from .pattern import Pattern, Scope
from .tiles import Block, Column, Row
from .transposable import Transposable
from .unstructured import Unstructured
from .written import parse_sparsity

__all__ = [
    "NM",
    "VNM",
    "Block",
    "Column",
    "Hierarchical",
    "Pattern",
    "Row",
    "Scope",
    "Transposable",
    "Unstructured",
    "parse_sparsity",
]
