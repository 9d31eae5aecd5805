"""Tokens of a block in the order of a balanced k-d tree."""

from psa_kernels.kd_tree.api import kd_tree

__all__ = ["kd_tree"]
