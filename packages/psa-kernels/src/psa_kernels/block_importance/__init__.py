"""How much each query block has to read of each KV block."""

from psa_kernels.block_importance.antidiagonal.groups import group_stride
from psa_kernels.block_importance.api import METHODS, REDUCTIONS, block_importance

__all__ = ["METHODS", "REDUCTIONS", "block_importance", "group_stride"]
