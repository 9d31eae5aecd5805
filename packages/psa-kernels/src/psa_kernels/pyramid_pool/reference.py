"""Each row as the mean of its own slice of tokens."""

import torch
from torch import Tensor

from psa_kernels.layout import num_rows, pool_size


def forward(x: Tensor, kv_lengths: Tensor | None, num_levels: int) -> Tensor:
    kv_len = x.shape[2]
    ends = [kv_len] * x.shape[0] if kv_lengths is None else [min(n, kv_len) for n in kv_lengths.tolist()]
    samples = []
    for sample, end in zip(x, ends, strict=True):
        rows = []
        for level in range(2, num_levels + 1):
            pool = pool_size(level)
            for row in range(num_rows(kv_len, level)):
                tokens = sample[:, row * pool : max(row * pool, min((row + 1) * pool, end))]
                rows.append(tokens.mean(dim=1) if tokens.shape[1] else torch.zeros_like(sample[:, 0]))
        samples.append(torch.stack(rows, dim=1) if rows else sample[:, :0])
    return torch.stack(samples)
