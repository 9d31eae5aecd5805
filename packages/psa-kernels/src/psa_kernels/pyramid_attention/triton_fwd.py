"""Forward kernel for every GPU and every case: one program a query tile. Hopper has a faster one for much of it.

A block is *whole* for a query tile when all its tokens exist and none lies past a causal diagonal. The rows of whole
blocks are read tile by tile without a mask and with one bias a tile: tiles inside a block through tensor descriptors
(TMA) where the device and the strides allow, tiles of several small blocks by pointers. What is left of each level
comes last, under masks.
"""

from importlib import import_module
from types import ModuleType

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from psa_kernels.checks import MAX_HEAD_DIM
from psa_kernels.pyramid_attention.ops import empty_out, lse_dtype
from psa_kernels.pyramid_attention.tiles import choose_tile
from psa_kernels.pyramid_attention.triton_order import heavy_first
from psa_kernels.pyramid_pool.triton_fwd import pool_keys_and_values
from psa_kernels.triton_device import (
    can_copy_by_descriptor,
    has_tensor_memory_access,
    on_device,
    shared_memory_limit,
)

_LOG2_E = 1.4426950408889634


@triton.jit
def _weigh(row_max, row_sum, query, key, scale_log2, bias, PRECISION: tl.constexpr):
    """Weights [TILE_M, TILE_N] of a tile of keys that all queries see, relative to a new maximum.

    ``bias`` is log2 of the tokens that each of its rows stands for. Returns also the new statistics, and by how much
    what has been summed so far decays.
    """
    scores = tl.dot(query, tl.trans(key), input_precision=PRECISION)  # [TILE_M, TILE_N]
    new_max = tl.maximum(row_max, tl.max(scores, axis=1) * scale_log2 + bias)
    weights = tl.exp2(scores * scale_log2 - (new_max - bias)[:, None])
    decay = tl.exp2(row_max - new_max)
    return weights, decay, new_max, row_sum * decay + tl.sum(weights, axis=1)


@triton.jit
def _attend_masked_tile(acc, row_max, row_sum, query, key, value, scale_log2, bias, visible, PRECISION: tl.constexpr):
    """Fold a tile [TILE_N, DIM] with a bias a row [1, TILE_N] into the running statistics.

    Each query sees what ``visible`` says, and may have seen nothing yet.
    """
    logits = tl.dot(query, tl.trans(key), input_precision=PRECISION) * scale_log2 + bias
    logits = tl.where(visible, logits, float("-inf"))
    new_max = tl.maximum(row_max, tl.max(logits, axis=1))
    # A query that has seen nothing yet has a maximum of -inf, and -inf - -inf is not a number.
    safe_max = tl.where(new_max == float("-inf"), 0.0, new_max)
    weights = tl.exp2(logits - safe_max[:, None])
    decay = tl.exp2(row_max - safe_max)
    row_sum = row_sum * decay + tl.sum(weights, axis=1)
    acc = tl.dot(weights.to(value.dtype), value, acc * decay[:, None], input_precision=PRECISION)
    return acc, new_max, row_sum


@triton.jit
def _load_rows(ptr, strides, row, dim, mask):
    """Rows [TILE_N, DIM] of a sequence, zero outside ``mask``."""
    offset = row.to(tl.int64)[:, None] * strides[2] + dim.to(tl.int64)[None, :] * strides[3]
    return tl.load(ptr + offset, mask=mask, other=0.0)


@triton.jit
def _sequence(ptr, strides, batch, head):
    """Where the rows of a head start."""
    return ptr + batch.to(tl.int64) * strides[0] + head.to(tl.int64) * strides[1]


