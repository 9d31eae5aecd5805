"""The levels by one stable sort a row and a running sum of integers."""

import math

import torch
from torch import Tensor

from psa_kernels.share_levels.ops import LESS


def forward(scores: Tensor, shares: list[float], min_first: float, lengths: Tensor | None) -> Tensor:
    scores = scores.float()
    row_len = scores.shape[-1]
    position = torch.arange(row_len, device=scores.device)
    if lengths is None:
        exists = None
        least: int | Tensor = math.ceil(row_len * min_first * LESS)
    else:
        lengths = lengths.clamp(0, row_len).view(-1, *[1] * (scores.dim() - 1))
        exists = position < lengths
        scores = scores.masked_fill(~exists, 0.0)  # ranks behind all that exist
        least = (lengths.double() * min_first * LESS).ceil()

    falling, order = scores.sort(dim=-1, descending=True, stable=True)
    weights = _weights(falling)
    upto = weights.cumsum(dim=-1)
    before, total = upto - weights, upto[..., -1:].double()
    by_rank = torch.zeros_like(before, dtype=torch.int8)
    for level in range(len(shares), 0, -1):
        part = total * shares[level - 1]
        by_rank.masked_fill_((before < (part * LESS).ceil()) | (part == total), level)
    by_rank.masked_fill_((position == 0) | (position < least), 1)
    levels = torch.empty_like(by_rank).scatter_(-1, order, by_rank)
    return levels if exists is None else levels.masked_fill_(~exists, 0)


def _weights(falling: Tensor) -> Tensor:
    """int64, shaped like ``falling``: ``floor(score * 2**(30 - e))`` of sorted scores, from their bits."""
    bits = (falling + 0.0).view(torch.int32)  # -0.0 becomes 0.0
    exponent = (bits >> 23).clamp(min=1)
    fraction = torch.where(bits >> 23 > 0, bits & 0x7FFFFF | 0x800000, bits)
    return ((fraction << 7) >> (exponent[..., :1] - exponent).clamp(max=31)).long()
