"""Gathered attention in plain torch: each query block multiplies only the rows it reads.

Query blocks of the heads that share a KV head are sorted by how many rows they read and taken in batches of about
equal length, so that little is padded and the logits in memory stay under a fixed size.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from psa_kernels.layout import num_rows, pool_size, row_counts
from psa_kernels.pyramid_attention.ops import empty_out, lse_dtype
from psa_kernels.pyramid_pool.torch_impl import forward as pool_rows

_LOGITS_AT_ONCE = 1 << 20


@dataclass(frozen=True)
class Rows:
    """The rows of every level of one KV head, and a last row that stands for nothing.

    Attributes:
        keys, values: ``[rows + 1, D]`` in the dtype of the arithmetic.
        bias: ``[rows + 1]``, ln(tokens a row covers), -inf where there are none.
        last_token: int64 ``[rows + 1]``, the last token a row covers.
    """

    keys: Tensor
    values: Tensor
    bias: Tensor
    last_token: Tensor


def _row_tables(
    kv_len: int, num_levels: int, kv_lengths: Tensor | None, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """``bias`` ``[1 or B, rows + 1]`` and ``last_token`` ``[rows + 1]`` of :class:`Rows`."""
    counts, last = [], []
    for level in range(1, num_levels + 1):
        counts.append(row_counts(kv_len, level, kv_lengths, device))
        rows = torch.arange(1, num_rows(kv_len, level) + 1, device=device)
        last.append((rows * pool_size(level)).clamp(max=kv_len) - 1)
    counts.append(torch.zeros_like(counts[0][:, :1]))
    last.append(torch.zeros_like(last[0][:1]))
    return torch.cat(counts, dim=-1).to(dtype).log(), torch.cat(last)


def _all_rows(x: Tensor, kv_lengths: Tensor | None, num_levels: int, bias: Tensor) -> Tensor:
    """``keys`` or ``values`` of :class:`Rows` from ``x`` ``[1, 1, kv_len, D]``; rows that stand for no token are
    0, so that whatever lies past a sample's length stays out of the sums."""
    rows = torch.cat([x, pool_rows(x, kv_lengths, num_levels), torch.zeros_like(x[:, :, :1])], dim=2)[0, 0]
    return rows.to(bias.dtype).masked_fill(bias.isinf()[:, None], 0)