@triton.jit
def _attend_large_blocks(
    acc, row_max, row_sum, query, key_ptr, value_ptr, key_strides, value_strides, key_tma, value_tma,
    batch, kv_head, slots_ptr, first, end, block, level_start, scale_log2, dim,
    LEVEL: tl.constexpr, BLOCK_KV: tl.constexpr, HEAD_DIM: tl.constexpr, TILE_N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Whole blocks in slots ``first`` to ``end``, of a tile or more each; ``block`` is the first one.

    Pooled keys and values share a descriptor, with a dimension more.
    """
    tiles: tl.constexpr = (BLOCK_KV >> (LEVEL - 1)) // TILE_N
    for n in range(first * tiles, end * tiles):
        start = level_start + (block * tiles + n % tiles) * TILE_N
        # Read one iteration ahead, so that no tile waits for its number.
        block = tl.load(slots_ptr + tl.minimum((n + 1) // tiles, end - 1))
        if key_tma is None:
            row = start + tl.arange(0, TILE_N)
            mask = (dim < HEAD_DIM)[None, :]
            key = _load_rows(_sequence(key_ptr, key_strides, batch, kv_head), key_strides, row, dim, mask)
        elif LEVEL == 1:
            key = tl.reshape(key_tma.load([batch, kv_head, start, 0]), (TILE_N, dim.shape[0]))
        else:
            key = tl.reshape(key_tma.load([0, batch, kv_head, start, 0]), (TILE_N, dim.shape[0]))
        weights, decay, row_max, row_sum = _weigh(row_max, row_sum, query, key, scale_log2, LEVEL - 1.0, PRECISION)
        # Loaded only here, so that the scores do not wait for the values to arrive.
        if key_tma is None:
            value = _load_rows(_sequence(value_ptr, value_strides, batch, kv_head), value_strides, row, dim, mask)
        elif LEVEL == 1:
            value = tl.reshape(value_tma.load([batch, kv_head, start, 0]), (TILE_N, dim.shape[0]))
        else:
            value = tl.reshape(value_tma.load([1, batch, kv_head, start, 0]), (TILE_N, dim.shape[0]))
        acc = tl.dot(weights.to(value.dtype), value, acc * decay[:, None], input_precision=PRECISION)
    return acc, row_max, row_sum


@triton.jit
def _attend_small_blocks(
    acc, row_max, row_sum, query, key_ptr, value_ptr, key_strides, value_strides,
    slots_ptr, first, end, level_start, bias, log2_rows, scale_log2, dim,
    HEAD_DIM: tl.constexpr, TILE_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Rows ``first`` to ``end`` of whole blocks, counted through the plan's slots: several blocks share a tile."""
    for n in tl.range(first, end, TILE_N, disable_licm=True):
        position = n + tl.arange(0, TILE_N)
        block = tl.load(slots_ptr + (position >> log2_rows))  # [TILE_N]
        row = level_start + (block << log2_rows) + (position & ((1 << log2_rows) - 1))
        key = _load_rows(key_ptr, key_strides, row, dim, (dim < HEAD_DIM)[None, :])
        weights, decay, row_max, row_sum = _weigh(row_max, row_sum, query, key, scale_log2, bias, PRECISION)
        value = _load_rows(value_ptr, value_strides, row, dim, (dim < HEAD_DIM)[None, :])
        acc = tl.dot(weights.to(value.dtype), value, acc * decay[:, None], input_precision=PRECISION)
    return acc, row_max, row_sum


@triton.jit
def _attend_rest(
    acc, row_max, row_sum, query, q_position, key_ptr, value_ptr, key_strides, value_strides,
    slots_ptr, first, end, level_start, level, log2_rows, kv_end, scale_log2, dim,
    HEAD_DIM: tl.constexpr, TILE_N: tl.constexpr, IS_CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Rows ``first`` to ``end`` of any blocks, under masks.

    Narrow tiles and no pipeline: what this loop holds in registers, the loops above cannot.
    """
    REST_N: tl.constexpr = min(TILE_N, 16)
    pool = 1 << (level - 1)
    for n in tl.range(first, end, REST_N, num_stages=1, disable_licm=True):
        position = n + tl.arange(0, REST_N)
        block = tl.load(slots_ptr + (position >> log2_rows), mask=position < end, other=0)  # [REST_N]
        row = (block << log2_rows) + (position & ((1 << log2_rows) - 1))
        count = tl.minimum(tl.maximum(kv_end - row * pool, 0), pool)  # tokens that a row covers
        exists = (position < end) & (count > 0)
        mask = exists[:, None] & (dim < HEAD_DIM)[None, :]
        key = _load_rows(key_ptr, key_strides, level_start + row, dim, mask)
        value = _load_rows(value_ptr, value_strides, level_start + row, dim, mask)
        bias = tl.log2(tl.maximum(count, 1).to(tl.float32))
        visible = exists[None, :]
        if IS_CAUSAL:  # a pooled row lies wholly in the past, and so does its number
            visible = visible & (row[None, :] <= q_position[:, None])
        acc, row_max, row_sum = _attend_masked_tile(
            acc, row_max, row_sum, query, key, value, scale_log2, bias[None, :], visible, PRECISION
        )
    return acc, row_max, row_sum


@triton.jit
def _whole_slots(slots_ptr, first, last, whole_blocks, MANY: tl.constexpr):
    """The end of the slots from ``first`` whose blocks are whole: a level's slots are sorted by block.

    Without ``MANY`` only the sequence's last block may be a part of one.
    """
    end = last
    if MANY:
        while (end > first) & (tl.load(slots_ptr + tl.maximum(end - 1, 0)) >= whole_blocks):
            end -= 1
    else:
        highest = tl.load(slots_ptr + tl.maximum(last - 1, 0))
        end -= ((last > first) & (highest >= whole_blocks)).to(tl.int32)
    return end


@triton.jit
def _rest_of_level(
    slots_ptr, ends_ptr, whole_blocks, level, large_levels, LOG2_BLOCK_KV: tl.constexpr, TILE_N: tl.constexpr,
    MANY: tl.constexpr,
):  # fmt: skip
    """The rows of a level, counted through its slots, that no unmasked loop reads."""
    log2_rows = LOG2_BLOCK_KV + 1 - level
    first = tl.load(ends_ptr + level - 1)
    last = tl.load(ends_ptr + level)
    start = _whole_slots(slots_ptr, first, last, whole_blocks, MANY) << log2_rows
    if level > large_levels:
        start -= (start - (first << log2_rows)) % TILE_N
    return start, last << log2_rows


@triton.jit
def _level_rows(kv_len, level):
    """Rows of a pooled level, by which the next level's start further on."""
    return (kv_len + (1 << (level - 1)) - 1) >> (level - 1)


@triton.jit
def _attend_rests(
    acc, row_max, row_sum, query, q_position, rest, key_ptr, value_ptr, pooled_key_ptr, pooled_value_ptr,
    key_strides, value_strides, pooled_strides, slots_ptr, ends_ptr, whole_blocks, kv_len, kv_end, scale_log2, dim,
    LOG2_BLOCK_KV: tl.constexpr, NUM_LEVELS: tl.constexpr, LARGE_LEVELS: tl.constexpr, HEAD_DIM: tl.constexpr,
    TILE_N: tl.constexpr, MANY: tl.constexpr, IS_CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What no unmasked loop reads of the levels whose bits are set in ``rest``."""
    if (rest >> 1) & 1:
        start, end = _rest_of_level(slots_ptr, ends_ptr, whole_blocks, 1, LARGE_LEVELS, LOG2_BLOCK_KV, TILE_N, MANY)
        acc, row_max, row_sum = _attend_rest(
            acc, row_max, row_sum, query, q_position, key_ptr, value_ptr, key_strides, value_strides,
            slots_ptr, start, end, 0, 1, LOG2_BLOCK_KV, kv_end, scale_log2, dim,
            HEAD_DIM, TILE_N, IS_CAUSAL, PRECISION,
        )  # fmt: skip
    level_start = 0
    for level in range(2, NUM_LEVELS + 1):
        if (rest >> level) & 1:
            first, last = _rest_of_level(
                slots_ptr, ends_ptr, whole_blocks, level, LARGE_LEVELS, LOG2_BLOCK_KV, TILE_N, MANY
            )
            acc, row_max, row_sum = _attend_rest(
                acc, row_max, row_sum, query, q_position, pooled_key_ptr, pooled_value_ptr, pooled_strides,
                pooled_strides, slots_ptr, first, last, level_start, level, LOG2_BLOCK_KV + 1 - level, kv_end,
                scale_log2, dim, HEAD_DIM, TILE_N, False, PRECISION,
            )  # fmt: skip
        level_start += _level_rows(kv_len, level)
    return acc, row_max, row_sum


@triton.jit
def _place(order_ptr, pid, num_heads, num_q_blocks, TILES: tl.constexpr):
    """Batch, head, query block and tile of program ``pid``, and the plan's row for it."""
    tile = pid % TILES
    plan_row = tl.load(order_ptr + pid // TILES)
    q_block = plan_row % num_q_blocks
    head = plan_row // num_q_blocks % num_heads
    batch = plan_row // (num_q_blocks * num_heads)
    return batch, head, q_block, tile, plan_row.to(tl.int64)


@triton.jit
def _same_program(plan_offsets_ptr):
    """The program's number once more, as a value that the compiler does not know to be the same.

    The loops use every register there is. What parts ahead of them and after them have in common, the compiler would
    keep in some; from here they work it out anew. Plan offsets start with a zero, and a volatile load is not merged.
    """
    return tl.program_id(0) + tl.multiple_of(tl.load(plan_offsets_ptr, volatile=True), 16)


@triton.jit
def _query_rows(q_block, tile, q_len, dim, BLOCK_Q: tl.constexpr, HEAD_DIM: tl.constexpr, TILE_M: tl.constexpr):
    """Tokens int64 [TILE_M] of a query tile, which of them exist, and the mask [TILE_M, DIM] of their elements."""
    in_block = tile * TILE_M + tl.arange(0, TILE_M)
    token = q_block.to(tl.int64) * BLOCK_Q + in_block
    exists = (in_block < BLOCK_Q) & (token < q_len)
    return token, exists, exists[:, None] & (dim < HEAD_DIM)[None, :]


@triton.jit(
    do_not_specialize=[
        "num_heads",
        "group",
        "q_len",
        "kv_len",
        "num_q_blocks",
        "num_kv_blocks",
    ]
)
def _forward_kernel(
    query_ptr, key_ptr, value_ptr, pooled_ptr, key_tma, value_tma, pooled_tma,
    indices_ptr, plan_offsets_ptr, order_ptr, kv_lengths_ptr, out_ptr, lse_ptr,
    query_strides, key_strides, value_strides, pooled_strides, out_strides,
    num_heads, group, q_len, kv_len, num_q_blocks, num_kv_blocks, scale_log2,
    BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr, LOG2_BLOCK_KV: tl.constexpr, NUM_LEVELS: tl.constexpr,
    LARGE_LEVELS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM_TILE: tl.constexpr, TILE_M: tl.constexpr,
    TILE_N: tl.constexpr, HAS_LENGTHS: tl.constexpr, IS_CAUSAL: tl.constexpr, NEGATE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    TILES: tl.constexpr = (BLOCK_Q + TILE_M - 1) // TILE_M
    MANY: tl.constexpr = HAS_LENGTHS or IS_CAUSAL
    pid = tl.program_id(0)
    batch, head, q_block, tile, plan_row = _place(order_ptr, pid, num_heads, num_q_blocks, TILES)
    slots_ptr = indices_ptr + plan_row * num_kv_blocks
    ends_ptr = plan_offsets_ptr + plan_row * (NUM_LEVELS + 1)
    dim = tl.arange(0, DIM_TILE)
    token, in_q, q_mask = _query_rows(q_block, tile, q_len, dim, BLOCK_Q, HEAD_DIM, TILE_M)
    offset = token[:, None] * query_strides[2] + dim.to(tl.int64)[None, :] * query_strides[3]
    query = tl.load(_sequence(query_ptr, query_strides, batch, head) + offset, mask=q_mask, other=0.0)  # [TILE_M, DIM]
    if NEGATE:  # scale_log2 is never negative, so that the largest score has the largest logit
        query = -query

    kv_end = kv_len
    if HAS_LENGTHS:
        kv_end = tl.minimum(kv_len, tl.load(kv_lengths_ptr + batch)).to(tl.int32)
    whole_blocks = kv_end // BLOCK_KV
    if IS_CAUSAL:
        whole_blocks = tl.minimum(whole_blocks, (q_block * BLOCK_Q + tile * TILE_M + kv_len - q_len + 1) // BLOCK_KV)
    kv_head = head // group
    pooled_key_ptr, pooled_value_ptr = pooled_ptr, pooled_ptr + pooled_strides[0]
    pooled_strides = (pooled_strides[1], pooled_strides[2], HEAD_DIM, 1)

    row_max = tl.full([TILE_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([TILE_M], tl.float32)
    acc = tl.zeros([TILE_M, DIM_TILE], tl.float32)
    rest = 0  # bit h is set when blocks of level h are left for the masked loop
    level_start = 0  # the level's first pooled row

    # Levels whose blocks have a tile of rows or more. What a level needs to start is read before the level ahead of it
    # runs: a chain of loads takes as long as a tile.
    first, last = 0, tl.load(ends_ptr + 1)
    block = tl.load(slots_ptr)
    end = _whole_slots(slots_ptr, first, last, whole_blocks, MANY)
    for level in tl.static_range(1, LARGE_LEVELS + 1):
        next_last, next_block, next_end = last, block, end
        if level < LARGE_LEVELS:
            next_last = tl.load(ends_ptr + level + 1)
            next_block = tl.load(slots_ptr + tl.minimum(last, num_kv_blocks - 1))
            next_end = _whole_slots(slots_ptr, last, next_last, whole_blocks, MANY)
        rest |= (end < last).to(tl.int32) << level
        if level == 1:
            acc, row_max, row_sum = _attend_large_blocks(
                acc, row_max, row_sum, query, key_ptr, value_ptr, key_strides, value_strides, key_tma, value_tma,
                batch, kv_head, slots_ptr, first, end, block, 0, scale_log2, dim,
                level, BLOCK_KV, HEAD_DIM, TILE_N, PRECISION,
            )  # fmt: skip
        else:
            acc, row_max, row_sum = _attend_large_blocks(
                acc, row_max, row_sum, query, pooled_key_ptr, pooled_value_ptr, pooled_strides, pooled_strides,
                pooled_tma, pooled_tma, batch, kv_head, slots_ptr, first, end, block, level_start, scale_log2, dim,
                level, BLOCK_KV, HEAD_DIM, TILE_N, PRECISION,
            )  # fmt: skip
            level_start += _level_rows(kv_len, level)
        first, last, block, end = last, next_last, next_block, next_end

    # Levels of smaller blocks.
    if NUM_LEVELS > LARGE_LEVELS:
        pid = _same_program(plan_offsets_ptr)
        batch, head, q_block, tile, plan_row = _place(order_ptr, pid, num_heads, num_q_blocks, TILES)
        slots_ptr = indices_ptr + plan_row * num_kv_blocks
        ends_ptr = plan_offsets_ptr + plan_row * (NUM_LEVELS + 1)
        pooled_key = _sequence(pooled_key_ptr, pooled_strides, batch, head // group)
        pooled_value = _sequence(pooled_value_ptr, pooled_strides, batch, head // group)
        if LARGE_LEVELS == 0:
            last = tl.load(ends_ptr + 1)
            end = _whole_slots(slots_ptr, 0, last, whole_blocks, MANY) * BLOCK_KV // TILE_N * TILE_N
            acc, row_max, row_sum = _attend_small_blocks(
                acc, row_max, row_sum, query, _sequence(key_ptr, key_strides, batch, head // group),
                _sequence(value_ptr, value_strides, batch, head // group), key_strides, value_strides,
                slots_ptr, 0, end, 0, 0.0, LOG2_BLOCK_KV, scale_log2, dim,
                HEAD_DIM, TILE_N, PRECISION,
            )  # fmt: skip
            rest |= (end < last * BLOCK_KV).to(tl.int32) << 1
        for small in range(max(LARGE_LEVELS, 1) + 1, NUM_LEVELS + 1):
            log2_rows = LOG2_BLOCK_KV + 1 - small
            first = tl.load(ends_ptr + small - 1)
            last = tl.load(ends_ptr + small)
            start = first << log2_rows
            end = _whole_slots(slots_ptr, first, last, whole_blocks, MANY) << log2_rows
            end -= (end - start) % TILE_N
            acc, row_max, row_sum = _attend_small_blocks(
                acc, row_max, row_sum, query, pooled_key, pooled_value, pooled_strides, pooled_strides,
                slots_ptr, start, end, level_start, small - 1.0, log2_rows, scale_log2, dim,
                HEAD_DIM, TILE_N, PRECISION,
            )  # fmt: skip
            rest |= (end < last << log2_rows).to(tl.int32) << small
            level_start += _level_rows(kv_len, small)

    # Blocks that are not whole, and small ones that did not fill a tile.
    if rest > 0:
        pid = _same_program(plan_offsets_ptr)
        batch, head, q_block, tile, plan_row = _place(order_ptr, pid, num_heads, num_q_blocks, TILES)
        q_position = q_block * BLOCK_Q + tile * TILE_M + tl.arange(0, TILE_M) + kv_len - q_len
        acc, row_max, row_sum = _attend_rests(
            acc, row_max, row_sum, query, q_position, rest,
            _sequence(key_ptr, key_strides, batch, head // group),
            _sequence(value_ptr, value_strides, batch, head // group),
            _sequence(pooled_key_ptr, pooled_strides, batch, head // group),
            _sequence(pooled_value_ptr, pooled_strides, batch, head // group),
            key_strides, value_strides, pooled_strides, indices_ptr + plan_row * num_kv_blocks,
            plan_offsets_ptr + plan_row * (NUM_LEVELS + 1), whole_blocks, kv_len, kv_end, scale_log2, dim,
            LOG2_BLOCK_KV, NUM_LEVELS, LARGE_LEVELS, HEAD_DIM, TILE_N, MANY, IS_CAUSAL, PRECISION,
        )  # fmt: skip

    has_read = row_sum != 0  # true for NaN too: what is not a number shows
    out = acc / tl.where(has_read, row_sum, 1.0)[:, None]
    LN_2: tl.constexpr = 0.6931471805599453
    lse = tl.where(has_read, (row_max + tl.log2(tl.where(has_read, row_sum, 1.0))) * LN_2, float("-inf"))
    pid = _same_program(plan_offsets_ptr)
    batch, head, q_block, tile, plan_row = _place(order_ptr, pid, num_heads, num_q_blocks, TILES)
    token, in_q, q_mask = _query_rows(q_block, tile, q_len, dim, BLOCK_Q, HEAD_DIM, TILE_M)
    offset = token[:, None] * out_strides[2] + dim.to(tl.int64)[None, :] * out_strides[3]
    tl.store(_sequence(out_ptr, out_strides, batch, head) + offset, out.to(query.dtype), mask=q_mask)
    tl.store(lse_ptr + (batch.to(tl.int64) * num_heads + head) * q_len + token, lse, mask=in_q)


def _descriptor(x: Tensor, rows: int, dim_tile: int) -> TensorDescriptor | None:
    """Tiles of rows through TMA, or None where the strides or the address do not allow it."""
    if not can_copy_by_descriptor(x):
        return None
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [1] * (x.dim() - 2) + [rows, dim_tile])


def _descriptors(
    key: Tensor, value: Tensor, pooled: Tensor, tile_n: int, dim_tile: int
) -> list[TensorDescriptor | None]:
    """Those of keys, values and pooled rows."""
    if not has_tensor_memory_access(key.device):
        return [None] * 3
    sequences = [_descriptor(x, tile_n, dim_tile) for x in (key, value)]
    if None in sequences:  # the loop reads both by descriptor or none
        sequences = [None, None]
    return [*sequences, _descriptor(pooled, tile_n, dim_tile)]


def _find_hopper() -> ModuleType | None:
    """The kernel for Hopper, where this Triton has the Gluon that it is written in."""
    try:
        return import_module("psa_kernels.pyramid_attention.hopper_fwd")
    except ImportError:
        return None


_hopper = _find_hopper()


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
    batch, heads, q_len, head_dim = query.shape
    if query.dtype == torch.float64 or head_dim > MAX_HEAD_DIM:
        raise ValueError(
            f"impl='triton' takes float16, bfloat16 or float32 with head_dim up to {MAX_HEAD_DIM}, "
            f"got {query.dtype} with head_dim {head_dim}"
        )
    indices, offsets = indices.contiguous(), offsets.contiguous()
    kv_lengths = None if kv_lengths is None else kv_lengths.contiguous()
    num_q_blocks, num_kv_blocks = indices.shape[2:]
    num_levels = offsets.shape[3] - 1
    out = empty_out(query)
    lse = torch.empty(query.shape[:3], dtype=lse_dtype(query), device=query.device)
    dim_tile = max(16, triton.next_power_of_2(head_dim))
    with on_device(query):
        tile = choose_tile(
            block_q=block_q,
            head_dim=dim_tile,
            dtype=query.dtype,
            shared_memory=shared_memory_limit(query.device),
        )
        pooled = pool_keys_and_values(key, value, kv_lengths, num_levels)
        order = heavy_first(offsets, num_kv_blocks, block_kv)
        if _hopper and _hopper.takes(query, key, value, kv_lengths, block_q, block_kv, num_levels, is_causal, scale):
            _hopper.launch(query, key, value, pooled, order, indices, offsets, out, lse, block_kv, scale * _LOG2_E)
            return out, lse
        large_levels = min(num_levels, (block_kv // tile.tile_n).bit_length())
        descriptors = [None] * 3 if large_levels == 0 else _descriptors(key, value, pooled, tile.tile_n, dim_tile)
        _forward_kernel[(batch * heads * num_q_blocks * triton.cdiv(block_q, tile.tile_m),)](
            query, key, value, pooled, *descriptors, indices, offsets, order, kv_lengths, out, lse,
            query.stride(), key.stride(), value.stride(), pooled.stride(), out.stride(),
            heads, heads // key.shape[1], q_len, key.shape[2], num_q_blocks, num_kv_blocks, abs(scale) * _LOG2_E,
            BLOCK_Q=block_q, BLOCK_KV=block_kv, LOG2_BLOCK_KV=block_kv.bit_length() - 1, NUM_LEVELS=num_levels,
            LARGE_LEVELS=large_levels, HEAD_DIM=head_dim, DIM_TILE=dim_tile, TILE_M=tile.tile_m, TILE_N=tile.tile_n,
            HAS_LENGTHS=kv_lengths is not None, IS_CAUSAL=is_causal, NEGATE=scale < 0,
            PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
            num_warps=tile.num_warps, num_stages=tile.num_stages, maxnreg=tile.max_registers,
        )  # fmt: skip
    return out, lse
