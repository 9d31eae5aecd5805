"""Forward kernel: one program a query tile.

A block is *whole* for a query tile when all its tokens exist and none lies past a causal diagonal. The rows of whole
blocks are read tile by tile without a mask and with one bias a tile: tiles inside a block through tensor descriptors
(TMA) where the device and the strides allow, tiles of several small blocks by pointers. What is left of each level
comes last, under masks.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from psa_kernels.pyramid_attention.ops import lse_dtype
from psa_kernels.pyramid_attention.tiles import choose_tile
from psa_kernels.pyramid_pool.triton_fwd import forward as pool_rows
from psa_kernels.triton_device import has_tensor_memory_access, on_device, shared_memory_limit

_LOG2_E = 1.4426950408889634


@triton.jit
def _attend_tile(acc, row_max, row_sum, query, key, value, scale_log2, bias, PRECISION: tl.constexpr):
    """Fold a tile [TILE_N, DIM] that all queries see into the running statistics.

    ``bias`` is log2 of the tokens that each of its rows stands for.
    """
    scores = tl.dot(query, tl.trans(key), input_precision=PRECISION)  # [TILE_M, TILE_N]
    new_max = tl.maximum(row_max, tl.max(scores, axis=1) * scale_log2 + bias)
    weights = tl.exp2(scores * scale_log2 - (new_max - bias)[:, None])
    decay = tl.exp2(row_max - new_max)
    row_sum = row_sum * decay + tl.sum(weights, axis=1)
    acc = tl.dot(weights.to(value.dtype), value, acc * decay[:, None], input_precision=PRECISION)
    return acc, new_max, row_sum


@triton.jit
def _attend_masked_tile(acc, row_max, row_sum, query, key, value, scale_log2, bias, visible, PRECISION: tl.constexpr):
    """The same with a bias a row [1, TILE_N], for queries of which each sees what ``visible`` says."""
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
def _attend_large_blocks(
    acc, row_max, row_sum, query, key_ptr, value_ptr, key_strides, value_strides, key_tma, value_tma,
    batch, kv_head, indices_ptr, first, end, level_start, scale_log2, dim,
    LEVEL: tl.constexpr, BLOCK_KV: tl.constexpr, HEAD_DIM: tl.constexpr, TILE_N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Whole blocks in slots ``first`` to ``end`` at a level where a block has one tile of rows or more."""
    tiles: tl.constexpr = (BLOCK_KV >> (LEVEL - 1)) // TILE_N
    block = tl.load(indices_ptr + first, mask=first < end, other=0)
    for n in range(first * tiles, end * tiles):
        start = level_start + (block * tiles + n % tiles) * TILE_N
        # Read one iteration ahead, so that no tile waits for its number.
        block = tl.load(indices_ptr + tl.minimum((n + 1) // tiles, end - 1))
        if key_tma is not None:
            key = tl.reshape(key_tma.load([batch, kv_head, start, 0]), (TILE_N, dim.shape[0]))
            value = tl.reshape(value_tma.load([batch, kv_head, start, 0]), (TILE_N, dim.shape[0]))
        else:
            row = start + tl.arange(0, TILE_N)
            key = _load_rows(key_ptr, key_strides, row, dim, (dim < HEAD_DIM)[None, :])
            value = _load_rows(value_ptr, value_strides, row, dim, (dim < HEAD_DIM)[None, :])
        acc, row_max, row_sum = _attend_tile(
            acc, row_max, row_sum, query, key, value, scale_log2, LEVEL - 1.0, PRECISION
        )
    return acc, row_max, row_sum


@triton.jit
def _attend_small_blocks(
    acc, row_max, row_sum, query, key_ptr, value_ptr, key_strides, value_strides,
    indices_ptr, first, end, level_start, bias, log2_rows, scale_log2, dim,
    HEAD_DIM: tl.constexpr, TILE_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Rows ``first`` to ``end`` of whole blocks, counted through the plan's slots: several blocks share a tile."""
    for n in range(first, end, TILE_N):
        position = n + tl.arange(0, TILE_N)
        block = tl.load(indices_ptr + (position >> log2_rows))  # [TILE_N]
        row = level_start + (block << log2_rows) + (position & ((1 << log2_rows) - 1))
        key = _load_rows(key_ptr, key_strides, row, dim, (dim < HEAD_DIM)[None, :])
        value = _load_rows(value_ptr, value_strides, row, dim, (dim < HEAD_DIM)[None, :])
        acc, row_max, row_sum = _attend_tile(acc, row_max, row_sum, query, key, value, scale_log2, bias, PRECISION)
    return acc, row_max, row_sum


@triton.jit
def _attend_rest(
    acc, row_max, row_sum, query, q_position, key_ptr, value_ptr, key_strides, value_strides,
    indices_ptr, first, end, level_start, level, log2_rows, kv_end, scale_log2, dim,
    HEAD_DIM: tl.constexpr, TILE_N: tl.constexpr, IS_CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Rows ``first`` to ``end`` of any blocks, under masks.

    Narrow tiles and no pipeline: what this loop holds in registers, the loops above cannot.
    """
    REST_N: tl.constexpr = min(TILE_N, 16)
    pool = 1 << (level - 1)
    for n in tl.range(first, end, REST_N, num_stages=1):
        position = n + tl.arange(0, REST_N)
        block = tl.load(indices_ptr + (position >> log2_rows), mask=position < end, other=0)  # [REST_N]
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
def _whole_slots(indices_ptr, first, last, whole_blocks):
    """The end of the slots from ``first`` whose blocks are whole: a level's slots are sorted by block."""
    end = last
    while (end > first) & (tl.load(indices_ptr + tl.maximum(end - 1, 0)) >= whole_blocks):
        end -= 1
    return end


@triton.jit(
    do_not_specialize=[
        "num_heads",
        "group",
        "q_len",
        "kv_len",
        "num_q_blocks",
        "num_kv_blocks",
        "pooled_rows",
    ]
)
def _forward_kernel(
    query_ptr, key_ptr, value_ptr, pooled_key_ptr, pooled_value_ptr, key_tma, value_tma, pooled_key_tma,
    pooled_value_tma, indices_ptr, offsets_ptr, kv_lengths_ptr, out_ptr, lse_ptr,
    query_strides, key_strides, value_strides, out_strides,
    num_heads, group, q_len, kv_len, num_q_blocks, num_kv_blocks, pooled_rows, scale_log2,
    BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr, LOG2_BLOCK_KV: tl.constexpr, NUM_LEVELS: tl.constexpr,
    LARGE_LEVELS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM_TILE: tl.constexpr, TILE_M: tl.constexpr,
    TILE_N: tl.constexpr, HAS_LENGTHS: tl.constexpr, IS_CAUSAL: tl.constexpr, NEGATE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    tiles_per_block: tl.constexpr = (BLOCK_Q + TILE_M - 1) // TILE_M
    pid = tl.program_id(0).to(tl.int64)
    tile = pid % tiles_per_block
    q_block = pid // tiles_per_block % num_q_blocks
    head = pid // (tiles_per_block * num_q_blocks) % num_heads
    batch = pid // (tiles_per_block * num_q_blocks * num_heads)
    kv_head = head // group
    plan_row = (batch * num_heads + head) * num_q_blocks + q_block

    in_block = tile * TILE_M + tl.arange(0, TILE_M)
    q_token = q_block * BLOCK_Q + in_block
    in_q = (in_block < BLOCK_Q) & (q_token < q_len)
    dim = tl.arange(0, DIM_TILE)
    q_mask = in_q[:, None] & (dim < HEAD_DIM)[None, :]
    query_ptr += batch * query_strides[0] + head * query_strides[1]
    offset = q_token[:, None] * query_strides[2] + dim.to(tl.int64)[None, :] * query_strides[3]
    query = tl.load(query_ptr + offset, mask=q_mask, other=0.0)  # [TILE_M, DIM]
    if NEGATE:  # scale_log2 is never negative, so that the largest score has the largest logit
        query = -query

    kv_end = kv_len
    if HAS_LENGTHS:
        kv_end = tl.minimum(kv_len, tl.load(kv_lengths_ptr + batch)).to(tl.int32)
    q_position = (q_token + kv_len - q_len).to(tl.int32)
    whole_blocks = kv_end // BLOCK_KV
    if IS_CAUSAL:
        first_position = (q_block * BLOCK_Q + tile * TILE_M + kv_len - q_len).to(tl.int32)
        whole_blocks = tl.minimum(whole_blocks, (first_position + 1) // BLOCK_KV)
    indices_ptr += plan_row * num_kv_blocks
    offsets_ptr += plan_row * (NUM_LEVELS + 1)
    key_ptr += batch * key_strides[0] + kv_head * key_strides[1]
    value_ptr += batch * value_strides[0] + kv_head * value_strides[1]
    pooled_start = (batch * (num_heads // group) + kv_head) * pooled_rows * HEAD_DIM
    pooled_key_ptr += pooled_start
    pooled_value_ptr += pooled_start
    pooled_strides = (0, 0, HEAD_DIM, 1)
    batch, kv_head = batch.to(tl.int32), kv_head.to(tl.int32)  # as descriptors take them

    row_max = tl.full([TILE_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([TILE_M], tl.float32)
    acc = tl.zeros([TILE_M, DIM_TILE], tl.float32)

    # Level 1.
    first = tl.load(offsets_ptr)
    last = tl.load(offsets_ptr + 1)
    end = _whole_slots(indices_ptr, first, last, whole_blocks)
    rest = end * BLOCK_KV
    if LARGE_LEVELS >= 1:
        acc, row_max, row_sum = _attend_large_blocks(
            acc, row_max, row_sum, query, key_ptr, value_ptr, key_strides, value_strides, key_tma, value_tma,
            batch, kv_head, indices_ptr, first, end, 0, scale_log2, dim,
            1, BLOCK_KV, HEAD_DIM, TILE_N, PRECISION,
        )  # fmt: skip
    else:
        rest -= (end - first) * BLOCK_KV % TILE_N
        acc, row_max, row_sum = _attend_small_blocks(
            acc, row_max, row_sum, query, key_ptr, value_ptr, key_strides, value_strides,
            indices_ptr, first * BLOCK_KV, rest, 0, 0.0, LOG2_BLOCK_KV, scale_log2, dim,
            HEAD_DIM, TILE_N, PRECISION,
        )  # fmt: skip
    acc, row_max, row_sum = _attend_rest(
        acc, row_max, row_sum, query, q_position, key_ptr, value_ptr, key_strides, value_strides,
        indices_ptr, rest, last * BLOCK_KV, 0, 1, LOG2_BLOCK_KV, kv_end, scale_log2, dim,
        HEAD_DIM, TILE_N, IS_CAUSAL, PRECISION,
    )  # fmt: skip

    # Pooled levels whose blocks have a tile of rows or more.
    level_start = 0  # the level's first pooled row
    for level in tl.static_range(2, LARGE_LEVELS + 1):
        first = tl.load(offsets_ptr + level - 1)
        end = _whole_slots(indices_ptr, first, tl.load(offsets_ptr + level), whole_blocks)
        acc, row_max, row_sum = _attend_large_blocks(
            acc, row_max, row_sum, query, pooled_key_ptr, pooled_value_ptr, pooled_strides, pooled_strides,
            pooled_key_tma, pooled_value_tma, batch, kv_head, indices_ptr, first, end, level_start, scale_log2, dim,
            level, BLOCK_KV, HEAD_DIM, TILE_N, PRECISION,
        )  # fmt: skip
        level_start += (kv_len + (1 << (level - 1)) - 1) >> (level - 1)

    # The other pooled levels, and what masks every pooled level needs.
    level_start = 0
    for level in range(2, NUM_LEVELS + 1):
        log2_rows = LOG2_BLOCK_KV + 1 - level
        first = tl.load(offsets_ptr + level - 1)
        last = tl.load(offsets_ptr + level)
        end = _whole_slots(indices_ptr, first, last, whole_blocks)
        rest = end << log2_rows
        if level > LARGE_LEVELS:
            start = first << log2_rows
            rest -= (rest - start) % TILE_N
            acc, row_max, row_sum = _attend_small_blocks(
                acc, row_max, row_sum, query, pooled_key_ptr, pooled_value_ptr, pooled_strides, pooled_strides,
                indices_ptr, start, rest, level_start, level - 1.0, log2_rows, scale_log2, dim,
                HEAD_DIM, TILE_N, PRECISION,
            )  # fmt: skip
        acc, row_max, row_sum = _attend_rest(
            acc, row_max, row_sum, query, q_position, pooled_key_ptr, pooled_value_ptr, pooled_strides,
            pooled_strides, indices_ptr, rest, last << log2_rows, level_start, level, log2_rows, kv_end,
            scale_log2, dim, HEAD_DIM, TILE_N, False, PRECISION,
        )  # fmt: skip
        level_start += (kv_len + (1 << (level - 1)) - 1) >> (level - 1)

    has_read = row_sum != 0  # true for NaN too: what is not a number shows
    out = acc / tl.where(has_read, row_sum, 1.0)[:, None]
    # Offsets start at 0. Adding one that is read only now makes the compiler work out the rows' numbers a second time
    # here, and not keep those of the queries in registers through the loops.
    in_block = tile * TILE_M + tl.arange(0, TILE_M) + tl.load(offsets_ptr, volatile=True)
    q_token = q_block * BLOCK_Q + in_block
    in_q = (in_block < BLOCK_Q) & (q_token < q_len)
    q_mask = in_q[:, None] & (dim < HEAD_DIM)[None, :]
    out_ptr += batch.to(tl.int64) * out_strides[0] + head * out_strides[1]
    offset = q_token[:, None] * out_strides[2] + dim.to(tl.int64)[None, :] * out_strides[3]
    tl.store(out_ptr + offset, out.to(query.dtype), mask=q_mask)
    LN_2: tl.constexpr = 0.6931471805599453
    lse = tl.where(has_read, (row_max + tl.log2(tl.where(has_read, row_sum, 1.0))) * LN_2, float("-inf"))
    tl.store(lse_ptr + (batch.to(tl.int64) * num_heads + head) * q_len + q_token, lse, mask=in_q)


def _descriptor(x: Tensor, tile_n: int, dim_tile: int) -> TensorDescriptor | None:
    """Tiles of a sequence ``[B, H, L, D]`` through TMA, or None where its strides or its address do not allow it."""
    aligned = all(stride > 0 and stride * x.element_size() % 16 == 0 for stride in x.stride()[:3])
    if not aligned or x.stride(3) != 1 or x.data_ptr() % 16:
        return None
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, 1, tile_n, dim_tile])


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
    if query.dtype == torch.float64 or head_dim > 256:
        raise ValueError(
            "impl='triton' takes float16, bfloat16 or float32 with head_dim up to 256, "
            f"got {query.dtype} with head_dim {head_dim}"
        )
    indices, offsets = indices.contiguous(), offsets.contiguous()
    kv_lengths = None if kv_lengths is None else kv_lengths.contiguous()
    num_q_blocks, num_kv_blocks = indices.shape[2:]
    num_levels = offsets.shape[3] - 1
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    lse = torch.empty(query.shape[:3], dtype=lse_dtype(query), device=query.device)
    dim_tile = max(16, triton.next_power_of_2(head_dim))
    with on_device(query):
        tile = choose_tile(
            block_q=block_q,
            head_dim=dim_tile,
            dtype=query.dtype,
            shared_memory=shared_memory_limit(query.device),
        )
        pooled_key = pool_rows(key, kv_lengths, num_levels)
        pooled_value = pool_rows(value, kv_lengths, num_levels)
        large_levels = min(num_levels, (block_kv // tile.tile_n).bit_length())
        sequences = (key, value, pooled_key, pooled_value) if large_levels > 1 else (key, value)
        descriptors: list[TensorDescriptor | None] = [None] * 4
        if large_levels and has_tensor_memory_access(query.device):
            found = [_descriptor(x, tile.tile_n, dim_tile) for x in sequences]
            if None not in found:
                descriptors[: len(found)] = found
        _forward_kernel[(batch * heads * num_q_blocks * triton.cdiv(block_q, tile.tile_m),)](
            query, key, value, pooled_key, pooled_value, *descriptors, indices, offsets, kv_lengths, out, lse,
            query.stride(), key.stride(), value.stride(), out.stride(),
            heads, heads // key.shape[1], q_len, key.shape[2], num_q_blocks, num_kv_blocks, pooled_key.shape[2],
            abs(scale) * _LOG2_E,
            BLOCK_Q=block_q, BLOCK_KV=block_kv, LOG2_BLOCK_KV=block_kv.bit_length() - 1, NUM_LEVELS=num_levels,
            LARGE_LEVELS=large_levels, HEAD_DIM=head_dim, DIM_TILE=dim_tile, TILE_M=tile.tile_m, TILE_N=tile.tile_n,
            HAS_LENGTHS=kv_lengths is not None, IS_CAUSAL=is_causal, NEGATE=scale < 0,
            PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
    return out, lse
