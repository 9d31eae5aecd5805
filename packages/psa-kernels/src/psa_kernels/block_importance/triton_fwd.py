"""One pass over the sampled logits, then one over what it leaves, after a small kernel has drawn the sample.

The first pass keeps each sampled query's largest logit and, for every KV block, the query's largest score in it: a
float a query and block. The second turns these into weights, now that the softmax's sum is known, and reduces over the
queries of a block. For the mean the first keeps the block's summed weights instead, beside the maximum that they are
relative to; for the error, what the weight of their mean logit leaves of this sum.

All that passes between the two lies in one buffer, in this order: what is kept of each query and block, the queries'
largest logits, one over their sums, and the maxima that sums of a block are relative to.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from psa_kernels.block_importance.sampling import KEY_STREAM, QUERY_STREAM, SEED_BITS
from psa_kernels.triton_device import on_device, shared_memory_limit
from psa_kernels.triton_math import dot_rows

_LOG2_E = 1.4426950408889634
# In place of a scale of 0, so that it times a hidden score of -inf is not NaN. No logit differs from 0 by it.
_LEAST_SCALE = 1e-36
_DRAWS = 256  # positions a program draws


@triton.jit
def _mix(x):
    """``sampling._mix`` of int64 numbers below 2**32."""
    x = (x ^ (x >> 16)) * 0x45D9F3B & 0xFFFFFFFF
    x = (x ^ (x >> 15)) * 0x2C1B3C6D & 0xFFFFFFFF
    return x ^ (x >> 16)


@triton.jit
def _draw(index, length, seed, stream, BLOCK: tl.constexpr, SAMPLES: tl.constexpr):
    """Position number ``index`` of a sequence, to the bit what ``sampling.sample_positions`` has there."""
    block = index // SAMPLES
    slot = index % SAMPLES
    first = block * BLOCK
    count = tl.minimum(tl.maximum(length - first, 0), BLOCK)
    low = slot * count // SAMPLES
    high = (slot + 1) * count // SAMPLES
    key = _mix((seed * 4 + stream) & 0xFFFFFFFF)
    draw = _mix(_mix((block + key) & 0xFFFFFFFF) ^ (slot * 0x9E3779B1 & 0xFFFFFFFF))
    return tl.where(high > low, first + low + (draw * (high - low) >> 32), -1).to(tl.int32)


@triton.jit(do_not_specialize=["q_len", "kv_len", "seed", "num_q_blocks", "num_kv_blocks"])
def _positions_kernel(
    positions_ptr, kv_lengths_ptr, q_len, kv_len, seed, num_q_blocks, num_kv_blocks,
    BLOCK_Q: tl.constexpr, SAMPLES_Q: tl.constexpr, QUERIES: tl.constexpr,
    BLOCK_KV: tl.constexpr, SAMPLES_KV: tl.constexpr, KEYS: tl.constexpr,
    HAS_LENGTHS: tl.constexpr, DRAWS: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    num_q = num_q_blocks * SAMPLES_Q
    num_kv = num_kv_blocks * SAMPLES_KV
    q_programs = (num_q + DRAWS - 1) // DRAWS
    kv_programs = (num_kv + DRAWS - 1) // DRAWS
    seed = seed.to(tl.int64)
    if pid < q_programs:
        index = pid * DRAWS + tl.arange(0, DRAWS)
        position = _draw(index, q_len.to(tl.int64), seed, QUERIES, BLOCK_Q, SAMPLES_Q)
        tl.store(positions_ptr + index, position, mask=index < num_q)
    else:
        row = (pid - q_programs) // kv_programs
        index = (pid - q_programs) % kv_programs * DRAWS + tl.arange(0, DRAWS)
        length = kv_len.to(tl.int64)
        if HAS_LENGTHS:
            length = tl.minimum(length, tl.load(kv_lengths_ptr + row).to(tl.int64))
        position = _draw(index, length, seed, KEYS, BLOCK_KV, SAMPLES_KV)
        tl.store(positions_ptr + num_q + row * num_kv + index, position, mask=index < num_kv)


@triton.jit
def _columns(first, COLUMNS: tl.constexpr, PER_BLOCK: tl.constexpr, SAMPLES_KV: tl.constexpr):
    """Sample number of each column of a tile and whether it is one: each block has ``PER_BLOCK`` columns, a power
    of two, of which ``SAMPLES_KV`` are used."""
    column = tl.arange(0, COLUMNS)
    return (first + column // PER_BLOCK) * SAMPLES_KV + column % PER_BLOCK, column % PER_BLOCK < SAMPLES_KV


@triton.jit
def _weight_of_mean(
    scores, safe_max, scale_log2, BLOCKS: tl.constexpr, PER_BLOCK: tl.constexpr, HIDES: tl.constexpr
):  # fmt: skip
    """Weight of each block as so many keys with their mean score, [TILE_M, BLOCKS]; hidden scores are -inf."""
    shape: tl.constexpr = (scores.shape[0], BLOCKS, PER_BLOCK)
    if HIDES:
        seen = scores != float("-inf")
        keys = tl.sum(tl.reshape(seen.to(tl.float32), shape), axis=2)
        mean = tl.sum(tl.reshape(tl.where(seen, scores, 0.0), shape), axis=2) / tl.maximum(keys, 1.0)
    else:
        keys = PER_BLOCK
        mean = tl.sum(tl.reshape(scores, shape), axis=2) / PER_BLOCK
    return keys * tl.exp2(mean * scale_log2 - safe_max[:, None])


@triton.jit
def _fold_tile(
    row_max, row_sum, query, row, slot, key_ptr, kv_positions_ptr, kept_ptr, kept_max_ptr, key_strides, dim,
    first, shift, num_rows, num_kv_blocks, scale_log2,
    HEAD_DIM: tl.constexpr, SAMPLES_KV: tl.constexpr, PER_BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
    HIDES: tl.constexpr, IS_CAUSAL: tl.constexpr, SUMS: tl.constexpr, IS_ERROR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Fold ``BLOCKS`` KV blocks from ``first`` into the running statistics and store what is kept of them.

    With ``HIDES`` some columns may not exist, or not be seen.
    """
    TILE_M: tl.constexpr = query.shape[0]
    sample, used = _columns(first, BLOCKS * PER_BLOCK, PER_BLOCK, SAMPLES_KV)
    in_dim = (dim < HEAD_DIM)[None, :]
    if HIDES:
        exists = used & (sample < num_kv_blocks * SAMPLES_KV)
        position = tl.load(kv_positions_ptr + sample, mask=exists, other=-1)  # [COLUMNS]
        key_mask = (position >= 0)[:, None] & in_dim
    else:
        position = tl.load(kv_positions_ptr + sample)  # [COLUMNS]
        key_mask = in_dim
    key_offset = position.to(tl.int64)[:, None] * key_strides[2] + dim.to(tl.int64)[None, :] * key_strides[3]
    key = tl.load(key_ptr + key_offset, mask=key_mask, other=0.0)  # [COLUMNS, DIM]
    scores = dot_rows(query, key, PRECISION)
    if HIDES:
        scores += tl.where(position >= 0, 0.0, float("-inf"))[None, :]
        if IS_CAUSAL:
            scores = tl.where(position[None, :] <= row[:, None] + shift, scores, float("-inf"))

    block_max = tl.max(tl.reshape(scores, (TILE_M, BLOCKS, PER_BLOCK)), axis=2)  # [TILE_M, BLOCKS]
    new_max = tl.maximum(row_max, tl.max(block_max, axis=1) * scale_log2)
    safe_max = tl.where(new_max == float("-inf"), 0.0, new_max)
    weights = tl.exp2(scores * scale_log2 - safe_max[:, None])
    row_sum = row_sum * tl.exp2(row_max - safe_max) + tl.sum(weights, axis=1)
    if SUMS:
        kept = tl.sum(tl.reshape(weights, (TILE_M, BLOCKS, PER_BLOCK)), axis=2)
        if IS_ERROR:
            kept -= _weight_of_mean(scores, safe_max, scale_log2, BLOCKS, PER_BLOCK, HIDES)
        tl.store(kept_max_ptr + first // BLOCKS * num_rows + slot, safe_max, mask=slot < num_rows)
    else:
        kept = block_max
    block = first + tl.arange(0, BLOCKS)
    kept_offset = block.to(tl.int64)[None, :] * num_rows + slot[:, None]
    kept_mask = (slot < num_rows)[:, None] & (block < num_kv_blocks)[None, :]
    tl.store(kept_ptr + kept_offset, kept, mask=kept_mask)
    return new_max, row_sum


@triton.jit(
    do_not_specialize=[
        "num_heads", "group", "kv_len", "shift", "num_sampled", "num_q_blocks", "num_kv_blocks", "kv_positions_stride"
    ]
)  # fmt: skip
def _logits_kernel(
    query_ptr, key_ptr, kv_lengths_ptr, positions_ptr, kept_ptr, query_strides, key_strides,
    num_heads, group, kv_len, shift, num_sampled, num_q_blocks, num_kv_blocks, kv_positions_stride, scale_log2,
    HEAD_DIM: tl.constexpr, DIM_TILE: tl.constexpr, SAMPLES_Q: tl.constexpr, TILE_M: tl.constexpr,
    BLOCK_KV: tl.constexpr, SAMPLES_KV: tl.constexpr, PER_BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
    HAS_LENGTHS: tl.constexpr, NEGATE: tl.constexpr, IS_CAUSAL: tl.constexpr, SUMS: tl.constexpr,
    IS_ERROR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    num_rows = num_q_blocks * SAMPLES_Q
    num_tiles = (num_rows + TILE_M - 1) // TILE_M
    pid = tl.program_id(0).to(tl.int64)
    head = pid // num_tiles % num_heads
    batch = pid // (num_tiles * num_heads)
    query_ptr += batch * query_strides[0] + head * query_strides[1]
    key_ptr += batch * key_strides[0] + head // group * key_strides[1]
    kv_positions_ptr = positions_ptr + num_rows + batch * kv_positions_stride
    # A head's rows of one KV block lie side by side, as the threads that hold them do.
    first_row = (batch * num_heads + head) * num_rows
    row_max_ptr = kept_ptr + num_sampled.to(tl.int64) * num_kv_blocks
    row_share_ptr = row_max_ptr + num_sampled
    kept_max_ptr = row_share_ptr + num_sampled + first_row * ((num_kv_blocks + BLOCKS - 1) // BLOCKS)
    kept_ptr += first_row * num_kv_blocks

    slot = (pid % num_tiles) * TILE_M + tl.arange(0, TILE_M)
    dim = tl.arange(0, DIM_TILE)
    row = tl.load(positions_ptr + slot, mask=slot < num_rows, other=-1)  # [TILE_M]
    offset = row.to(tl.int64)[:, None] * query_strides[2] + dim.to(tl.int64)[None, :] * query_strides[3]
    query = tl.load(query_ptr + offset, mask=(row >= 0)[:, None] & (dim < HEAD_DIM)[None, :], other=0.0)
    if NEGATE:  # scale_log2 is never negative, so that the largest score has the largest logit
        query = -query

    row_max = tl.full([TILE_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([TILE_M], tl.float32)
    # A block that exists to its last token has every sample, and no column of it is hidden if each is used.
    whole_blocks = 0
    if not IS_CAUSAL and PER_BLOCK == SAMPLES_KV:
        length = kv_len
        if HAS_LENGTHS:
            length = tl.minimum(kv_len, tl.load(kv_lengths_ptr + batch)).to(tl.int32)
        whole_blocks = length // BLOCK_KV // BLOCKS * BLOCKS
    for first in range(0, whole_blocks, BLOCKS):
        row_max, row_sum = _fold_tile(
            row_max, row_sum, query, row, slot, key_ptr, kv_positions_ptr, kept_ptr, kept_max_ptr, key_strides, dim,
            first, shift, num_rows, num_kv_blocks, scale_log2,
            HEAD_DIM, SAMPLES_KV, PER_BLOCK, BLOCKS, False, False, SUMS, IS_ERROR, PRECISION,
        )  # fmt: skip
    for first in range(whole_blocks, num_kv_blocks, BLOCKS):
        row_max, row_sum = _fold_tile(
            row_max, row_sum, query, row, slot, key_ptr, kv_positions_ptr, kept_ptr, kept_max_ptr, key_strides, dim,
            first, shift, num_rows, num_kv_blocks, scale_log2,
            HEAD_DIM, SAMPLES_KV, PER_BLOCK, BLOCKS, True, IS_CAUSAL, SUMS, IS_ERROR, PRECISION,
        )  # fmt: skip

    # A query that sees nothing, or does not exist, has no share of its weights. What is not a number shows.
    seen = (row >= 0) & (row_sum != 0)
    tl.store(row_max_ptr + first_row + slot, tl.where(seen, row_max, 0.0), mask=slot < num_rows)
    share = tl.where(seen, tl.div_rn(1.0, tl.where(seen, row_sum, 1.0)), 0.0)
    tl.store(row_share_ptr + first_row + slot, share, mask=slot < num_rows)


@triton.jit(do_not_specialize=["num_heads", "num_sampled", "num_q_blocks", "num_kv_blocks", "kv_positions_stride"])
def _reduce_kernel(
    kept_ptr, positions_ptr, out_ptr, num_heads, num_sampled, num_q_blocks, num_kv_blocks, kv_positions_stride,
    scale_log2, SAMPLES_Q: tl.constexpr, ROWS: tl.constexpr, SAMPLES_KV: tl.constexpr, PER_BLOCK: tl.constexpr,
    TILE_BLOCKS: tl.constexpr, BLOCKS: tl.constexpr, SUMS: tl.constexpr, IS_ERROR: tl.constexpr,
):  # fmt: skip
    chunks = (num_kv_blocks + BLOCKS - 1) // BLOCKS
    pid = tl.program_id(0).to(tl.int64)
    q_row = pid // chunks  # over batch, heads and query blocks
    batch = q_row // (num_heads * num_q_blocks)
    kv_positions_ptr = positions_ptr + num_q_blocks * SAMPLES_Q + batch * kv_positions_stride
    row_max_ptr = kept_ptr + num_sampled.to(tl.int64) * num_kv_blocks
    row_share_ptr = row_max_ptr + num_sampled
    num_rows = num_q_blocks * SAMPLES_Q
    tiles = (num_kv_blocks + TILE_BLOCKS - 1) // TILE_BLOCKS
    first_row = q_row // num_q_blocks * num_rows
    kept_max_ptr = row_share_ptr + num_sampled + first_row * tiles
    kept_ptr += first_row * num_kv_blocks
    block = (pid % chunks) * BLOCKS + tl.arange(0, BLOCKS)
    slot = tl.arange(0, ROWS)
    row = q_row % num_q_blocks * SAMPLES_Q + slot
    row_max = tl.load(row_max_ptr + first_row + row, mask=slot < SAMPLES_Q, other=0.0)  # [ROWS]
    share = tl.load(row_share_ptr + first_row + row, mask=slot < SAMPLES_Q, other=0.0)  # [ROWS]
    mask = (slot < SAMPLES_Q)[:, None] & (block < num_kv_blocks)[None, :]
    offset = block.to(tl.int64)[None, :] * num_rows + row[:, None]
    if SUMS:
        kept = tl.load(kept_ptr + offset, mask=mask, other=0.0)  # [ROWS, BLOCKS]
        offset = (block // TILE_BLOCKS).to(tl.int64)[None, :] * num_rows + row[:, None]
        kept_max = tl.load(kept_max_ptr + offset, mask=mask, other=0.0)
        weights = kept * tl.exp2(kept_max - row_max[:, None]) * share[:, None]
        q_position = tl.load(positions_ptr + row, mask=slot < SAMPLES_Q, other=-1)
        queries = tl.sum((q_position >= 0).to(tl.float32), axis=0)
        sample = block[:, None] * SAMPLES_KV + tl.arange(0, PER_BLOCK)[None, :]
        used = (tl.arange(0, PER_BLOCK) < SAMPLES_KV)[None, :] & (block < num_kv_blocks)[:, None]
        position = tl.load(kv_positions_ptr + sample, mask=used, other=-1)
        columns = tl.sum((position >= 0).to(tl.float32), axis=1)
        if IS_ERROR:
            score = tl.sqrt(tl.sum(weights * weights, axis=0) / tl.maximum(queries, 1.0)) / tl.maximum(columns, 1.0)
        else:
            score = tl.sum(weights, axis=0) / tl.maximum(columns * queries, 1.0)
    else:
        kept = tl.load(kept_ptr + offset, mask=mask, other=float("-inf"))  # [ROWS, BLOCKS]
        score = tl.max(tl.exp2(kept * scale_log2 - row_max[:, None]) * share[:, None], axis=0)
    tl.store(out_ptr + q_row * num_kv_blocks + block, score, mask=block < num_kv_blocks)


@dataclass(frozen=True)
class _Tile:
    rows: int
    columns: int
    num_warps: int
    num_stages: int

    def shared_memory(self, head_dim: int, element_size: int) -> int:
        """Bytes: the queries once, keys once a stage, and scores on their way to another layout."""
        return (self.rows + self.num_stages * self.columns) * head_dim * element_size + 4 * self.rows * self.columns


_TILES = (_Tile(128, 64, 4, 3), _Tile(64, 64, 4, 2), _Tile(64, 32, 4, 1), _Tile(32, 32, 4, 1), _Tile(16, 16, 4, 1))
# Products of float32 are unrolled into single instructions: many columns gain nothing and take long to compile.
_FLOAT32_COLUMNS = 32


def _choose_tile(per_block: int, dim_tile: int, element_size: int, limit: int) -> _Tile | None:
    """The best tile that fits, never less than a block's samples wide."""
    for tile in _TILES:
        if element_size == 4 and tile.columns > _FLOAT32_COLUMNS:
            continue
        wide = _Tile(tile.rows, max(tile.columns, per_block), tile.num_warps, tile.num_stages)
        if wide.shared_memory(dim_tile, element_size) <= limit:
            return wide
    return None


def draw_positions(
    q_len: int,
    kv_len: int,
    kv_lengths: Tensor | None,
    block_q: int,
    block_kv: int,
    samples_q: int,
    samples_kv: int,
    seed: int,
    device: torch.device,
) -> Tensor:
    """The positions that ``sampling.draw_positions`` returns, queries then keys in one int32 buffer.

    To be called in the context of the device.
    """
    num_q_blocks, num_kv_blocks = triton.cdiv(q_len, block_q), triton.cdiv(kv_len, block_kv)
    num_q, num_kv = num_q_blocks * samples_q, num_kv_blocks * samples_kv
    rows = 1 if kv_lengths is None else kv_lengths.shape[0]
    positions = torch.empty(num_q + rows * num_kv, dtype=torch.int32, device=device)
    _positions_kernel[(triton.cdiv(num_q, _DRAWS) + rows * triton.cdiv(num_kv, _DRAWS),)](
        positions, None if kv_lengths is None else kv_lengths.contiguous(),
        # So few bits that the launch takes every seed for a 32-bit integer and compiles once.
        q_len, kv_len, seed % (1 << SEED_BITS), num_q_blocks, num_kv_blocks,
        BLOCK_Q=block_q, SAMPLES_Q=samples_q, QUERIES=QUERY_STREAM,
        BLOCK_KV=block_kv, SAMPLES_KV=samples_kv, KEYS=KEY_STREAM,
        HAS_LENGTHS=kv_lengths is not None, DRAWS=_DRAWS,
    )  # fmt: skip
    return positions


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
    if query.dtype == torch.float64:
        raise TypeError("impl='triton' of block_importance takes float16, bfloat16 or float32, got torch.float64")
    batch, heads, q_len, head_dim = query.shape
    kv_heads, kv_len = key.shape[1:3]
    device = query.device
    num_q_blocks, num_kv_blocks = triton.cdiv(q_len, block_q), triton.cdiv(kv_len, block_kv)
    num_rows = num_q_blocks * samples_q
    num_sampled = batch * heads * num_rows
    per_block = triton.next_power_of_2(samples_kv)
    dim_tile = max(16, triton.next_power_of_2(head_dim))
    kv_positions_stride = 0 if kv_lengths is None else num_kv_blocks * samples_kv
    sums, is_error = reduction != "max", reduction == "error"
    scale_log2 = max(abs(scale) * _LOG2_E, _LEAST_SCALE)
    lengths = None if kv_lengths is None else kv_lengths.contiguous()
    with on_device(query):
        limit = shared_memory_limit(device)
        tile = _choose_tile(per_block, dim_tile, query.element_size(), limit)
        if tile is None:
            raise ValueError(
                f"samples_kv {samples_kv} with head_dim {head_dim} in {query.dtype} do not fit the {limit} bytes of "
                f"shared memory of {device}; take fewer samples"
            )
        tile_blocks = tile.columns // per_block
        floats = num_kv_blocks + 2 + (triton.cdiv(num_kv_blocks, tile_blocks) if sums else 0)
        kept = torch.empty(num_sampled * floats, dtype=torch.float32, device=device)
        out = torch.empty((batch, heads, num_q_blocks, num_kv_blocks), dtype=torch.float32, device=device)
        positions = draw_positions(q_len, kv_len, lengths, block_q, block_kv, samples_q, samples_kv, seed, device)
        _logits_kernel[(batch * heads * triton.cdiv(num_rows, tile.rows),)](
            query, key, lengths, positions, kept, query.stride(), key.stride(),
            heads, heads // kv_heads, kv_len, kv_len - q_len, num_sampled,
            num_q_blocks, num_kv_blocks, kv_positions_stride, scale_log2,
            HEAD_DIM=head_dim, DIM_TILE=dim_tile, SAMPLES_Q=samples_q, TILE_M=tile.rows, BLOCK_KV=block_kv,
            SAMPLES_KV=samples_kv, PER_BLOCK=per_block, BLOCKS=tile_blocks, HAS_LENGTHS=lengths is not None,
            NEGATE=scale < 0, IS_CAUSAL=is_causal, SUMS=sums, IS_ERROR=is_error,
            PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
        rows = triton.next_power_of_2(samples_q)
        blocks = max(1, min(128, 4096 // rows))
        _reduce_kernel[(batch * heads * num_q_blocks * triton.cdiv(num_kv_blocks, blocks),)](
            kept, positions, out, heads, num_sampled, num_q_blocks, num_kv_blocks, kv_positions_stride, scale_log2,
            SAMPLES_Q=samples_q, ROWS=rows, SAMPLES_KV=samples_kv, PER_BLOCK=per_block,
            TILE_BLOCKS=tile_blocks, BLOCKS=blocks, SUMS=sums, IS_ERROR=is_error,
        )  # fmt: skip
    return out
