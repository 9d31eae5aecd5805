"""A few query blocks at a time, so that memory stays bounded."""

import torch
from torch import Tensor

from psa_kernels.block_importance.ops import empty_scores, importance_dtype
from psa_kernels.block_importance.sampling import draw_positions

_LOGITS_AT_ONCE = 1 << 23


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
    batch, heads, q_len, _ = query.shape
    kv_len, group = key.shape[2], heads // key.shape[1]
    dtype = importance_dtype(query)
    rows = q_positions[0].long()  # [num_q_blocks, samples_q]
    num_kv_blocks, samples_kv = kv_positions.shape[1:]
    out = empty_scores(query, key, block_q, block_kv)
    step = max(1, _LOGITS_AT_ONCE // (rows.shape[1] * num_kv_blocks * samples_kv))
    for b in range(batch):
        columns = kv_positions[b % kv_positions.shape[0]].flatten().long()
        for h in range(heads):
            sampled_k = key[b, h // group, columns.clamp(min=0)].to(dtype)
            for first in range(0, rows.shape[0], step):
                row = rows[first : first + step].flatten()
                logits = (query[b, h, row.clamp(min=0)].to(dtype) * scale) @ sampled_k.T
                hidden = (row < 0)[:, None] | (columns < 0)[None, :]
                if is_causal:
                    hidden |= columns[None, :] > row[:, None] + kv_len - q_len
                logits.masked_fill_(hidden, -torch.inf)
                shape = (-1, rows.shape[1], num_kv_blocks, samples_kv)
                of_mean = _weight_of_mean(logits.view(shape)) if reduction == "error" else None
                weights = logits.softmax(dim=-1).masked_fill_(hidden, 0).view(shape)
                if reduction == "max":
                    out[b, h, first : first + step] = weights.amax((1, 3))
                elif of_mean is None:
                    out[b, h, first : first + step] = weights.sum((1, 3))
                else:
                    out[b, h, first : first + step] = (weights.sum(3) - of_mean).square().sum(1)
        queries, keys = (rows >= 0).sum(-1)[:, None].clamp(min=1), (columns.view(num_kv_blocks, -1) >= 0).sum(-1)
        if reduction == "mean":
            out[b] /= queries * keys.clamp(min=1)
        elif reduction == "error":
            out[b] = (out[b] / queries).sqrt() / keys.clamp(min=1)
    return out


def _weight_of_mean(logits: Tensor) -> Tensor:
    """What the keys of a block weigh in the softmax when each has their mean logit.

    Args:
        logits: ``[query blocks, samples_q, num_kv_blocks, samples_kv]``, -inf for hidden keys.

    Returns:
        ``[query blocks, samples_q, num_kv_blocks]``, 0 for a block that the query sees no key of.
    """
    seen = logits > -torch.inf
    keys = seen.sum(-1)
    mean = logits.where(seen, 0).sum(-1) / keys.clamp(min=1)
    normaliser = logits.flatten(2).logsumexp(-1, keepdim=True)
    return (keys * (mean - normaliser).exp()).masked_fill(keys == 0, 0)
