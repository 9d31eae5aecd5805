"""The plan by one stable sort a row."""

import torch
from torch import Tensor


def forward(levels: Tensor, num_levels: int) -> tuple[Tensor, Tensor]:
    kept = (levels > 0) & (levels <= num_levels)
    # A level above every other one sends the skipped blocks to the end of the row.
    order = torch.where(kept, levels, num_levels + 1).to(torch.int8).sort(dim=-1, stable=True).indices
    counts = torch.stack([(levels == level).sum(dim=-1) for level in range(1, num_levels + 1)], dim=-1)
    ends = counts.cumsum(dim=-1)
    offsets = torch.nn.functional.pad(ends, (1, 0))
    position = torch.arange(levels.shape[-1], device=levels.device)
    indices = torch.where(position < ends[..., -1:], order, 0)
    return indices.to(torch.int32), offsets.to(torch.int32)
