"""The registered operator behind ``rank_levels``."""

import torch
from torch import Tensor

from psa_kernels.registry import register

MAX_COUNTS = 9  # as many levels as the largest block has


def _fake(scores: Tensor, counts: list[int]) -> Tensor:
    return torch.empty_like(scores, dtype=torch.int8, memory_format=torch.contiguous_format)


# SymInt, as counts are shares of a length that a compiled program may not know.
rank_levels_op = register("psa_kernels.rank_levels", "rank_levels(Tensor scores, SymInt[] counts) -> Tensor", _fake)
