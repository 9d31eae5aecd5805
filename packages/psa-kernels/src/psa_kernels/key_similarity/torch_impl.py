"""All blocks at once, one stride at a time."""

import torch
from torch import Tensor

from psa_kernels.key_similarity.ops import similarity_dtype
from psa_kernels.layout import pool_size


def forward(key: Tensor, kv_lengths: Tensor | None, block_kv: int, num_levels: int) -> Tensor:
    batch, heads, kv_len, _ = key.shape
    num_blocks = -(-kv_len // block_kv)
    ends = torch.full((batch,), kv_len, device=key.device) if kv_lengths is None else kv_lengths.clamp(max=kv_len)
    token = torch.arange(kv_len, device=key.device)
    out = torch.empty((batch, heads, num_blocks, num_levels - 1), dtype=similarity_dtype(key), device=key.device)
    for b in range(batch):
        counts = (ends[b] - torch.arange(num_blocks, device=key.device) * block_kv).clamp(0, block_kv)
        count = counts.repeat_interleave(block_kv)[:kv_len]
        for h in range(heads):
            unit = torch.nn.functional.normalize(key[b, h].to(out.dtype), dim=-1)
            for level in range(2, num_levels + 1):
                stride = (count - 1).clamp(min=0, max=pool_size(level))
                paired = token % block_kv + stride < count
                cosine = (unit * unit[(token + stride).clamp(max=kv_len - 1)]).sum(-1)
                cosine = torch.nn.functional.pad(cosine.where(paired, 0), (0, num_blocks * block_kv - kv_len))
                pairs = counts - (counts - 1).clamp(max=pool_size(level))
                mean = cosine.view(num_blocks, block_kv).sum(-1) / pairs.clamp(min=1)
                out[b, h, :, level - 2] = mean.where(counts > 1, 1)
    return out
