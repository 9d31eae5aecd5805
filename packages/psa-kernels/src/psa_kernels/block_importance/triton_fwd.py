"""One pass over the sampled logits, then one over what it leaves.

The first kernel keeps each sampled query's softmax normaliser and, for every KV block, the query's largest logit in it:
a float a query and block. The second turns these into weights, now that the normaliser is known, and reduces over the
queries of a block. For the mean the first keeps the block's summed weights instead, beside the maximum that they are
relative to.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from psa_kernels.block_importance.ops import importance_dtype
from psa_kernels.triton_device import on_device, shared_memory_limit

_LOG2_E = 1.4426950408889634


@triton.jit
def _columns(first, COLUMNS: tl.constexpr, PER_BLOCK: tl.constexpr, SAMPLES_KV: tl.constexpr):
    """Sample number of each column of a tile and whether it is one: each block has ``PER_BLOCK`` columns, a power
    of two, of which ``SAMPLES_KV`` are used."""
    column = tl.arange(0, COLUMNS)
    return (first + column // PER_BLOCK) * SAMPLES_KV + column % PER_BLOCK, column % PER_BLOCK < SAMPLES_KV


@triton.jit(do_not_specialize=["num_heads", "group", "shift", "num_q_blocks", "num_kv_blocks", "kv_positions_stride"])
def _logits_kernel(
    query_ptr, key_ptr, q_positions_ptr, kv_positions_ptr, kept_ptr, kept_max_ptr, normaliser_ptr,
    query_strides, key_strides, num_heads, group, shift, num_q_blocks, num_kv_blocks, kv_positions_stride, scale_log2,
    HEAD_DIM: tl.constexpr, DIM_TILE: tl.constexpr, SAMPLES_Q: tl.constexpr, TILE_M: tl.constexpr,
    SAMPLES_KV: tl.constexpr, PER_BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
    IS_CAUSAL: tl.constexpr, IS_MEAN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    num_rows = num_q_blocks * SAMPLES_Q
    num_tiles = (num_rows + TILE_M - 1) // TILE_M
    pid = tl.program_id(0).to(tl.int64)
    head = pid // num_tiles % num_heads
    batch = pid // (num_tiles * num_heads)
    query_ptr += batch * query_strides[0] + head * query_strides[1]
    key_ptr += batch * key_strides[0] + head // group * key_strides[1]
    kv_positions_ptr += batch * kv_positions_stride
    num_columns = num_kv_blocks * SAMPLES_KV

    slot = (pid % num_tiles) * TILE_M + tl.arange(0, TILE_M)
    dim = tl.arange(0, DIM_TILE)
    row = tl.load(q_positions_ptr + slot, mask=slot < num_rows, other=-1)  # [TILE_M]
    offset = row.to(tl.int64)[:, None] * query_strides[2] + dim.to(tl.int64)[None, :] * query_strides[3]
    query = tl.load(query_ptr + offset, mask=(row >= 0)[:, None] & (dim < HEAD_DIM)[None, :], other=0.0)

    out_row = (batch * num_heads + head) * num_rows + slot
    row_max = tl.full([TILE_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([TILE_M], tl.float32)
    for first in range(0, num_kv_blocks, BLOCKS):
        sample, used = _columns(first, BLOCKS * PER_BLOCK, PER_BLOCK, SAMPLES_KV)
        position = tl.load(kv_positions_ptr + sample, mask=used & (sample < num_columns), other=-1)  # [COLUMNS]
        key_offset = position.to(tl.int64)[:, None] * key_strides[2] + dim.to(tl.int64)[None, :] * key_strides[3]
        key_mask = (position >= 0)[:, None] & (dim < HEAD_DIM)[None, :]
        key = tl.load(key_ptr + key_offset, mask=key_mask, other=0.0)  # [COLUMNS, DIM]
        logits = tl.dot(query, tl.trans(key), input_precision=PRECISION) * scale_log2
        logits += tl.where(position >= 0, 0.0, float("-inf"))[None, :]
        if IS_CAUSAL:
            logits = tl.where(position[None, :] <= row[:, None] + shift, logits, float("-inf"))

        by_block = tl.reshape(logits, (TILE_M, BLOCKS, PER_BLOCK))
        block_max = tl.max(by_block, axis=2)  # [TILE_M, BLOCKS]
        new_max = tl.maximum(row_max, tl.max(block_max, axis=1))
        safe_max = tl.where(new_max == float("-inf"), 0.0, new_max)
        weights = tl.exp2(logits - safe_max[:, None])
        row_sum = row_sum * tl.exp2(row_max - safe_max) + tl.sum(weights, axis=1)
        row_max = new_max
        if IS_MEAN:
            kept = tl.sum(tl.reshape(weights, (TILE_M, BLOCKS, PER_BLOCK)), axis=2)
            kept_offset = out_row * ((num_kv_blocks + BLOCKS - 1) // BLOCKS) + first // BLOCKS
            tl.store(kept_max_ptr + kept_offset, safe_max, mask=slot < num_rows)
        else:
            kept = block_max
        block = first + tl.arange(0, BLOCKS)
        out_offset = out_row[:, None] * num_kv_blocks + block[None, :]
        out_mask = (slot < num_rows)[:, None] & (block < num_kv_blocks)[None, :]
        tl.store(kept_ptr + out_offset, kept, mask=out_mask)

    # A query that sees nothing, or does not exist, gets a normaliser that turns its logits into 0.
    normaliser = tl.where(row_sum > 0, row_max + tl.log2(tl.maximum(row_sum, 1e-30)), float("inf"))
    normaliser = tl.where(row_sum == row_sum, normaliser, row_sum)  # what is not a number shows
    tl.store(normaliser_ptr + out_row, tl.where(row >= 0, normaliser, float("inf")), mask=slot < num_rows)


@triton.jit(do_not_specialize=["num_heads", "num_q_blocks", "num_kv_blocks", "kv_positions_stride"])
def _reduce_kernel(
    kept_ptr, kept_max_ptr, normaliser_ptr, q_positions_ptr, kv_positions_ptr, out_ptr,
    num_heads, num_q_blocks, num_kv_blocks, kv_positions_stride,
    SAMPLES_Q: tl.constexpr, ROWS: tl.constexpr, SAMPLES_KV: tl.constexpr, PER_BLOCK: tl.constexpr,
    TILE_BLOCKS: tl.constexpr, BLOCKS: tl.constexpr, IS_MEAN: tl.constexpr,
):  # fmt: skip
    chunks = (num_kv_blocks + BLOCKS - 1) // BLOCKS
    pid = tl.program_id(0).to(tl.int64)
    q_row = pid // chunks  # over batch, heads and query blocks
    batch = q_row // (num_heads * num_q_blocks)
    block = (pid % chunks) * BLOCKS + tl.arange(0, BLOCKS)
    slot = tl.arange(0, ROWS)
    row = q_row * SAMPLES_Q + slot
    normaliser = tl.load(normaliser_ptr + row, mask=slot < SAMPLES_Q, other=float("inf"))  # [ROWS]
    mask = (slot < SAMPLES_Q)[:, None] & (block < num_kv_blocks)[None, :]
    offset = row[:, None] * num_kv_blocks + block[None, :]
    if IS_MEAN:
        kept = tl.load(kept_ptr + offset, mask=mask, other=0.0)  # [ROWS, BLOCKS]
        tiles = (num_kv_blocks + TILE_BLOCKS - 1) // TILE_BLOCKS
        offset = row[:, None] * tiles + (block // TILE_BLOCKS)[None, :]
        kept_max = tl.load(kept_max_ptr + offset, mask=mask, other=0.0)
        weights = kept * tl.exp2(kept_max - normaliser[:, None])
        q_position = tl.load(q_positions_ptr + q_row % num_q_blocks * SAMPLES_Q + slot, mask=slot < SAMPLES_Q, other=-1)
        num_rows = tl.sum((q_position >= 0).to(tl.float32), axis=0)
        sample = block[:, None] * SAMPLES_KV + tl.arange(0, PER_BLOCK)[None, :]
        used = (tl.arange(0, PER_BLOCK) < SAMPLES_KV)[None, :] & (block < num_kv_blocks)[:, None]
        position = tl.load(kv_positions_ptr + batch * kv_positions_stride + sample, mask=used, other=-1)
        columns = tl.sum((position >= 0).to(tl.float32), axis=1)
        score = tl.sum(weights, axis=0) / tl.maximum(columns * num_rows, 1.0)
    else:
        kept = tl.load(kept_ptr + offset, mask=mask, other=float("-inf"))  # [ROWS, BLOCKS]
        score = tl.max(tl.exp2(kept - normaliser[:, None]), axis=0)
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


def _choose_tile(per_block: int, dim_tile: int, element_size: int, limit: int) -> _Tile | None:
    """The best tile that fits, never less than a block's samples wide."""
    for tile in _TILES:
        wide = _Tile(tile.rows, max(tile.columns, per_block), tile.num_warps, tile.num_stages)
        if wide.shared_memory(dim_tile, element_size) <= limit:
            return wide
    return None


