"""Dense: one softmax over all groups of keys of a head."""

import torch
from torch import Tensor

from psa_kernels.block_importance.antidiagonal.groups import group_sizes
from psa_kernels.block_importance.ops import importance_dtype
from psa_kernels.layout import existing_keys


def forward(
    query: Tensor,
    key: Tensor,
    kv_lengths: Tensor | None,
    block_q: int,
    block_kv: int,
    stride: int,
    reduction: str,
    is_causal: bool,
    scale: float,
) -> Tensor:
    dtype, device = importance_dtype(query), query.device
    batch, heads, q_len, _ = query.shape
    kv_len, group = key.shape[2], heads // key.shape[1]
    num_q_blocks, num_kv_blocks = -(-q_len // block_q), -(-kv_len // block_kv)
    blocks = (num_q_blocks, block_q // stride, num_kv_blocks, block_kv // stride)
    lengths = existing_keys(kv_len, kv_lengths, device)
    q_sizes = group_sizes(torch.tensor(q_len, device=device), blocks[0] * blocks[1], stride)
    q_last = torch.arange(len(q_sizes), device=device) * stride + q_sizes - 1
    out = []
    for b in range(batch):
        kv_sizes = group_sizes(lengths[b % len(lengths)], blocks[2] * blocks[3], stride)
        kv_first = torch.arange(len(kv_sizes), device=device) * stride
        pairs = torch.minimum(q_sizes[:, None], kv_sizes[None, :])  # on the antidiagonal of each cell
        exists = pairs > 0
        seen = exists
        if is_causal:
            seen = exists & ((kv_first + kv_sizes - 1)[None, :] <= q_last[:, None] + kv_len - q_len)
        for h in range(heads):
            slots_q, slots_k = [], []  # the tokens that lie at place t of each antidiagonal
            for t in range(stride):
                tokens = query[b, h, (q_last - t).clamp(0, q_len - 1)].to(dtype)
                slots_q.append(tokens.masked_fill((t >= q_sizes)[:, None], 0))
                tokens = key[b, h // group, (kv_first + t).clamp(max=kv_len - 1)].to(dtype)
                slots_k.append(tokens.masked_fill((t >= kv_sizes)[:, None], 0))
            total = torch.cat(slots_q, dim=-1) @ torch.cat(slots_k, dim=-1).T * scale
            logits = (total / pairs.clamp(min=1)).to(query.dtype).to(dtype).masked_fill(~seen, -torch.inf)
            weights = logits.softmax(dim=-1).masked_fill(~seen, 0).reshape(blocks)
            if reduction == "max":
                out.append(weights.amax(dim=(1, 3)))
            else:
                cells = exists.reshape(blocks).sum(dim=(1, 3))
                out.append(weights.sum(dim=(1, 3)) / cells.clamp(min=1))
    return torch.stack(out).reshape(batch, heads, num_q_blocks, num_kv_blocks)
