"""Row by row, in Python's integers."""

import math

import torch
from torch import Tensor

from psa_kernels.share_levels.ops import LESS


def forward(scores: Tensor, shares: list[float], min_first: float, lengths: Tensor | None) -> Tensor:
    row_len = scores.shape[-1]
    rows = scores.reshape(-1, row_len).float().tolist()
    levels = []
    for i, row in enumerate(rows):
        length = row_len
        if lengths is not None:
            length = min(max(int(lengths[i * len(lengths) // len(rows)]), 0), row_len)
        levels.append(_row(row[:length], shares, min_first) + [0] * (row_len - length))
    return torch.tensor(levels, dtype=torch.int8, device=scores.device).reshape(scores.shape)


def _row(row: list[float], shares: list[float], min_first: float) -> list[int]:
    exponent = max(math.frexp(max(row, default=0.0))[1] - 1, -126)
    weights = [math.floor(math.ldexp(score, 30 - exponent)) for score in row]
    total = sum(weights)
    parts = [total * share for share in shares]
    limits = [math.inf if part == total else _whole(part) for part in parts]
    least = max(1, _whole(len(row) * min_first))
    levels = [0] * len(row)
    before = 0
    for rank, i in enumerate(sorted(range(len(row)), key=lambda i: -row[i])):  # sorting is stable
        fitting = [level for level, limit in enumerate(limits, 1) if before < limit]
        levels[i] = 1 if rank < least else fitting[0] if fitting else 0
        before += weights[i]
    return levels


def _whole(product: float) -> int:
    """The least integer not below ``product``, but for what rounding adds."""
    return math.ceil(product * LESS)
