"""The levels by one stable sort a row."""

import torch
from torch import Tensor


def forward(scores: Tensor, counts: list[int]) -> Tensor:
    falling = scores.argsort(dim=-1, descending=True, stable=True)
    by_rank = torch.zeros(scores.shape[-1], dtype=torch.int8, device=scores.device)
    for level in range(len(counts), 0, -1):
        by_rank[: counts[level - 1]] = level
    levels = torch.empty(scores.shape, dtype=torch.int8, device=scores.device)
    return levels.scatter_(-1, falling, by_rank.expand_as(falling))
