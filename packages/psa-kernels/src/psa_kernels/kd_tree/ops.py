"""The registered operator behind ``kd_tree``."""

import torch
from torch import Tensor

from psa_kernels.registry import register

GRID_BITS = 22
"""Of a coordinate on the block's grid. With the 8 bits that count 256 tokens it is an int32; the sum of a block's
squares, times its tokens, is an int64."""
LARGEST = 2.0**126
"""Magnitude that coordinates are cut off at, so that the difference of two is finite."""
MAX_HELD = 1 << 14
"""Coordinates of a block that the Triton kernel holds at most; their number a token counts as the next power of two."""


def held(size: int, num_coordinates: int) -> int:
    """Coordinates that the Triton kernel holds of a block of ``size`` tokens."""
    return size << (num_coordinates - 1).bit_length()


def _fake(points: Tensor) -> Tensor:
    return points.new_empty(points.shape[:-1], dtype=torch.int32)


kd_tree_op = register("psa_kernels.kd_tree", "kd_tree(Tensor points) -> Tensor", _fake)
