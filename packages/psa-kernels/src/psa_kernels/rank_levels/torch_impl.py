"""The levels by one stable sort a row."""

import torch
from torch import Tensor


def forward(scores: Tensor, counts: list[int], sample_counts: Tensor | None) -> Tensor:
    falling = scores.argsort(dim=-1, descending=True, stable=True)
    by_rank = torch.zeros(scores.shape[-1], dtype=torch.int8, device=scores.device)
    if sample_counts is None:
        for level in range(len(counts), 0, -1):
            by_rank[: counts[level - 1]] = level
    else:
        rank = torch.arange(scores.shape[-1], device=scores.device)
        for level in range(sample_counts.shape[1], 0, -1):
            by_rank = torch.where(rank < sample_counts[:, level - 1 : level], level, by_rank)
        by_rank = by_rank.view(scores.shape[0], *[1] * (scores.dim() - 2), scores.shape[-1])
    levels = torch.empty(scores.shape, dtype=torch.int8, device=scores.device)
    return levels.scatter_(-1, falling, by_rank.expand_as(falling))