def forward(
    query: Tensor,
    key: Tensor,
    q_positions: Tensor,
    kv_positions: Tensor,
    reduction: str,
    is_causal: bool,
    scale: float,
) -> Tensor:
    if query.dtype == torch.float64:
        raise TypeError("impl='triton' of block_importance takes float16, bfloat16 or float32, got torch.float64")
    batch, heads, q_len, head_dim = query.shape
    _, num_q_blocks, samples_q = q_positions.shape
    _, num_kv_blocks, samples_kv = kv_positions.shape
    num_rows = num_q_blocks * samples_q
    out = torch.empty((batch, heads, num_q_blocks, num_kv_blocks), dtype=importance_dtype(query), device=query.device)
    kept = torch.empty((batch, heads, num_rows, num_kv_blocks), dtype=torch.float32, device=query.device)
    normaliser = torch.empty((batch, heads, num_rows), dtype=torch.float32, device=query.device)
    per_block = triton.next_power_of_2(samples_kv)
    dim_tile = max(16, triton.next_power_of_2(head_dim))
    kv_positions_stride = kv_positions.stride(0) if kv_positions.shape[0] > 1 else 0
    is_mean = reduction == "mean"
    with on_device(query):
        limit = shared_memory_limit(query.device)
        tile = _choose_tile(per_block, dim_tile, query.element_size(), limit)
        if tile is None:
            raise ValueError(
                f"samples_kv {samples_kv} with head_dim {head_dim} in {query.dtype} do not fit the {limit} bytes of "
                f"shared memory of {query.device}; take fewer samples"
            )
        tile_blocks = tile.columns // per_block
        tiles = triton.cdiv(num_kv_blocks, tile_blocks)
        kept_max = normaliser.new_empty((batch, heads, num_rows, tiles)) if is_mean else None
        _logits_kernel[(batch * heads * triton.cdiv(num_rows, tile.rows),)](
            query, key, q_positions, kv_positions, kept, kept_max, normaliser,
            query.stride(), key.stride(), heads, heads // key.shape[1], key.shape[2] - q_len,
            num_q_blocks, num_kv_blocks, kv_positions_stride, scale * _LOG2_E,
            HEAD_DIM=head_dim, DIM_TILE=dim_tile, SAMPLES_Q=samples_q, TILE_M=tile.rows, SAMPLES_KV=samples_kv,
            PER_BLOCK=per_block, BLOCKS=tile_blocks, IS_CAUSAL=is_causal, IS_MEAN=is_mean,
            PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
        rows = triton.next_power_of_2(samples_q)
        blocks = max(1, min(128, 4096 // rows))
        _reduce_kernel[(batch * heads * num_q_blocks * triton.cdiv(num_kv_blocks, blocks),)](
            kept, kept_max, normaliser, q_positions, kv_positions, out,
            heads, num_q_blocks, num_kv_blocks, kv_positions_stride,
            SAMPLES_Q=samples_q, ROWS=rows, SAMPLES_KV=samples_kv, PER_BLOCK=per_block,
            TILE_BLOCKS=tile_blocks, BLOCKS=blocks, IS_MEAN=is_mean,
        )  # fmt: skip
    return out
