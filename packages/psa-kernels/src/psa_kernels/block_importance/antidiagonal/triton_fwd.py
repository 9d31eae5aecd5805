"""A product of groups by groups with a running softmax, then a reduction over what it keeps.

Groups side by side would be a copy of queries and keys; read slot by slot, a product over one token of each group at a
time, they need none. As in sampled importance, the first pass keeps a float for each group of queries and KV block: the
largest logit, or for the mean the summed weights beside the maximum that they are relative to. The second, which knows
the softmax's sums, turns these into scores. Heads are taken a few at a time, so that what is kept stays bounded.

All that passes between the two lies in one buffer, in this order: what is kept of each group and block, the groups'
largest logits, one over their sums, and the maxima that sums of a block are relative to.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from psa_kernels.block_importance.ops import empty_scores
from psa_kernels.triton_device import on_device, shared_memory_limit

_LOG2_E = 1.4426950408889634
_FLOATS_AT_ONCE = 1 << 27


@triton.jit
def _fold_tile(
    row_max, row_sum, row, q_sizes, query_ptr, key_ptr, kept_ptr, kept_max_ptr, query_strides, key_strides, dim,
    first, length, shift, num_rows, num_kv_blocks, scale_log2,
    HEAD_DIM: tl.constexpr, STRIDE: tl.constexpr, PER_BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
    HIDES: tl.constexpr, IS_CAUSAL: tl.constexpr, IS_MEAN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Fold ``BLOCKS`` KV blocks from ``first`` into the running statistics and store what is kept of them.

    With ``HIDES`` some groups may be short, not exist, or not be seen; the groups of queries may be short anyway.
    """
    TILE_M: tl.constexpr = row.shape[0]
    column = first * PER_BLOCK + tl.arange(0, BLOCKS * PER_BLOCK)
    in_dim = (dim < HEAD_DIM)[None, :]
    sizes = tl.minimum(tl.maximum(length - column * STRIDE, 0), STRIDE)  # [COLUMNS], tokens that exist
    q_last = row * STRIDE + q_sizes - 1
    scores = tl.zeros([TILE_M, BLOCKS * PER_BLOCK], tl.float32)
    for slot in range(STRIDE):
        q_token = (q_last - slot).to(tl.int64)
        q_offset = q_token[:, None] * query_strides[2] + dim.to(tl.int64)[None, :] * query_strides[3]
        query = tl.load(query_ptr + q_offset, mask=(slot < q_sizes)[:, None] & in_dim, other=0.0)  # [TILE_M, DIM]
        kv_token = (column * STRIDE + slot).to(tl.int64)
        kv_offset = kv_token[:, None] * key_strides[2] + dim.to(tl.int64)[None, :] * key_strides[3]
        key_mask = (slot < sizes)[:, None] & in_dim if HIDES else in_dim
        key = tl.load(key_ptr + kv_offset, mask=key_mask, other=0.0)  # [COLUMNS, DIM]
        scores = tl.dot(query, tl.trans(key), scores, input_precision=PRECISION)
    if HIDES:
        pairs = tl.maximum(tl.minimum(q_sizes[:, None], sizes[None, :]), 1)
        scores = tl.where((sizes > 0)[None, :], scores * (scale_log2 / pairs), float("-inf"))
        if IS_CAUSAL:
            seen = (column * STRIDE + sizes - 1)[None, :] <= q_last[:, None] + shift
            scores = tl.where(seen, scores, float("-inf"))
    else:
        scores *= (scale_log2 / tl.maximum(q_sizes, 1))[:, None]

    block_max = tl.max(tl.reshape(scores, (TILE_M, BLOCKS, PER_BLOCK)), axis=2)  # [TILE_M, BLOCKS]
    new_max = tl.maximum(row_max, tl.max(block_max, axis=1))
    safe_max = tl.where(new_max == float("-inf"), 0.0, new_max)
    weights = tl.exp2(scores - safe_max[:, None])
    row_sum = row_sum * tl.exp2(row_max - safe_max) + tl.sum(weights, axis=1)
    if IS_MEAN:
        kept = tl.sum(tl.reshape(weights, (TILE_M, BLOCKS, PER_BLOCK)), axis=2)
        tl.store(kept_max_ptr + first // BLOCKS * num_rows + row, safe_max, mask=row < num_rows)
    else:
        kept = block_max
    block = first + tl.arange(0, BLOCKS)
    kept_offset = block.to(tl.int64)[None, :] * num_rows + row[:, None]
    tl.store(kept_ptr + kept_offset, kept, mask=(row < num_rows)[:, None] & (block < num_kv_blocks)[None, :])
    return new_max, row_sum


@triton.jit(
    do_not_specialize=[
        "first_head", "num_heads", "group", "q_len", "kv_len", "num_groups", "num_q_blocks", "num_kv_blocks"
    ]
)  # fmt: skip
def _groups_kernel(
    query_ptr, key_ptr, kv_lengths_ptr, kept_ptr, query_strides, key_strides,
    first_head, num_heads, group, q_len, kv_len, num_groups, num_q_blocks, num_kv_blocks, scale_log2,
    HEAD_DIM: tl.constexpr, DIM_TILE: tl.constexpr, STRIDE: tl.constexpr, SAMPLES_Q: tl.constexpr,
    TILE_M: tl.constexpr, PER_BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
    HAS_LENGTHS: tl.constexpr, IS_CAUSAL: tl.constexpr, IS_MEAN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    num_rows = num_q_blocks.to(tl.int64) * SAMPLES_Q
    num_tiles = (num_rows + TILE_M - 1) // TILE_M
    pid = tl.program_id(0).to(tl.int64)
    own = pid // num_tiles  # head among those of this launch
    head = (first_head + own) % num_heads
    batch = (first_head + own) // num_heads
    # The last rows see the most under a causal mask: they start first.
    tile = num_tiles - 1 - pid % num_tiles
    query_ptr += batch * query_strides[0] + head * query_strides[1]
    key_ptr += batch * key_strides[0] + head // group * key_strides[1]
    first_row = own * num_rows
    row_max_ptr = kept_ptr + num_groups.to(tl.int64) * num_kv_blocks
    row_share_ptr = row_max_ptr + num_groups
    kept_max_ptr = row_share_ptr + num_groups + first_row * ((num_kv_blocks + BLOCKS - 1) // BLOCKS)
    kept_ptr += first_row * num_kv_blocks

    length = kv_len
    if HAS_LENGTHS:
        length = tl.minimum(kv_len, tl.load(kv_lengths_ptr + batch)).to(tl.int32)
    shift = kv_len - q_len
    row = tile.to(tl.int32) * TILE_M + tl.arange(0, TILE_M)
    q_sizes = tl.minimum(tl.maximum(q_len - row * STRIDE, 0), STRIDE)  # [TILE_M], tokens that exist
    dim = tl.arange(0, DIM_TILE)
    row_max = tl.full([TILE_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([TILE_M], tl.float32)
    # Whole groups that all rows see need no mask; blocks behind the last row's position are not looked at.
    block_kv = PER_BLOCK * STRIDE
    end = num_kv_blocks
    clear = length
    if IS_CAUSAL:
        last = tl.minimum((tile.to(tl.int32) + 1) * TILE_M * STRIDE, q_len) - 1
        end = tl.minimum(num_kv_blocks, (last + shift) // block_kv + 1)
        # The last query of the tile's first group, the earliest.
        earliest = tl.minimum(tile.to(tl.int32) * TILE_M * STRIDE + STRIDE, q_len) - 1
        clear = tl.minimum(length, earliest + shift + 1)
    # A short group of queries divides by its own size, whatever whole group it meets.
    whole = tl.maximum(clear, 0) // (block_kv * BLOCKS) * BLOCKS
    for first in range(0, whole, BLOCKS):
        row_max, row_sum = _fold_tile(
            row_max, row_sum, row, q_sizes, query_ptr, key_ptr, kept_ptr, kept_max_ptr, query_strides, key_strides, dim,
            first, length, shift, num_rows, num_kv_blocks, scale_log2,
            HEAD_DIM, STRIDE, PER_BLOCK, BLOCKS, False, False, IS_MEAN, PRECISION,
        )  # fmt: skip
    for first in range(whole, end, BLOCKS):
        row_max, row_sum = _fold_tile(
            row_max, row_sum, row, q_sizes, query_ptr, key_ptr, kept_ptr, kept_max_ptr, query_strides, key_strides, dim,
            first, length, shift, num_rows, num_kv_blocks, scale_log2,
            HEAD_DIM, STRIDE, PER_BLOCK, BLOCKS, True, IS_CAUSAL, IS_MEAN, PRECISION,
        )  # fmt: skip

    # A group that sees nothing, or does not exist, has no share of its weights. What is not a number shows.
    seen = (q_sizes > 0) & (row_sum != 0)
    tl.store(row_max_ptr + first_row + row, tl.where(seen, row_max, 0.0), mask=row < num_rows)
    share = tl.where(seen, tl.div_rn(1.0, tl.where(seen, row_sum, 1.0)), 0.0)
    tl.store(row_share_ptr + first_row + row, share, mask=row < num_rows)


@triton.jit(
    do_not_specialize=["first_head", "num_heads", "q_len", "kv_len", "num_groups", "num_q_blocks", "num_kv_blocks"]
)  # fmt: skip
def _scores_kernel(
    kept_ptr, kv_lengths_ptr, out_ptr, first_head, num_heads, q_len, kv_len, num_groups, num_q_blocks, num_kv_blocks,
    STRIDE: tl.constexpr, SAMPLES_Q: tl.constexpr, ROWS: tl.constexpr, PER_BLOCK: tl.constexpr,
    TILE_BLOCKS: tl.constexpr, BLOCKS: tl.constexpr,
    HAS_LENGTHS: tl.constexpr, IS_CAUSAL: tl.constexpr, IS_MEAN: tl.constexpr,
):  # fmt: skip
    chunks = (num_kv_blocks + BLOCKS - 1) // BLOCKS
    pid = tl.program_id(0).to(tl.int64)
    q_row = pid // chunks  # over the heads of this launch and their query blocks
    own = q_row // num_q_blocks
    batch = (first_head + own) // num_heads
    num_rows = num_q_blocks.to(tl.int64) * SAMPLES_Q
    first_row = own * num_rows
    row_max_ptr = kept_ptr + num_groups.to(tl.int64) * num_kv_blocks
    row_share_ptr = row_max_ptr + num_groups
    tiles = (num_kv_blocks + TILE_BLOCKS - 1) // TILE_BLOCKS
    kept_max_ptr = row_share_ptr + num_groups + first_row * tiles
    kept_ptr += first_row * num_kv_blocks
    block = (pid % chunks).to(tl.int32) * BLOCKS + tl.arange(0, BLOCKS)
    slot = tl.arange(0, ROWS)
    row = (q_row % num_q_blocks).to(tl.int32) * SAMPLES_Q + slot
    row_max = tl.load(row_max_ptr + first_row + row, mask=slot < SAMPLES_Q, other=0.0)  # [ROWS]
    share = tl.load(row_share_ptr + first_row + row, mask=slot < SAMPLES_Q, other=0.0)  # [ROWS]
    mask = (slot < SAMPLES_Q)[:, None] & (block < num_kv_blocks)[None, :]
    if IS_CAUSAL:
        # The first pass has looked at, and kept something of, the blocks that start no later than the group ends.
        last = tl.minimum((row + 1) * STRIDE, q_len) - 1
        mask &= (block * (PER_BLOCK * STRIDE))[None, :] <= (last + kv_len - q_len)[:, None]
    offset = block.to(tl.int64)[None, :] * num_rows + row[:, None]
    if IS_MEAN:
        kept = tl.load(kept_ptr + offset, mask=mask, other=0.0)  # [ROWS, BLOCKS]
        offset = (block // TILE_BLOCKS).to(tl.int64)[None, :] * num_rows + row[:, None]
        kept_max = tl.load(kept_max_ptr + offset, mask=mask, other=float("-inf"))
        weights = kept * tl.exp2(kept_max - row_max[:, None]) * share[:, None]
        length = kv_len
        if HAS_LENGTHS:
            length = tl.minimum(kv_len, tl.load(kv_lengths_ptr + batch)).to(tl.int32)
        left = tl.maximum(length - block * (PER_BLOCK * STRIDE), 0)
        columns = tl.minimum((left + STRIDE - 1) // STRIDE, PER_BLOCK)
        queries = tl.sum(((row * STRIDE < q_len) & (slot < SAMPLES_Q)).to(tl.int32), axis=0)
        score = tl.sum(weights, axis=0) / tl.maximum(columns * queries, 1)
    else:
        kept = tl.load(kept_ptr + offset, mask=mask, other=float("-inf"))  # [ROWS, BLOCKS]
        score = tl.max(tl.exp2(kept - row_max[:, None]) * share[:, None], axis=0)
    out_row = first_head.to(tl.int64) * num_q_blocks + q_row
    tl.store(out_ptr + out_row * num_kv_blocks + block, score, mask=block < num_kv_blocks)


@dataclass(frozen=True)
class _Tile:
    rows: int
    columns: int
    num_warps: int
    num_stages: int

    def shared_memory(self, head_dim: int, element_size: int) -> int:
        """Bytes: queries and keys once a stage, and scores on their way to another layout."""
        return self.num_stages * (self.rows + self.columns) * head_dim * element_size + 4 * self.rows * self.columns


_TILES = (_Tile(128, 128, 8, 2), _Tile(64, 64, 4, 2), _Tile(64, 32, 4, 1), _Tile(32, 32, 4, 1), _Tile(16, 16, 4, 1))


def _choose_tile(per_block: int, dim_tile: int, element_size: int, limit: int) -> _Tile | None:
    """The best tile that fits, never less than a block's groups wide."""
    for tile in _TILES:
        wide = _Tile(tile.rows, max(tile.columns, per_block), tile.num_warps, tile.num_stages)
        if wide.shared_memory(dim_tile, element_size) <= limit:
            return wide
    return None


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
    if query.dtype == torch.float64:
        raise TypeError("impl='triton' of block_importance takes float16, bfloat16 or float32, got torch.float64")
    batch, heads, q_len, head_dim = query.shape
    kv_heads, kv_len = key.shape[1:3]
    num_q_blocks, num_kv_blocks = triton.cdiv(q_len, block_q), triton.cdiv(kv_len, block_kv)
    samples_q, samples_kv = block_q // stride, block_kv // stride
    num_rows = num_q_blocks * samples_q
    dim_tile = max(16, triton.next_power_of_2(head_dim))
    is_mean = reduction == "mean"
    lengths = None if kv_lengths is None else kv_lengths.contiguous()
    with on_device(query):
        limit = shared_memory_limit(query.device)
        tile = _choose_tile(samples_kv, dim_tile, query.element_size(), limit)
        if tile is None:
            raise ValueError(
                f"samples_kv {samples_kv} with head_dim {head_dim} in {query.dtype} do not fit the {limit} bytes of "
                f"shared memory of {query.device}; take fewer samples"
            )
        tile_blocks = tile.columns // samples_kv
        floats = num_rows * (num_kv_blocks + 2 + (triton.cdiv(num_kv_blocks, tile_blocks) if is_mean else 0))
        at_once = min(batch * heads, max(1, _FLOATS_AT_ONCE // floats))
        kept = torch.empty(at_once * floats, dtype=torch.float32, device=query.device)
        out = empty_scores(query, key, block_q, block_kv)
        rows = triton.next_power_of_2(samples_q)
        blocks = max(1, min(128, 4096 // rows))
        for first_head in range(0, batch * heads, at_once):
            here = min(at_once, batch * heads - first_head)
            _groups_kernel[(here * triton.cdiv(num_rows, tile.rows),)](
                query, key, lengths, kept, query.stride(), key.stride(),
                first_head, heads, heads // kv_heads, q_len, kv_len, here * num_rows, num_q_blocks, num_kv_blocks,
                scale * _LOG2_E,
                HEAD_DIM=head_dim, DIM_TILE=dim_tile, STRIDE=stride, SAMPLES_Q=samples_q,
                TILE_M=tile.rows, PER_BLOCK=samples_kv, BLOCKS=tile_blocks,
                HAS_LENGTHS=lengths is not None, IS_CAUSAL=is_causal, IS_MEAN=is_mean,
                PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
                num_warps=tile.num_warps, num_stages=tile.num_stages,
            )  # fmt: skip
            _scores_kernel[(here * num_q_blocks * triton.cdiv(num_kv_blocks, blocks),)](
                kept, lengths, out, first_head, heads, q_len, kv_len, here * num_rows, num_q_blocks, num_kv_blocks,
                STRIDE=stride, SAMPLES_Q=samples_q, ROWS=rows, PER_BLOCK=samples_kv,
                TILE_BLOCKS=tile_blocks, BLOCKS=blocks,
                HAS_LENGTHS=lengths is not None, IS_CAUSAL=is_causal, IS_MEAN=is_mean,
            )  # fmt: skip
    return out
