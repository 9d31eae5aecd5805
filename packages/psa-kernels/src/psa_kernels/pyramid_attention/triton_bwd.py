"""Backward kernels: gradients of the queries by the plan, of keys and values by the plan turned round.

Both recompute the weights of a tile from the log-sum-exp, and nothing is added up but in the registers of one program.
The rows of a level lie side by side, so a program for keys and values takes a tile of them: part of a block, or
several blocks, of which each query block then reads some. Levels 2 and up come first and leave what each token of a row
gets in the row's own place, in the dtype of the inputs; the program of a tile of tokens adds that of its rows to its
own.

The log-sum-exp was rounded at its own size, which puts all weights of a query off by one factor, in float32 by more
than anything else does. The queries' kernel meets all that a query reads, so there it adds up the weights as well, and
both kernels divide by the sum, which is 1 but for rounding.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from psa_kernels.level_plan.triton_fwd import forward as sort_levels
from psa_kernels.pyramid_attention.tiles import BackwardTile, choose_backward_tiles
from psa_kernels.pyramid_attention.triton_fwd import (
    _descriptor,
    _level_rows,
    _load_rows,
    _place,
    _query_rows,
    _sequence,
)
from psa_kernels.pyramid_attention.triton_order import heavy_first
from psa_kernels.pyramid_attention.triton_readers import count_tiles, level_of_tile, readers_of_tiles, turn
from psa_kernels.pyramid_pool.triton_fwd import pool_keys_and_values
from psa_kernels.triton_device import has_tensor_memory_access, on_device, shared_memory_limit
from psa_kernels.triton_math import dot_rows

_LOG2_E = 1.4426950408889634
_DELTA_ROWS = 32


@triton.jit(do_not_specialize=["num_heads", "q_len"])
def _delta_kernel(
    out_ptr, grad_out_ptr, lse_ptr, grad_lse_ptr, log2_sum_ptr, delta_ptr, out_strides, grad_out_strides, num_heads,
    q_len, HEAD_DIM: tl.constexpr, DIM_TILE: tl.constexpr, HAS_GRAD_LSE: tl.constexpr, ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """What each query subtracts: from its logits in base 2, and from the gradients of its weights."""
    pid = tl.program_id(0)
    tiles = (q_len + ROWS - 1) // ROWS
    head = pid // tiles % num_heads
    batch = pid // tiles // num_heads
    dim = tl.arange(0, DIM_TILE)
    token = (pid % tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    mask = (token < q_len)[:, None] & (dim < HEAD_DIM)[None, :]
    out = _load_rows(_sequence(out_ptr, out_strides, batch, head), out_strides, token, dim, mask)  # [ROWS, DIM]
    grad = _load_rows(_sequence(grad_out_ptr, grad_out_strides, batch, head), grad_out_strides, token, dim, mask)
    if PRECISION == "ieee":
        # Added up as the gradients of weights are, so that of a query that reads little but one row they cancel.
        diagonal = tl.arange(0, ROWS)[:, None] == tl.arange(0, ROWS)[None, :]
        delta = tl.sum(tl.where(diagonal, dot_rows(grad, out, PRECISION), 0.0), axis=1)
    else:
        delta = tl.sum(out.to(tl.float32) * grad.to(tl.float32), axis=1)
    row = (batch.to(tl.int64) * num_heads + head) * q_len + token
    lse = tl.load(lse_ptr + row, mask=token < q_len, other=float("-inf"))  # [ROWS]
    has_read = lse != float("-inf")
    if HAS_GRAD_LSE:
        delta -= tl.load(grad_lse_ptr + row, mask=token < q_len, other=0.0)
    LOG2_E: tl.constexpr = 1.4426950408889634
    # A query with nothing to read has weights of exp2(-inf), and what comes in for its lse means nothing.
    tl.store(log2_sum_ptr + row, tl.where(has_read, lse * LOG2_E, float("inf")), mask=token < q_len)
    tl.store(delta_ptr + row, tl.where(has_read, delta, 0.0), mask=token < q_len)


@triton.jit
def _row_counts(row, level, kv_end):
    """Tokens that rows of a level stand for."""
    pool = 1 << (level - 1)
    return tl.minimum(tl.maximum(kv_end - row * pool, 0), pool)


@triton.jit
def _add_to_query(
    acc, total, query, grad_out, log2_sum, delta, q_position, key_ptr, value_ptr, key_strides, value_strides,
    row, exists, level_start, level, kv_end, scale_log2, dim,
    HEAD_DIM: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add what a tile of rows [TILE_N] gives to the gradient of the queries [TILE_M, DIM], before the scale.

    In float32 its weights are added to their sum ``total`` [TILE_M] too.
    """
    count = _row_counts(row, level, kv_end)
    exists = exists & (count > 0)
    mask = exists[:, None] & (dim < HEAD_DIM)[None, :]
    key = _load_rows(key_ptr, key_strides, level_start + row, dim, mask)  # [TILE_N, DIM]
    value = _load_rows(value_ptr, value_strides, level_start + row, dim, mask)
    bias = tl.where(exists, tl.log2(tl.maximum(count, 1).to(tl.float32)), float("-inf"))
    scores = dot_rows(query, key, PRECISION)
    if PRECISION == "ieee":
        # In the order in which the rows' kernel does it, so that the sum is of its weights.
        weights = tl.exp2(scores * scale_log2 - log2_sum[:, None] + bias[None, :])
    else:
        weights = tl.exp2(scores * scale_log2 + bias[None, :] - log2_sum[:, None])
    if MASKED:
        weights = tl.where(row[None, :] <= q_position[:, None], weights, 0.0)
    if PRECISION == "ieee":
        total += tl.sum(weights, axis=1)
    grad_weights = dot_rows(grad_out, value, PRECISION)
    grad_logits = weights * (grad_weights - delta[:, None])
    return tl.dot(grad_logits.to(key.dtype), key, acc, input_precision=PRECISION), total


