"""One product of concatenated groups, a few query blocks at a time, so that memory stays bounded."""

import torch
from torch import Tensor

from psa_kernels.block_importance.antidiagonal.groups import group_sizes
from psa_kernels.block_importance.ops import empty_scores, importance_dtype
from psa_kernels.layout import existing_keys

_LOGITS_AT_ONCE = 1 << 23


def _concatenate(x: Tensor, first: Tensor, step: int, sizes: Tensor, stride: int) -> Tensor:
    """Tokens ``first``, ``first + step``, ... of each group side by side, zeros where a group has no more.

    Args:
        x: ``[L, D]``.
        first, sizes: int64 ``[groups]``: where a group starts, and how many tokens it has, up to ``stride``.
        step: 1 or -1.

    Returns:
        ``[groups, stride * D]`` in the importance's dtype.
    """
    slot = torch.arange(stride, device=x.device)
    exists = slot < sizes[:, None]
    tokens = (first[:, None] + step * slot).where(exists, 0)
    # Filled, not multiplied by zero: what lies past the end may be no number.
    rows = x[tokens].to(importance_dtype(x)).masked_fill_(~exists[..., None], 0)
    return rows.flatten(1)


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
    device = query.device
    batch, heads, q_len, _ = query.shape
    kv_len, group = key.shape[2], heads // key.shape[1]
    num_q_blocks, num_kv_blocks = -(-q_len // block_q), -(-kv_len // block_kv)
    samples_q, samples_kv = block_q // stride, block_kv // stride
    lengths = existing_keys(kv_len, kv_lengths, device)
    q_sizes = group_sizes(torch.full((), q_len, device=device), num_q_blocks * samples_q, stride)
    q_last = torch.arange(num_q_blocks * samples_q, device=device) * stride + q_sizes - 1
    kv_first = torch.arange(num_kv_blocks * samples_kv, device=device) * stride
    out = empty_scores(query, key, block_q, block_kv)
    blocks_at_once = max(1, _LOGITS_AT_ONCE // (samples_q * num_kv_blocks * samples_kv))
    for b in range(batch):
        kv_sizes = group_sizes(lengths[b % len(lengths)], num_kv_blocks * samples_kv, stride)
        kv_last = kv_first + kv_sizes - 1
        for h in range(heads):
            if h % group == 0:
                keys = _concatenate(key[b, h // group], kv_first, 1, kv_sizes, stride)
            for block in range(0, num_q_blocks, blocks_at_once):
                part = slice(block * samples_q, (block + blocks_at_once) * samples_q)
                sizes, last = q_sizes[part], q_last[part]
                logits = _concatenate(query[b, h], last, -1, sizes, stride) @ keys.T
                # Scaled last, one rounding of a logit instead of one of each query. A full group's size rounds nothing.
                logits *= scale
                logits /= torch.minimum(sizes[:, None], kv_sizes[None, :]).clamp_(min=1)
                hidden = (sizes == 0)[:, None] | (kv_sizes == 0)[None, :]
                if is_causal:
                    hidden |= kv_last[None, :] > last[:, None] + kv_len - q_len
                weights = logits.masked_fill_(hidden, -torch.inf).softmax(dim=-1).masked_fill_(hidden, 0)
                weights = weights.view(-1, samples_q, num_kv_blocks, samples_kv)
                score = weights.amax((1, 3)) if reduction == "max" else weights.sum((1, 3))
                out[b, h, block : block + blocks_at_once] = score
        if reduction == "mean":
            q_groups = (q_sizes > 0).view(num_q_blocks, samples_q).sum(-1)
            kv_groups = (kv_sizes > 0).view(num_kv_blocks, samples_kv).sum(-1)
            out[b] /= (q_groups[:, None] * kv_groups).clamp(min=1)
    return out
