"""Row by row, sorted in Python."""

import math

import torch
from torch import Tensor


def forward(scores: Tensor, counts: list[int], sample_counts: Tensor | None) -> Tensor:
    levels = []
    rows = scores.reshape(-1, scores.shape[-1]).tolist()
    for i, row in enumerate(rows):
        if sample_counts is not None:
            counts = sample_counts[i * len(sample_counts) // len(rows)].tolist()
        # Sorting is stable. NaN comes first, and all are alike.
        falling = sorted(range(len(row)), key=lambda i: (0, 0.0) if math.isnan(row[i]) else (1, -row[i]))
        level = [0] * len(row)
        for rank, i in enumerate(falling):
            fitting = [h for h, count in enumerate(counts, 1) if rank < count]
            level[i] = fitting[0] if fitting else 0
        levels.append(level)
    return torch.tensor(levels, dtype=torch.int8, device=scores.device).reshape(scores.shape)
