"""The registered operator behind ``share_levels``."""

import torch
from torch import Tensor

from psa_kernels.registry import register

MAX_SHARES = 9  # as many levels as the largest block has
MAX_SCORES = 2**22
"""The longest row: its sum stays below 2**53, up to which float64 holds every integer."""
LESS = 1 - 2**-50
"""Takes off what a product with a share may be too much by in binary: 0.07 * 100 is 7.000000000000001."""


def _fake(scores: Tensor, shares: list[float], min_first: float, lengths: Tensor | None) -> Tensor:
    return torch.empty_like(scores, dtype=torch.int8, memory_format=torch.contiguous_format)


share_levels_op = register(
    "psa_kernels.share_levels",
    "share_levels(Tensor scores, float[] shares, float min_first, Tensor? lengths) -> Tensor",
    _fake,
)
"""``lengths`` are int32 or int64 ``[scores.shape[0]]``."""
