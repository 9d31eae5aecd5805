"""The registered operator behind ``leading_directions``."""

import torch
from torch import Tensor

from psa_kernels.registry import register

STEPS = 7
"""Of the power iteration."""
RIDGE = 1e-6
"""How much of the identity is added to a matrix of unit size, so that none is singular."""
TINY = 1e-30
"""What is divided by at least, where a matrix or a direction may be nothing."""
LEAST_PIVOT = 1e-7
"""What is left of a vector's square without the others, of what it was, at least: less is rounding."""
MAX_DIRECTIONS = 32
"""Of the Triton implementation."""


def _fake(seen: Tensor, spread: Tensor, num_directions: int) -> Tensor:
    return seen.new_empty((*seen.shape[:-1], num_directions), dtype=seen.dtype)


leading_directions_op = register(
    "psa_kernels.leading_directions",
    "leading_directions(Tensor seen, Tensor spread, SymInt num_directions) -> Tensor",
    _fake,
)


def mean_diagonal(x: Tensor) -> Tensor:
    """Of square matrices ``[..., D, D]``, ``[..., 1, 1]``."""
    mean: Tensor = x.diagonal(dim1=-2, dim2=-1).mean(-1)
    return mean[..., None, None]


def to_unit_length(directions: Tensor) -> Tensor:
    """``[..., D, num_directions]`` with the longest of length 1."""
    longest = torch.linalg.vector_norm(directions, dim=-2, keepdim=True).amax(-1, keepdim=True)
    scaled: Tensor = directions / longest.clamp_min(TINY)
    return scaled
