"""Gradients in plain torch: each query block meets again only the rows it read.

The weights are recomputed from the log-sum-exp, batch by batch as in the forward pass, so that the logits in memory
stay under the same fixed size. Gradients of rows add up a level at a time and go to their tokens at the end.
"""

import torch
from torch import Tensor

from psa_kernels.layout import num_rows, row_counts
from psa_kernels.pyramid_attention.ops import lse_dtype
from psa_kernels.pyramid_attention.torch_impl import Rows, in_blocks, reads_of_heads


def _attend_backward(
    query: Tensor, grad_out: Tensor, grad_lse: Tensor, lse: Tensor, q_last: Tensor | None, rows: Tensor, table: Rows
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query blocks ``[N, block_q, D]``, which come scaled, and of what they read.

    Args:
        grad_lse, lse: ``[N, block_q]``; ``lse`` is inf for a query with nothing to read.
        q_last: the last token each query may see, None where all are seen.
        rows: ``[N, R]`` row numbers of ``table``.

    Returns:
        The gradients of the scaled queries ``[N, block_q, D]``, of the keys and of the values ``[N, R, D]``.
    """
    keys, values = (x.index_select(0, rows.flatten()).view(*rows.shape, -1) for x in (table.keys, table.values))
    logits = torch.baddbmm(table.bias[rows][:, None, :], query, keys.mT)
    if q_last is not None:
        logits.masked_fill_(table.last_token[rows][:, None, :] > q_last[:, :, None], -torch.inf)
    weights = logits.sub_(lse[..., None]).exp_()
    grad_values = torch.bmm(weights.mT, grad_out)
    grad_weights = torch.bmm(grad_out, values.mT)
    # Summed here over all that a query reads, this is what grad_out times out is up to out's rounding.
    delta = torch.linalg.vecdot(weights, grad_weights) - grad_lse
    grad_logits = grad_weights.sub_(delta[..., None]).mul_(weights)
    return torch.bmm(grad_logits, keys), torch.bmm(grad_logits.mT, query), grad_values


def _to_tokens(rows: Tensor, kv_len: int, num_levels: int, lengths: Tensor | None) -> Tensor:
    """Gradients of tokens ``[kv_len, D]`` from those of the rows of all levels ``[rows + 1, D]``."""
    tokens = rows.new_zeros((1, rows.shape[1]))
    last = rows.shape[0] - 1
    for level in range(num_levels, 0, -1):
        counts = row_counts(kv_len, level, lengths, rows.device)[0, :, None]
        first = last - num_rows(kv_len, level)
        own = rows[first:last] / counts.clamp(min=1)
        # A row of this level is half of one of the next coarser.
        coarser = tokens.repeat_interleave(2, dim=0)[: len(own)] if level < num_levels else 0
        tokens, last = (own + coarser).masked_fill_(counts == 0, 0), first
    return tokens


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    indices: Tensor,
    offsets: Tensor,
    kv_lengths: Tensor | None,
    block_q: int,
    block_kv: int,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    q_len, head_dim = query.shape[2:]
    kv_len, num_levels = key.shape[2], offsets.shape[3] - 1
    dtype = lse_dtype(query)
    gradients = query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)
    for head in reads_of_heads(query, key, value, indices, offsets, kv_lengths, block_q, block_kv, is_causal):
        own, own_lse = query[head.of], lse[head.of]
        nothing_read = own_lse == -torch.inf
        blocks, grad_blocks = (in_blocks(x, block_q) for x in (own.to(dtype) * scale, grad_out[head.of].to(dtype)))
        lse_blocks = in_blocks(own_lse.masked_fill(nothing_read, torch.inf), block_q, torch.inf)
        grad_lse_blocks = torch.zeros_like(lse_blocks)
        if grad_lse is not None:
            grad_lse_blocks = in_blocks(grad_lse[head.of].masked_fill(nothing_read, 0), block_q)
        grad_query, grad_keys, grad_values = (torch.zeros_like(x) for x in (blocks, head.table.keys, head.table.values))
        for chosen, seen, rows in head.batches():
            of_query, of_keys, of_values = _attend_backward(
                blocks[chosen], grad_blocks[chosen], grad_lse_blocks[chosen], lse_blocks[chosen], seen, rows, head.table
            )
            grad_query[chosen] = of_query
            grad_keys.index_add_(0, rows.flatten(), of_keys.flatten(0, 1))
            grad_values.index_add_(0, rows.flatten(), of_values.flatten(0, 1))
        gradients[0][head.of] = grad_query.mul_(scale).view(len(own), -1, head_dim)[:, :q_len].to(query.dtype)
        for to, of_rows in ((gradients[1], grad_keys), (gradients[2], grad_values)):
            to[head.of[0], head.kv_head] = _to_tokens(of_rows, kv_len, num_levels, head.lengths)
    return gradients
