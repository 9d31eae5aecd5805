"""Dense: one softmax over all sampled keys of a head."""

import torch
from torch import Tensor

from psa_kernels.block_importance.ops import importance_dtype
from psa_kernels.block_importance.sampling import draw_positions


def forward(
    query: Tensor,
    key: Tensor,
    kv_lengths: Tensor | None,
    block_q: int,
    block_kv: int,
    samples_q: int,
    samples_kv: int,
    reduction: str,
    is_causal: bool,
    scale: float,
    seed: int,
) -> Tensor:
    q_positions, kv_positions = draw_positions(
        query.shape[2], key.shape[2], kv_lengths, block_q, block_kv, samples_q, samples_kv, seed, query.device
    )
    dtype = importance_dtype(query)
    batch, heads, q_len, _ = query.shape
    kv_len, group = key.shape[2], heads // key.shape[1]
    blocks = (q_positions.shape[1], q_positions.shape[2], kv_positions.shape[1], kv_positions.shape[2])
    out = []
    for b in range(batch):
        rows = q_positions[0].flatten().long()
        columns = kv_positions[b % kv_positions.shape[0]].flatten().long()
        exists = (rows >= 0)[:, None] & (columns >= 0)[None, :]
        seen = exists & (columns[None, :] <= rows[:, None] + kv_len - q_len) if is_causal else exists
        for h in range(heads):
            sampled_q, sampled_k = query[b, h, rows.clamp(min=0)], key[b, h // group, columns.clamp(min=0)]
            products = sampled_q.to(dtype) @ sampled_k.to(dtype).T * scale
            logits = products.to(query.dtype).to(dtype).masked_fill(~seen, -torch.inf)
            weights = logits.softmax(dim=-1).masked_fill(~seen, 0).reshape(blocks)
            if reduction == "max":
                out.append(weights.amax(dim=(1, 3)))
            elif reduction == "mean":
                pairs = exists.reshape(blocks).sum(dim=(1, 3))
                out.append(weights.sum(dim=(1, 3)) / pairs.clamp(min=1))
            else:
                visible = seen.expand_as(logits).reshape(blocks)
                keys = visible.sum(dim=3)
                mean_logit = logits.masked_fill(~seen, 0).reshape(blocks).sum(dim=3) / keys.clamp(min=1)
                normaliser = logits.logsumexp(dim=-1).reshape(blocks[0], blocks[1], 1)
                of_mean = keys * (mean_logit - normaliser).exp().masked_fill(keys == 0, 0)
                error = (weights.sum(dim=3) - of_mean).square().sum(dim=1)
                queries = (rows >= 0).reshape(blocks[:2]).sum(dim=1)[:, None].clamp(min=1)
                per_block = (columns >= 0).reshape(blocks[2:]).sum(dim=1).clamp(min=1)
                out.append((error / queries).sqrt() / per_block)
    return torch.stack(out).reshape(batch, heads, blocks[0], blocks[2])
