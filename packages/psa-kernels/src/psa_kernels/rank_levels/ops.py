"""The registered operator behind ``rank_levels``."""

import torch
from torch import Tensor

from psa_kernels.registry import register

MAX_COUNTS = 9  # as many levels as the largest block has


def _fake(scores: Tensor, counts: list[int], sample_counts: Tensor | None) -> Tensor:
    return torch.empty_like(scores, dtype=torch.int8, memory_format=torch.contiguous_format)


# SymInt, as counts are shares of a length that a compiled program may not know.
rank_levels_op = register(
    "psa_kernels.rank_levels",
    "rank_levels(Tensor scores, SymInt[] counts, Tensor? sample_counts) -> Tensor",
    _fake,
)
"""``counts`` are those of all rows; with ``sample_counts``, int32 ``[scores.shape[0], H]``, they are not read."""
