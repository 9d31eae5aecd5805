"""The plan, entry by entry in Python."""

import torch
from torch import Tensor


def forward(levels: Tensor, num_levels: int) -> tuple[Tensor, Tensor]:
    rows = levels.reshape(-1, levels.shape[-1]).tolist()
    indices, offsets = [], []
    for row in rows:
        kept: list[int] = []
        bounds = [0]
        for level in range(1, num_levels + 1):
            kept += [block for block, value in enumerate(row) if value == level]
            bounds.append(len(kept))
        indices.append(kept + [0] * (len(row) - len(kept)))
        offsets.append(bounds)
    return (
        torch.tensor(indices, dtype=torch.int32, device=levels.device).reshape(levels.shape),
        torch.tensor(offsets, dtype=torch.int32, device=levels.device).reshape(*levels.shape[:-1], num_levels + 1),
    )
