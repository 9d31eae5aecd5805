"""Pooling by halving: the sums of a level are the pair sums of the one before."""

import torch
from torch import Tensor

from psa_kernels.layout import row_counts
from psa_kernels.pyramid_pool.ops import pooled_rows


def forward(x: Tensor, kv_lengths: Tensor | None, num_levels: int) -> Tensor:
    batch, heads, kv_len, head_dim = x.shape
    pooled = x.new_empty((batch, heads, pooled_rows(kv_len, num_levels), head_dim))
    # One head at a time keeps the wide sums small beside the sequence.
    for b in range(batch):
        lengths = None if kv_lengths is None else kv_lengths[b : b + 1]
        counts = {level: row_counts(kv_len, level, lengths, x.device)[0, :, None] for level in range(1, num_levels + 1)}
        for h in range(heads):
            sums = x[b, h].to(torch.promote_types(x.dtype, torch.float32)).masked_fill(counts[1] == 0, 0)
            first = 0
            for level in range(2, num_levels + 1):
                if sums.shape[0] % 2:
                    sums = torch.cat([sums, torch.zeros_like(sums[:1])])
                sums = sums[0::2] + sums[1::2]
                rows = sums.shape[0]
                pooled[b, h, first : first + rows] = sums / counts[level].clamp(min=1)
                first += rows
    return pooled