def _rows_read(indices: Tensor, offsets: Tensor, kv_len: int, block_kv: int, missing: int) -> tuple[Tensor, Tensor]:
    """Which rows each query block reads.

    Args:
        indices, offsets: a plan's, flattened to ``[N, num_kv_blocks]`` and ``[N, num_levels + 1]``.
        missing: the row that fills up shorter lists.

    Returns:
        int64 ``[N, longest]`` row numbers of :class:`Rows`, and int64 ``[N]`` how many of them are real.
    """
    device, num_levels = indices.device, offsets.shape[1] - 1
    slot = torch.arange(indices.shape[1], device=device)
    level = (slot[None, :, None] >= offsets[:, None, 1:]).sum(-1)  # 0 for level 1, num_levels past the end
    kept = level < num_levels
    owner, level, block = kept.nonzero()[:, 0], level[kept], indices[kept].long()
    levels = range(1, num_levels + 1)
    level_first = torch.tensor([0] + [num_rows(kv_len, x) for x in levels], device=device).cumsum(0)
    in_block = torch.tensor([block_kv // pool_size(x) for x in levels], device=device)
    in_sequence = torch.tensor([num_rows(kv_len, x) for x in levels], device=device)

    first = block * in_block[level]
    length = in_block[level].minimum(in_sequence[level] - first)
    totals = torch.zeros(indices.shape[0], dtype=torch.int64, device=device).index_add_(0, owner, length)
    entry_start = length.cumsum(0) - length
    within = torch.arange(int(length.sum()), device=device) - entry_start.repeat_interleave(length)
    row = (level_first[level] + first).repeat_interleave(length) + within
    list_start = (totals.cumsum(0) - totals).repeat_interleave(totals)
    owner = owner.repeat_interleave(length)
    rows = torch.full((indices.shape[0], max(1, int(totals.max()))), missing, dtype=torch.int64, device=device)
    rows[owner, torch.arange(row.shape[0], device=device) - list_start] = row
    return rows, totals


def _attend(query: Tensor, q_last: Tensor | None, rows: Tensor, table: Rows) -> tuple[Tensor, Tensor]:
    """Attention of query blocks ``[N, block_q, D]`` to their own rows ``[N, R]``; ``q_last`` ``[N, block_q]`` is
    the last token each query may see, None where all are seen. Returns out and lse ``[N, block_q]``."""
    keys = table.keys.index_select(0, rows.flatten()).view(*rows.shape, -1)
    bias = table.bias[rows][:, None, :]
    if q_last is not None:
        bias = bias.masked_fill(table.last_token[rows][:, None, :] > q_last[:, :, None], -torch.inf)
        logits = torch.bmm(query, keys.mT).add_(bias)
    else:
        logits = torch.baddbmm(bias, query, keys.mT)
    del keys
    row_max = logits.amax(dim=-1, keepdim=True)
    row_max.masked_fill_(row_max.isinf(), 0)
    weights = logits.sub_(row_max).exp_()
    total = weights.sum(dim=-1, keepdim=True)
    values = table.values.index_select(0, rows.flatten()).view(*rows.shape, -1)
    # A query with nothing to read has weights and a total of 0, and gets 0.
    out = torch.bmm(weights, values).div_(total.masked_fill(total == 0, 1))
    return out, (row_max + total.log()).squeeze(-1)


def in_blocks(x: Tensor, block_q: int, fill: float = 0.0) -> Tensor:
    """``[heads, q_len, ...]`` as ``[heads * num_q_blocks, block_q, ...]``, the last block of a head filled up."""
    padding = -x.shape[1] % block_q
    whole = torch.nn.functional.pad(x, (0, 0) * (x.dim() - 2) + (0, padding), value=fill)
    return whole.reshape(-1, block_q, *x.shape[2:])


@dataclass(frozen=True)
class HeadReads:
    """What the query heads of one sample that share a KV head read.

    Attributes:
        of: the sample and its query heads, an index of ``[B, H, ...]``.
        kv_head: the KV head.
        lengths: ``[1]``, how many keys the sample has; None is all.
        table: the rows of the KV head.
        rows: int64 ``[heads * num_q_blocks, longest]``, the rows that each query block reads.
        totals: int64 ``[heads * num_q_blocks]``, how many of them are real.
        block_q: queries of a block.
        q_last: ``[num_q_blocks, block_q]``, the last token each query may see; None where all are seen.
    """

    of: tuple[int, slice]
    kv_head: int
    lengths: Tensor | None
    table: Rows
    rows: Tensor
    totals: Tensor
    block_q: int
    q_last: Tensor | None

    def batches(self) -> Iterator[tuple[Tensor, Tensor | None, Tensor]]:
        """Query blocks of about equally many rows, as many as their logits allow: their numbers ``[N]``, the last token
        that their queries may see ``[N, block_q]`` or None, and their rows ``[N, R]``."""
        order = self.totals.argsort(descending=True, stable=True)
        lengths = self.totals[order].tolist()
        first = 0
        while first < len(lengths):
            longest = max(lengths[first], 1)
            step = max(1, _LOGITS_AT_ONCE // (longest * self.block_q))
            chosen = order[first : first + step]
            seen = None if self.q_last is None else self.q_last[chosen % len(self.q_last)]
            yield chosen, seen, self.rows[chosen, :longest]
            first += step


def reads_of_heads(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    indices: Tensor,
    offsets: Tensor,
    kv_lengths: Tensor | None,
    block_q: int,
    block_kv: int,
    is_causal: bool,
) -> Iterator[HeadReads]:
    """:class:`HeadReads` of every KV head of every sample; arguments as of the operator."""
    q_len, (num_kv_heads, kv_len) = query.shape[2], key.shape[1:3]
    num_q_blocks, num_levels, group = indices.shape[2], offsets.shape[3] - 1, query.shape[1] // num_kv_heads
    bias, last_token = _row_tables(kv_len, num_levels, kv_lengths, lse_dtype(query), query.device)
    q_last = None
    if is_causal:
        token = torch.arange(num_q_blocks * block_q, device=query.device).view(num_q_blocks, block_q)
        q_last = token + kv_len - q_len
    for b in range(query.shape[0]):
        lengths = None if kv_lengths is None else kv_lengths[b : b + 1]
        for kv_head in range(num_kv_heads):
            own = slice(kv_head * group, (kv_head + 1) * group)
            own_bias = bias[b % bias.shape[0]]
            keys, values = (
                _all_rows(x[b : b + 1, kv_head : kv_head + 1], lengths, num_levels, own_bias) for x in (key, value)
            )
            table = Rows(keys, values, own_bias, last_token)
            missing = len(last_token) - 1
            rows, totals = _rows_read(
                indices[b, own].flatten(0, 1), offsets[b, own].flatten(0, 1), kv_len, block_kv, missing
            )
            yield HeadReads((b, own), kv_head, lengths, table, rows, totals, block_q, q_last)


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    indices: Tensor,
    offsets: Tensor,
    kv_lengths: Tensor | None,
    block_q: int,
    block_kv: int,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    q_len, head_dim = query.shape[2:]
    dtype = lse_dtype(query)
    out = empty_out(query)
    lse = query.new_empty(query.shape[:3], dtype=dtype)
    for head in reads_of_heads(query, key, value, indices, offsets, kv_lengths, block_q, block_kv, is_causal):
        own = query[head.of]
        blocks = in_blocks(own.to(dtype) * scale, block_q)
        head_out, head_lse = torch.empty_like(blocks), torch.empty_like(blocks[..., 0])
        for chosen, seen, rows in head.batches():
            head_out[chosen], head_lse[chosen] = _attend(blocks[chosen], seen, rows, head.table)
        out[head.of] = head_out.view(len(own), -1, head_dim)[:, :q_len].to(query.dtype)
        lse[head.of] = head_lse.view(len(own), -1)[:, :q_len]
    return out, lse