@triton.jit
def _through_level(
    acc, total, query, grad_out, log2_sum, delta, q_position, key_ptr, value_ptr, key_strides, value_strides,
    slots_ptr, first, last, level_start, level, log2_rows, kv_end, scale_log2, dim,
    LARGE: tl.constexpr, HEAD_DIM: tl.constexpr, TILE_N: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """All blocks of a level, in slots ``first`` to ``last``: ``LARGE`` ones of a tile or more, or several to a tile."""
    if LARGE:
        tiles = (1 << log2_rows) // TILE_N
        block = tl.load(slots_ptr + first, mask=first < last, other=0)
        for n in range(first * tiles, last * tiles):
            row = (block * tiles + n % tiles) * TILE_N + tl.arange(0, TILE_N)
            # Read one iteration ahead, so that no tile waits for its number.
            block = tl.load(slots_ptr + tl.minimum((n + 1) // tiles, last - 1))
            acc, total = _add_to_query(
                acc, total, query, grad_out, log2_sum, delta, q_position, key_ptr, value_ptr, key_strides,
                value_strides, row, row >= 0, level_start, level, kv_end, scale_log2, dim, HEAD_DIM, MASKED, PRECISION,
            )  # fmt: skip
    else:
        for n in tl.range(first << log2_rows, last << log2_rows, TILE_N, disable_licm=True):
            position = n + tl.arange(0, TILE_N)
            in_level = position < (last << log2_rows)
            block = tl.load(slots_ptr + (position >> log2_rows), mask=in_level, other=0)  # [TILE_N]
            row = (block << log2_rows) + (position & ((1 << log2_rows) - 1))
            acc, total = _add_to_query(
                acc, total, query, grad_out, log2_sum, delta, q_position, key_ptr, value_ptr, key_strides,
                value_strides, row, in_level, level_start, level, kv_end, scale_log2, dim, HEAD_DIM, MASKED, PRECISION,
            )  # fmt: skip
    return acc, total


@triton.jit(do_not_specialize=["num_heads", "group", "q_len", "kv_len", "num_q_blocks", "num_kv_blocks"])
def _query_kernel(
    query_ptr, key_ptr, value_ptr, pooled_ptr, grad_out_ptr, log2_sum_ptr, delta_ptr, indices_ptr, plan_offsets_ptr,
    order_ptr, kv_lengths_ptr, grad_query_ptr, inverse_sum_ptr,
    query_strides, key_strides, value_strides, pooled_strides, grad_out_strides, grad_query_strides,
    num_heads, group, q_len, kv_len, num_q_blocks, num_kv_blocks, scale, scale_log2,
    BLOCK_Q: tl.constexpr, LOG2_BLOCK_KV: tl.constexpr, NUM_LEVELS: tl.constexpr, LARGE_LEVELS: tl.constexpr,
    HEAD_DIM: tl.constexpr, DIM_TILE: tl.constexpr, TILE_M: tl.constexpr, TILE_N: tl.constexpr,
    HAS_LENGTHS: tl.constexpr, IS_CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of one query tile, and in float32 one over the sum of each query's weights."""
    TILES: tl.constexpr = (BLOCK_Q + TILE_M - 1) // TILE_M
    batch, head, q_block, tile, plan_row = _place(order_ptr, tl.program_id(0), num_heads, num_q_blocks, TILES)
    slots_ptr = indices_ptr + plan_row * num_kv_blocks
    ends_ptr = plan_offsets_ptr + plan_row * (NUM_LEVELS + 1)
    dim = tl.arange(0, DIM_TILE)
    token, in_q, q_mask = _query_rows(q_block, tile, q_len, dim, BLOCK_Q, HEAD_DIM, TILE_M)
    query = _load_rows(_sequence(query_ptr, query_strides, batch, head), query_strides, token, dim, q_mask)
    grad_out = _load_rows(_sequence(grad_out_ptr, grad_out_strides, batch, head), grad_out_strides, token, dim, q_mask)
    statistics = (batch.to(tl.int64) * num_heads + head) * q_len + token
    log2_sum = tl.load(log2_sum_ptr + statistics, mask=in_q, other=float("inf"))  # [TILE_M]
    delta = tl.load(delta_ptr + statistics, mask=in_q, other=0.0)
    q_position = (token + kv_len - q_len).to(tl.int32)
    kv_end = kv_len
    if HAS_LENGTHS:
        kv_end = tl.minimum(kv_len, tl.load(kv_lengths_ptr + batch)).to(tl.int32)
    kv_head = head // group
    pooled_key_ptr = _sequence(pooled_ptr, (pooled_strides[1], pooled_strides[2]), batch, kv_head)
    pooled_value_ptr = pooled_key_ptr + pooled_strides[0]
    row_strides = (0, 0, HEAD_DIM, 1)

    acc = tl.zeros([TILE_M, DIM_TILE], tl.float32)
    total = tl.zeros([TILE_M], tl.float32)
    last = tl.load(ends_ptr + 1)
    acc, total = _through_level(
        acc, total, query, grad_out, log2_sum, delta, q_position, _sequence(key_ptr, key_strides, batch, kv_head),
        _sequence(value_ptr, value_strides, batch, kv_head), key_strides, value_strides,
        slots_ptr, 0, last, 0, 1, LOG2_BLOCK_KV, kv_end, scale_log2, dim,
        LARGE_LEVELS >= 1, HEAD_DIM, TILE_N, IS_CAUSAL, PRECISION,
    )  # fmt: skip
    level_start = 0
    for level in range(2, LARGE_LEVELS + 1):
        first, last = last, tl.load(ends_ptr + level)
        acc, total = _through_level(
            acc, total, query, grad_out, log2_sum, delta, q_position, pooled_key_ptr, pooled_value_ptr, row_strides,
            row_strides, slots_ptr, first, last, level_start, level, LOG2_BLOCK_KV + 1 - level, kv_end, scale_log2, dim,
            True, HEAD_DIM, TILE_N, False, PRECISION,
        )  # fmt: skip
        level_start += _level_rows(kv_len, level)
    for level in range(max(LARGE_LEVELS, 1) + 1, NUM_LEVELS + 1):
        first, last = last, tl.load(ends_ptr + level)
        acc, total = _through_level(
            acc, total, query, grad_out, log2_sum, delta, q_position, pooled_key_ptr, pooled_value_ptr, row_strides,
            row_strides, slots_ptr, first, last, level_start, level, LOG2_BLOCK_KV + 1 - level, kv_end, scale_log2, dim,
            False, HEAD_DIM, TILE_N, False, PRECISION,
        )  # fmt: skip
        level_start += _level_rows(kv_len, level)

    if PRECISION == "ieee":
        inverse_sum = 1.0 / tl.where(total > 0.0, total, 1.0)  # nothing to read adds up to nothing
        acc *= inverse_sum[:, None]
        tl.store(inverse_sum_ptr + statistics, inverse_sum, mask=in_q)
    offset = token[:, None] * grad_query_strides[2] + dim.to(tl.int64)[None, :] * grad_query_strides[3]
    grad_query_ptr = _sequence(grad_query_ptr, grad_query_strides, batch, head)
    tl.store(grad_query_ptr + offset, (acc * scale).to(query.dtype), mask=q_mask)


@triton.jit
def _load_queries(ptr, tma, strides, batch, head, first, token, exists, dim, HEAD_DIM: tl.constexpr):
    """A tile [TILE_M, DIM] of queries or of their output's gradients, zero where none exist.

    By pointer each of ``token`` [TILE_M] of ``head``, one number or [TILE_M]; by descriptor the run from ``first`` on.
    """
    if tma is None:
        row = head.to(tl.int64) * strides[1] + token.to(tl.int64) * strides[2]  # [TILE_M]
        offset = row[:, None] + dim.to(tl.int64)[None, :] * strides[3]
        tile = tl.load(ptr + offset, mask=exists[:, None] & (dim < HEAD_DIM)[None, :], other=0.0)
    else:
        tile = tl.reshape(tma.load([batch, head, first, 0]), (token.shape[0], dim.shape[0]))
    return tile


@triton.jit
def _add_to_rows(
    grad_key, grad_value, key, value, row, query_ptr, grad_out_ptr, query_tma, grad_out_tma, log2_sum_ptr, delta_ptr,
    inverse_sum_ptr, query_strides, grad_out_strides, batch, head, first_token, token, exists, q_len, shift, reads,
    scale_log2, dim,
    HEAD_DIM: tl.constexpr, SMALL: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add what a tile of queries gives to the gradients of the rows [TILE_N, DIM], divided by the tokens that each
    stands for, that of keys before the scale.

    The bias makes a row weigh as much as its tokens, so without it the weight is that of one token. The queries are as
    in :func:`_load_queries`, and ``reads`` [TILE_N, 1 or TILE_M] says which read which rows.
    """
    query = _load_queries(
        query_ptr, query_tma, query_strides, batch, head, first_token, token, exists, dim, HEAD_DIM
    )  # fmt: skip
    statistics = head.to(tl.int64) * q_len + token
    log2_sum = tl.load(log2_sum_ptr + statistics, mask=exists, other=float("inf"))  # [TILE_M]
    delta = tl.load(delta_ptr + statistics, mask=exists, other=0.0)
    scores = dot_rows(key, query, PRECISION)  # [TILE_N, TILE_M]
    weights = tl.exp2(scores * scale_log2 - log2_sum[None, :])
    if PRECISION == "ieee":
        weights *= tl.load(inverse_sum_ptr + statistics, mask=exists, other=0.0)[None, :]
    if SMALL:
        weights = tl.where(reads, weights, 0.0)
    if MASKED:
        weights = tl.where(row[:, None] <= (token + shift)[None, :], weights, 0.0)
    grad_out = _load_queries(
        grad_out_ptr, grad_out_tma, grad_out_strides, batch, head, first_token, token, exists, dim, HEAD_DIM
    )  # fmt: skip
    grad_value = tl.dot(weights.to(grad_out.dtype), grad_out, grad_value, input_precision=PRECISION)
    grad_logits = weights * (dot_rows(value, grad_out, PRECISION) - delta[None, :])
    if SMALL:  # a row that is not read may hold what is no number
        grad_logits = tl.where(reads, grad_logits, 0.0)
    grad_key = tl.dot(grad_logits.to(query.dtype), query, grad_key, input_precision=PRECISION)
    return grad_key, grad_value


@triton.jit
def _through_readers(
    grad_key, grad_value, key, value, row, query_ptr, grad_out_ptr, query_tma, grad_out_tma, log2_sum_ptr, delta_ptr,
    inverse_sum_ptr, query_strides, grad_out_strides, list_ptr, first, last, level_map_ptr, level, batch, kv_head,
    group, q_len, shift, num_q_blocks, num_kv_blocks, scale_log2, dim,
    BLOCK_Q: tl.constexpr, LOG2_BLOCK_KV: tl.constexpr, HEAD_DIM: tl.constexpr, TILE_M: tl.constexpr,
    SMALL: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """All query blocks in places ``first`` to ``last`` of a list: whole tiles of one, or several to a tile."""
    if BLOCK_Q >= TILE_M:
        TILES: tl.constexpr = BLOCK_Q // TILE_M
        reader = tl.load(list_ptr + first, mask=first < last, other=0)
        block = row >> (LOG2_BLOCK_KV + 1 - level)
        for n in range(first * TILES, last * TILES):
            head = kv_head * group + reader // num_q_blocks
            first_token = reader % num_q_blocks * BLOCK_Q + n % TILES * TILE_M
            token = first_token + tl.arange(0, TILE_M)
            reads = (block < num_kv_blocks)[:, None]
            if SMALL:
                place = level_map_ptr + block.to(tl.int64) * (group * num_q_blocks) + reader
                reads = tl.load(place[:, None], mask=reads, other=0) == level  # [TILE_N, 1]
            # Read one iteration ahead, so that no tile waits for its number.
            reader = tl.load(list_ptr + tl.minimum((n + 1) // TILES, last - 1))
            grad_key, grad_value = _add_to_rows(
                grad_key, grad_value, key, value, row, query_ptr, grad_out_ptr, query_tma, grad_out_tma, log2_sum_ptr,
                delta_ptr, inverse_sum_ptr, query_strides, grad_out_strides, batch, head, first_token, token,
                token < q_len, q_len, shift, reads, scale_log2, dim, HEAD_DIM, SMALL, MASKED, PRECISION,
            )  # fmt: skip
    else:
        block = row >> (LOG2_BLOCK_KV + 1 - level)
        for n in tl.range(first * BLOCK_Q, last * BLOCK_Q, TILE_M, disable_licm=True):
            position = n + tl.arange(0, TILE_M)
            listed = position < last * BLOCK_Q
            readers = tl.load(list_ptr + position // BLOCK_Q, mask=listed, other=0)  # [TILE_M]
            token = readers % num_q_blocks * BLOCK_Q + position % BLOCK_Q
            reads = (block < num_kv_blocks)[:, None] & listed[None, :]
            if SMALL:
                place = level_map_ptr + block.to(tl.int64)[:, None] * (group * num_q_blocks) + readers[None, :]
                reads = tl.load(place, mask=reads, other=0) == level  # [TILE_N, TILE_M]
            grad_key, grad_value = _add_to_rows(
                grad_key, grad_value, key, value, row, query_ptr, grad_out_ptr, None, None, log2_sum_ptr,
                delta_ptr, inverse_sum_ptr, query_strides, grad_out_strides, batch,
                kv_head * group + readers // num_q_blocks, 0, token, listed & (token < q_len), q_len, shift, reads,
                scale_log2, dim, HEAD_DIM, SMALL, MASKED, PRECISION,
            )  # fmt: skip
    return grad_key, grad_value


@triton.jit
def _add_coarser(grad, rows_ptr, token, mask, kv_len, dim, NUM_LEVELS: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Add to gradients of tokens [TILE_N, DIM] those of the rows that stand for them."""
    level_start = 0
    for level in range(2, NUM_LEVELS + 1):
        row = level_start + (token >> (level - 1))
        grad += _load_rows(rows_ptr, (0, 0, HEAD_DIM, 1), row, dim, mask).to(tl.float32)
        level_start += _level_rows(kv_len, level)
    return grad


@triton.jit(
    do_not_specialize=[
        "num_heads", "group", "q_len", "kv_len", "num_q_blocks", "num_kv_blocks", "pooled_rows", "num_tiles",
        "first_level",
    ]
)  # fmt: skip
def _key_value_kernel(
    query_ptr, key_ptr, value_ptr, grad_out_ptr, query_tma, grad_out_tma, log2_sum_ptr, delta_ptr, inverse_sum_ptr,
    lists_ptr, ends_ptr, level_map_ptr, kv_lengths_ptr, pooled_ptr, grad_key_ptr, grad_value_ptr,
    query_strides, key_strides, value_strides, grad_out_strides,
    num_heads, group, q_len, kv_len, num_q_blocks, num_kv_blocks, pooled_rows, num_tiles, first_level, scale,
    scale_log2,
    BLOCK_Q: tl.constexpr, LOG2_BLOCK_KV: tl.constexpr, NUM_LEVELS: tl.constexpr, HEAD_DIM: tl.constexpr,
    DIM_TILE: tl.constexpr, TILE_M: tl.constexpr, TILE_N: tl.constexpr, TOKENS: tl.constexpr, SMALL: tl.constexpr,
    HAS_LENGTHS: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradients of one tile of rows: of ``TOKENS``, or of a pooled level, whose rows they replace.

    ``SMALL`` blocks are several to a tile, and the tile has a list of readers of its own; else the block has one.
    """
    pid = tl.program_id(0).to(tl.int64)
    sequence = pid // num_tiles
    num_kv_heads = num_heads // group
    kv_head = (sequence % num_kv_heads).to(tl.int32)
    batch = (sequence // num_kv_heads).to(tl.int32)
    # The coarsest rows come first: most query blocks read some of a tile of these.
    number = (num_tiles - 1 - pid % num_tiles).to(tl.int32)
    level, tile = level_of_tile(number, num_kv_blocks, first_level, 1 << LOG2_BLOCK_KV, TILE_N)
    readers = group * num_q_blocks
    level_map_ptr += sequence * num_kv_blocks * readers
    if SMALL:
        list_row = sequence * num_tiles + number
        lists_ptr += list_row * readers
        first, last = 0, tl.load(ends_ptr + list_row)
    else:
        list_row = sequence * num_kv_blocks + tile // ((1 << (LOG2_BLOCK_KV + 1 - level)) // TILE_N)
        lists_ptr += list_row * readers
        first = tl.load(ends_ptr + list_row * (NUM_LEVELS + 1) + level - 1)
        last = tl.load(ends_ptr + list_row * (NUM_LEVELS + 1) + level)

    kv_end = kv_len
    if HAS_LENGTHS:
        kv_end = tl.minimum(kv_len, tl.load(kv_lengths_ptr + batch)).to(tl.int32)
    level_start = 0
    if not TOKENS:
        for finer in range(2, level):
            level_start += _level_rows(kv_len, finer)
    dim = tl.arange(0, DIM_TILE)
    row = tile * TILE_N + tl.arange(0, TILE_N)
    count = _row_counts(row, level, kv_end)
    # Rows that stand for nothing are read as zeros: what comes of them lies in rows of its own, and is not kept.
    mask = (count > 0)[:, None] & (dim < HEAD_DIM)[None, :]
    key = _load_rows(_sequence(key_ptr, key_strides, batch, kv_head), key_strides, level_start + row, dim, mask)
    value = _load_rows(_sequence(value_ptr, value_strides, batch, kv_head), value_strides, level_start + row, dim, mask)
    batch_queries = batch.to(tl.int64) * num_heads * q_len
    if PRECISION == "ieee":
        inverse_sum_ptr += batch_queries
    grad_key, grad_value = _through_readers(
        tl.zeros([TILE_N, DIM_TILE], tl.float32), tl.zeros([TILE_N, DIM_TILE], tl.float32), key, value, row,
        query_ptr + batch.to(tl.int64) * query_strides[0], grad_out_ptr + batch.to(tl.int64) * grad_out_strides[0],
        query_tma, grad_out_tma, log2_sum_ptr + batch_queries, delta_ptr + batch_queries, inverse_sum_ptr,
        query_strides, grad_out_strides, lists_ptr, first, last, level_map_ptr, level, batch, kv_head, group, q_len,
        kv_len - q_len, num_q_blocks, num_kv_blocks, scale_log2, dim,
        BLOCK_Q, LOG2_BLOCK_KV, HEAD_DIM, TILE_M, SMALL, MASKED, PRECISION,
    )  # fmt: skip
    grad_key *= scale

    sequences = tl.num_programs(0).to(tl.int64) // num_tiles
    pooled_key_ptr = pooled_ptr + sequence * pooled_rows * HEAD_DIM
    pooled_value_ptr = pooled_key_ptr + sequences * pooled_rows * HEAD_DIM
    if TOKENS:
        grad_key = _add_coarser(grad_key, pooled_key_ptr, row, mask, kv_len, dim, NUM_LEVELS, HEAD_DIM)
        grad_value = _add_coarser(grad_value, pooled_value_ptr, row, mask, kv_len, dim, NUM_LEVELS, HEAD_DIM)
        offset = (sequence * kv_len + row)[:, None] * HEAD_DIM + dim[None, :]
        kept = (row < kv_len)[:, None] & (dim < HEAD_DIM)[None, :]
        tl.store(grad_key_ptr + offset, tl.where(mask, grad_key, 0.0).to(key.dtype), mask=kept)
        tl.store(grad_value_ptr + offset, tl.where(mask, grad_value, 0.0).to(key.dtype), mask=kept)
    else:
        # No other program reads these rows. Only those of a token or more are read again.
        offset = (level_start + row).to(tl.int64)[:, None] * HEAD_DIM + dim[None, :]
        tl.store(pooled_key_ptr + offset, grad_key.to(key.dtype), mask=mask)
        tl.store(pooled_value_ptr + offset, grad_value.to(value.dtype), mask=mask)


def _key_value_gradients(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pooled: Tensor,
    grad_out: Tensor,
    log2_sum: Tensor,
    delta: Tensor,
    inverse_sum: Tensor | None,
    indices: Tensor,
    offsets: Tensor,
    kv_lengths: Tensor | None,
    block_q: int,
    block_kv: int,
    is_causal: bool,
    scale: float,
    tile: BackwardTile,
) -> tuple[Tensor, Tensor]:
    """Coarse levels first, as the program of a tile of tokens adds what theirs leave in ``pooled``.

    ``inverse_sum``, which float32 alone has, is what the queries' kernel left.
    """
    batch, heads, q_len, head_dim = query.shape
    num_kv_heads, kv_len = key.shape[1:3]
    num_q_blocks, num_kv_blocks = indices.shape[2:]
    num_levels = offsets.shape[3] - 1
    grad_key, grad_value = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (key, value))
    turned = turn(indices, offsets, num_kv_heads)
    large_levels = min(num_levels, (block_kv // tile.held).bit_length())
    by_descriptor: list[TensorDescriptor | None] = [None, None]
    if tile.streamed <= block_q and has_tensor_memory_access(query.device):
        found = [_descriptor(x, tile.streamed, _dim_tile(head_dim)) for x in (query, grad_out)]
        if None not in found:  # the loop reads both by descriptor or none
            by_descriptor = found
    block_lists = sort_levels(turned, num_levels) if large_levels else None

    def launch(first_level: int, last_level: int) -> None:
        """Levels that are all of tokens or none, and of large blocks or none."""
        if first_level > last_level:
            return
        tokens, small = first_level == 1, first_level > large_levels
        if small:
            lists, ends = readers_of_tiles(turned, first_level, last_level, block_kv, tile.held)
        else:
            assert block_lists is not None
            lists, ends = block_lists
        rows = (key, value) if tokens else (pooled[0], pooled[1])
        num_tiles = count_tiles(num_kv_blocks, first_level, last_level, block_kv, tile.held)
        _key_value_kernel[(batch * num_kv_heads * num_tiles,)](
            query, *rows, grad_out, *by_descriptor, log2_sum, delta, inverse_sum, lists, ends, turned, kv_lengths,
            pooled, grad_key, grad_value,
            query.stride(), rows[0].stride(), rows[1].stride(), grad_out.stride(),
            heads, heads // num_kv_heads, q_len, kv_len, num_q_blocks, num_kv_blocks, pooled.shape[3], num_tiles,
            first_level, scale, scale * _LOG2_E,
            BLOCK_Q=block_q, LOG2_BLOCK_KV=block_kv.bit_length() - 1, NUM_LEVELS=num_levels, HEAD_DIM=head_dim,
            DIM_TILE=_dim_tile(head_dim), TILE_M=tile.streamed, TILE_N=tile.held, TOKENS=tokens, SMALL=small,
            HAS_LENGTHS=kv_lengths is not None, MASKED=is_causal and tokens, PRECISION=_precision(query),
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip

    launch(max(large_levels, 1) + 1, num_levels)
    launch(2, large_levels)
    launch(1, 1)
    return grad_key, grad_value


def _dim_tile(head_dim: int) -> int:
    return int(max(16, triton.next_power_of_2(head_dim)))


def _precision(query: Tensor) -> str:
    return "ieee" if query.dtype == torch.float32 else "tf32"


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
    batch, heads, q_len, head_dim = query.shape
    indices, offsets, lse = indices.contiguous(), offsets.contiguous(), lse.contiguous()
    kv_lengths = None if kv_lengths is None else kv_lengths.contiguous()
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    num_q_blocks, num_kv_blocks = indices.shape[2:]
    num_levels = offsets.shape[3] - 1
    dim_tile = _dim_tile(head_dim)
    grad_query = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    log2_sum, delta = (torch.empty(lse.shape, dtype=torch.float32, device=query.device) for _ in range(2))
    inverse_sum = torch.empty_like(log2_sum) if query.dtype == torch.float32 else None
    with on_device(query):
        of_queries, of_rows = choose_backward_tiles(
            block_q=block_q,
            head_dim=dim_tile,
            dtype=query.dtype,
            shared_memory=shared_memory_limit(query.device),
        )
        _delta_kernel[(batch * heads * triton.cdiv(q_len, _DELTA_ROWS),)](
            out, grad_out, lse, grad_lse, log2_sum, delta, out.stride(), grad_out.stride(), heads, q_len,
            HEAD_DIM=head_dim, DIM_TILE=dim_tile, HAS_GRAD_LSE=grad_lse is not None, ROWS=_DELTA_ROWS,
            PRECISION=_precision(query),
        )  # fmt: skip
        pooled = pool_keys_and_values(key, value, kv_lengths, num_levels)
        order = heavy_first(offsets, num_kv_blocks, block_kv)
        _query_kernel[(batch * heads * num_q_blocks * triton.cdiv(block_q, of_queries.held),)](
            query, key, value, pooled, grad_out, log2_sum, delta, indices, offsets, order, kv_lengths, grad_query,
            inverse_sum,
            query.stride(), key.stride(), value.stride(), pooled.stride(), grad_out.stride(), grad_query.stride(),
            heads, heads // key.shape[1], q_len, key.shape[2], num_q_blocks, num_kv_blocks, scale, scale * _LOG2_E,
            BLOCK_Q=block_q, LOG2_BLOCK_KV=block_kv.bit_length() - 1, NUM_LEVELS=num_levels,
            LARGE_LEVELS=min(num_levels, (block_kv // of_queries.streamed).bit_length()), HEAD_DIM=head_dim,
            DIM_TILE=dim_tile, TILE_M=of_queries.held, TILE_N=of_queries.streamed,
            HAS_LENGTHS=kv_lengths is not None, IS_CAUSAL=is_causal, PRECISION=_precision(query),
            num_warps=of_queries.num_warps, num_stages=of_queries.num_stages,
        )  # fmt: skip
        grad_key, grad_value = _key_value_gradients(
            query, key, value, pooled, grad_out, log2_sum, delta, inverse_sum, indices, offsets, kv_lengths, block_q,
            block_kv, is_causal, scale, of_rows,
        )  # fmt: skip
    return grad_query, grad_key, grad_value
