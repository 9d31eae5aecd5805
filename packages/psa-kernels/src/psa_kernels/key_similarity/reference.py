"""Each block on its own, pair by pair."""

import torch
from torch import Tensor

from psa_kernels.key_similarity.ops import similarity_dtype
from psa_kernels.layout import pool_size


def forward(key: Tensor, kv_lengths: Tensor | None, block_kv: int, num_levels: int) -> Tensor:
    kv_len = key.shape[2]
    ends = [kv_len] * key.shape[0] if kv_lengths is None else [min(n, kv_len) for n in kv_lengths.tolist()]
    samples = []
    for sample, end in zip(key.to(similarity_dtype(key)), ends, strict=True):
        blocks = []
        for first in range(0, kv_len, block_kv):
            tokens = sample[:, first : max(first, min(first + block_kv, end))]  # [H, n, D]
            count = tokens.shape[1]
            values = [torch.ones_like(sample[:, 0, 0])] * (num_levels - 1)
            if count > 1:
                unit = torch.nn.functional.normalize(tokens, dim=-1)
                strides = [min(pool_size(level), count - 1) for level in range(2, num_levels + 1)]
                values = [(unit[:, s:] * unit[:, :-s]).sum(-1).mean(-1) for s in strides]
            blocks.append(torch.stack(values, -1) if values else sample[:, 0, :0])
        samples.append(torch.stack(blocks, 1))
    return torch.stack(samples)
