"""The oracle: dense logits against the rows of every level, rounded to the dtype it is given.

Pooled rows, logits and weights are each rounded once; sums run in at least float32, so that a half-precision oracle
is inexact but does not overflow where the result does not.
"""

import torch
from torch import Tensor

from psa_kernels.layout import BlockLayout, num_rows, pool_size, row_counts


def pooled(x: Tensor, counts: Tensor, pool: int) -> Tensor:
    """Rows of one level: sums over ``pool`` tokens divided by how many of them exist.

    Shapes: x ``[B, H_kv, kv_len, D]``, counts ``[1 or B, rows]``.
    """
    exists = torch.arange(pool, device=x.device) < counts[:, :, None]  # [B, rows, pool]
    padding = counts.shape[1] * pool - x.shape[2]
    groups = torch.nn.functional.pad(x, (0, 0, 0, padding)).reshape(*x.shape[:2], -1, pool, x.shape[3])
    wide = torch.promote_types(x.dtype, torch.float32)
    sums = groups.to(wide).masked_fill(~exists[:, None, :, :, None], 0).sum(dim=3)
    return (sums / counts.clamp(min=1)[:, None, :, None]).to(x.dtype)


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    levels: Tensor,
    layout: BlockLayout,
    kv_lengths: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    device, group = query.device, query.shape[1] // key.shape[1]
    statistics = torch.promote_types(query.dtype, torch.float32)
    levels = layout.executed_levels(levels).repeat_interleave(layout.block_q, dim=2)[:, :, : layout.q_len]
    position = torch.arange(layout.q_len, device=device)[:, None] + layout.kv_len - layout.q_len

    logits, values = [], []
    for level in range(1, layout.num_levels + 1):
        pool, rows = pool_size(level), num_rows(layout.kv_len, level)
        counts = row_counts(layout.kv_len, level, kv_lengths, device)
        keys = pooled(key, counts, pool).repeat_interleave(group, dim=1)
        values.append(pooled(value, counts, pool).repeat_interleave(group, dim=1))
        bias = counts.clamp(min=1).to(statistics).log()[:, None, None, :]
        kept = (levels == level).repeat_interleave(layout.block_kv // pool, dim=3)[..., :rows]
        kept = kept & (counts > 0)[:, None, None, :]
        if layout.is_causal and level == 1:
            kept = kept & (torch.arange(rows, device=device) <= position)
        products = query.to(statistics) @ keys.to(statistics).mT * scale
        logits.append((products.to(query.dtype) + bias).masked_fill(~kept, -torch.inf))

    all_logits, all_values = torch.cat(logits, dim=-1), torch.cat(values, dim=2)
    lse = all_logits.logsumexp(dim=-1)
    # exp(-inf - 0) is 0, so a query with nothing to read gets weights, an output and gradients of 0.
    weights = (all_logits - lse.masked_fill(lse.isinf(), 0)[..., None]).exp()
    return (weights.to(query.dtype).to(statistics) @ all_values.to(statistics)).to(query.dtype), lse
