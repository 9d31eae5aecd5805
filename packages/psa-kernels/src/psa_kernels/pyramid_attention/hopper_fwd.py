"""Forward kernel for Hopper (capability 9.0), in Gluon: warps that load beside warps that compute.

Four warps load queries, and keys and values of level 1, through tensor descriptors (TMA), and the rows of the pooled
levels by asynchronous copies, several blocks to a tile. Two groups of four warps compute, each for half of a query
block: the scores of a tile, and while its weights are worked out, what the values of the tile before give. In between
lie rings of tiles in shared memory, each with a barrier that says full and one that says empty. Programs stay: the
first tiles of a query block arrive while the last one's are computed.

:mod:`psa_kernels.pyramid_attention.triton_fwd` asks :func:`takes` what it computes better itself.
"""

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from psa_kernels.triton_device import can_copy_by_descriptor, is_hopper, num_multiprocessors, shared_memory_limit

# Gluon is young and its functions change: of another Triton's nothing is known here.
if not (3, 6) <= tuple(int(part) for part in triton.__version__.split(".")[:2]) <= (3, 9):
    raise ImportError(f"the kernel for Hopper compiles with Triton 3.6 to 3.9, this is {triton.__version__}")
# The same functions by the names of Triton 3.9 and of 3.6.
_copy_tile = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
_copy_elements = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared

BLOCK = 128
"""Tokens of a query block and of a key/value block, and rows of a tile: the kernel knows no other size."""
MOST_LEVELS = 1
"""With how many levels the kernel is the faster one. It computes eight, but rows of pooled levels arrive too late."""
_STAGES = 3
_QUERY_TILES = 1
_LOAD_REGISTERS, _COMPUTE_REGISTERS = 56, 224
"""Of a thread: 4 warps that load and 8 that compute share 65,536."""


@gluon.jit
def _level_ends(ends_ptr, level):
    return gl.load(ends_ptr + level - 1), gl.load(ends_ptr + level)


@gluon.jit
def _row_offsets(
    part, slots_ptr, start, end, level_start, log2_rows, level_rows, DIM: gl.constexpr, HEAD_DIM: gl.constexpr
):  # fmt: skip
    """Where 32 of the rows of a tile lie, in elements from a sequence's first pooled row; -1 where there is none."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // DIM, DIM // 8], [4, 1], [1, 0])
    position = start + part * 32 + gl.arange(0, 32, gl.SliceLayout(1, layout))
    block = gl.load(slots_ptr + (position >> log2_rows), mask=position < end, other=0)
    row = (block << log2_rows) + (position & ((1 << log2_rows) - 1))
    return gl.where((position < end) & (row < level_rows), (level_start + row) * HEAD_DIM, -1)


@gluon.jit
def _copy_rows(tile, full, base_ptr, offsets, DIM: gl.constexpr, HEAD_DIM: gl.constexpr):
    """Start to copy the 128 rows at ``offsets`` into a tile [128, DIM], zeros where there is none. ``full`` hears of it
    from each thread, when its copies have arrived, and once more for the count that copies by descriptor need."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // DIM, DIM // 8], [4, 1], [1, 0])
    dim = gl.arange(0, DIM, gl.SliceLayout(0, layout))
    for part in gl.static_range(4):
        offset = offsets[part]
        source = base_ptr + (gl.maximum(offset, 0)[:, None] + dim[None, :])
        # 16 bytes at a time: what is known of an argument's alignment is not known to the warps that it is handed to.
        source = gl.max_contiguous(gl.multiple_of(source, [16, 16]), [1, 8])
        mask = (offset >= 0)[:, None] & (dim < HEAD_DIM)[None, :]
        _copy_elements(tile.slice(part * 32, 32), source, mask=mask)
    async_copy.mbarrier_arrive(full, increment_count=False)
    mbarrier.arrive(full, count=1)


@gluon.jit
def _load(
    query_tma, key_tma, value_tma, pooled_ptr, order_ptr, indices_ptr, plan_offsets_ptr,
    queries, keys, values, query_full, query_empty, key_full, key_empty, value_full, value_empty,
    num_heads, group, kv_len, num_q_blocks, num_kv_blocks, num_work, pooled_rows, pooled_half,
    NUM_LEVELS: gl.constexpr, HEAD_DIM: gl.constexpr, DIM: gl.constexpr, STAGES: gl.constexpr, QUERIES: gl.constexpr,
):  # fmt: skip
    """What four warps do: fill the rings."""
    tile = 0
    for work in range(gl.program_id(0), num_work, gl.num_programs(0)):
        turn = work // gl.num_programs(0)
        plan_row = gl.load(order_ptr + work)
        q_block = plan_row % num_q_blocks
        head = plan_row // num_q_blocks % num_heads
        batch = plan_row // (num_q_blocks * num_heads)
        kv_head = head // group
        slots_ptr = indices_ptr + plan_row.to(gl.int64) * num_kv_blocks
        ends_ptr = plan_offsets_ptr + plan_row.to(gl.int64) * (NUM_LEVELS + 1)
        last = gl.load(ends_ptr + 1)
        block = gl.load(slots_ptr)

        place = turn % QUERIES
        mbarrier.wait(query_empty.index(place), (turn // QUERIES & 1) ^ 1)
        mbarrier.expect(query_full.index(place), 128 * DIM * 2)
        for half in gl.static_range(2):
            _copy_tile(
                query_tma, [batch, head, q_block * 128 + half * 64, 0], query_full.index(place),
                queries.index(place * 2 + half),
            )  # fmt: skip

        for n in range(last):
            start = block * 128
            block = gl.load(slots_ptr + gl.minimum(n + 1, last - 1))
            stage = tile % STAGES
            free = (tile // STAGES & 1) ^ 1
            mbarrier.wait(key_empty.index(stage), free)
            mbarrier.arrive(key_full.index(stage), count=128)
            mbarrier.expect(key_full.index(stage), 128 * DIM * 2)
            _copy_tile(key_tma, [batch, kv_head, start, 0], key_full.index(stage), keys.index(stage))
            mbarrier.wait(value_empty.index(stage), free)
            mbarrier.arrive(value_full.index(stage), count=128)
            mbarrier.expect(value_full.index(stage), 128 * DIM * 2)
            _copy_tile(value_tma, [batch, kv_head, start, 0], value_full.index(stage), values.index(stage))
            tile += 1

        sequence = (batch.to(gl.int64) * (num_heads // group) + kv_head) * pooled_rows
        pooled_key_ptr = pooled_ptr + sequence * HEAD_DIM
        pooled_value_ptr = pooled_key_ptr + pooled_half
        level_start = 0
        for level in range(2, NUM_LEVELS + 1):
            log2_rows = 8 - level
            first, last = _level_ends(ends_ptr, level)
            level_rows = (kv_len + (1 << (level - 1)) - 1) >> (level - 1)
            end = last << log2_rows
            for start in range(first << log2_rows, end, 128):
                stage = tile % STAGES
                free = (tile // STAGES & 1) ^ 1
                # Before the tile is free: a block's number takes as long to come as half a tile to compute.
                offsets = (
                    _row_offsets(0, slots_ptr, start, end, level_start, log2_rows, level_rows, DIM, HEAD_DIM),
                    _row_offsets(1, slots_ptr, start, end, level_start, log2_rows, level_rows, DIM, HEAD_DIM),
                    _row_offsets(2, slots_ptr, start, end, level_start, log2_rows, level_rows, DIM, HEAD_DIM),
                    _row_offsets(3, slots_ptr, start, end, level_start, log2_rows, level_rows, DIM, HEAD_DIM),
                )  # fmt: skip
                mbarrier.wait(key_empty.index(stage), free)
                key = keys.index(stage).reshape([128, DIM])
                _copy_rows(key, key_full.index(stage), pooled_key_ptr, offsets, DIM, HEAD_DIM)
                mbarrier.wait(value_empty.index(stage), free)
                value = values.index(stage).reshape([128, DIM])
                _copy_rows(value, value_full.index(stage), pooled_value_ptr, offsets, DIM, HEAD_DIM)
                tile += 1
            level_start += level_rows


@gluon.jit
def _visible(scores, start, end, last_block, kv_len, level, num_kv_blocks, scale_log2):
    """Scores of a tile that is not whole: -inf where no row exists, and less where a row stands for fewer tokens."""
    layout: gl.constexpr = gl.SliceLayout(0, scores.type.layout)
    log2_rows = 8 - level
    pool = 1 << (level - 1)
    position = start + gl.arange(0, 128, layout)
    row = (last_block << log2_rows) + (position & ((1 << log2_rows) - 1))
    in_last = ((((position >> log2_rows) + 1) << log2_rows) >= end) & (last_block == num_kv_blocks - 1)
    count = gl.where(in_last, gl.minimum(kv_len - row * pool, pool), pool)
    visible = (position < end) & (count > 0)
    less = gl.log2(gl.maximum(count, 1).to(gl.float32)) - (level - 1).to(gl.float32)
    return gl.where(visible[None, :], scores + (less / scale_log2)[None, :], float("-inf"))


@gluon.jit
def _next_tile(level, start, end, last_block, slots_ptr, ends_ptr, NUM_LEVELS: gl.constexpr):
    """Where the tile after ``start`` starts, its level and where that ends, in rows counted through the level's slots,
    and the level's last block. There is none when ``start`` is not below ``end``."""
    start += 128
    while (start >= end) & (level < NUM_LEVELS):
        level += 1
        first, last = _level_ends(ends_ptr, level)
        start, end = first << (8 - level), last << (8 - level)
        last_block = gl.load(slots_ptr + gl.maximum(last - 1, 0))
    return level, start, end, last_block


@gluon.jit
def _weigh(
    scores, row_max, row_sum, level, start, end, last_block, kv_len, num_kv_blocks, scale_log2,
    DTYPE: gl.constexpr, WEIGHTS_LAYOUT: gl.constexpr,
):  # fmt: skip
    """Weights of a tile as an operand, the new statistics, and by how much what has been summed decays."""
    bias = (level - 1).to(gl.float32)
    if (start + 128 > end) | ((start + 128 == end) & (last_block == num_kv_blocks - 1) & (kv_len % 128 != 0)):
        scores = _visible(scores, start, end, last_block, kv_len, level, num_kv_blocks, scale_log2)
    new_max = gl.maximum(row_max, gl.max(scores, axis=1) * scale_log2 + bias)
    weights = gl.exp2(scores * scale_log2 - (new_max - bias)[:, None])
    decay = gl.exp2(row_max - new_max)
    row_sum = row_sum * decay + gl.sum(weights, axis=1)
    return gl.convert_layout(weights.to(DTYPE), WEIGHTS_LAYOUT), decay, new_max, row_sum


@gluon.jit
def _compute(
    order_ptr, indices_ptr, plan_offsets_ptr, out_ptr, lse_ptr, out_strides,
    queries, keys, values, query_full, query_empty, key_full, key_empty, value_full, value_empty,
    num_heads, q_len, kv_len, num_q_blocks, num_kv_blocks, num_work, scale_log2,
    PART: gl.constexpr, NUM_LEVELS: gl.constexpr, HEAD_DIM: gl.constexpr, DIM: gl.constexpr, STAGES: gl.constexpr,
    QUERIES: gl.constexpr,
):  # fmt: skip
    """What a group of four warps does: one half of each query block."""
    scores_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16])
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DIM, 16])
    weights_layout: gl.constexpr = gl.DotOperandLayout(0, acc_layout, 2)
    rows_layout: gl.constexpr = gl.SliceLayout(1, scores_layout)
    out_rows_layout: gl.constexpr = gl.SliceLayout(1, acc_layout)
    dtype: gl.constexpr = out_ptr.dtype.element_ty
    tile = 0
    for work in range(gl.program_id(0), num_work, gl.num_programs(0)):
        turn = work // gl.num_programs(0)
        plan_row = gl.load(order_ptr + work)
        slots_ptr = indices_ptr + plan_row.to(gl.int64) * num_kv_blocks
        ends_ptr = plan_offsets_ptr + plan_row.to(gl.int64) * (NUM_LEVELS + 1)

        row_max = gl.full([64], float("-inf"), gl.float32, rows_layout)
        row_sum = gl.full([64], 0.0, gl.float32, rows_layout)
        acc = gl.full([64, DIM], 0.0, gl.float32, acc_layout)
        no_scores = gl.full([64, 128], 0.0, gl.float32, scores_layout)
        place = turn % QUERIES
        query = queries.index(place * 2 + PART).reshape([64, DIM])
        none = gl.to_tensor(0)
        level, start, end, last_block = _next_tile(none, none, none, none, slots_ptr, ends_ptr, NUM_LEVELS)
        mbarrier.wait(query_full.index(place), turn // QUERIES & 1)
        if start < end:
            stage = tile % STAGES
            full = tile // STAGES & 1
            mbarrier.wait(key_full.index(stage), full)
            if level > 1:
                fence_async_shared()
            key = keys.index(stage).reshape([128, DIM]).permute([1, 0])
            scores = warpgroup_mma(query, key, no_scores, use_acc=False)
            mbarrier.arrive(key_empty.index(stage), count=1)
            weights, decay, row_max, row_sum = _weigh(
                scores, row_max, row_sum, level, start, end, last_block, kv_len, num_kv_blocks, scale_log2, dtype,
                weights_layout,
            )  # fmt: skip
            value_level = level
            level, start, end, last_block = _next_tile(level, start, end, last_block, slots_ptr, ends_ptr, NUM_LEVELS)
            while start < end:
                # The scores of this tile, and behind them what the values of the last one give.
                next_stage = (tile + 1) % STAGES
                next_full = (tile + 1) // STAGES & 1
                mbarrier.wait(key_full.index(next_stage), next_full)
                if level > 1:
                    fence_async_shared()
                key = keys.index(next_stage).reshape([128, DIM]).permute([1, 0])
                scores = warpgroup_mma(query, key, no_scores, use_acc=False, is_async=True)
                mbarrier.wait(value_full.index(stage), full)
                if value_level > 1:
                    fence_async_shared()
                value_level = level
                summed = warpgroup_mma(weights, values.index(stage).reshape([128, DIM]), acc, is_async=True)
                scores = warpgroup_mma_wait(1, deps=[scores])
                mbarrier.arrive(key_empty.index(next_stage), count=1)
                weights, decay, row_max, row_sum = _weigh(
                    scores, row_max, row_sum, level, start, end, last_block, kv_len, num_kv_blocks, scale_log2, dtype,
                    weights_layout,
                )  # fmt: skip
                level, start, end, last_block = _next_tile(
                    level, start, end, last_block, slots_ptr, ends_ptr, NUM_LEVELS
                )
                acc = warpgroup_mma_wait(0, deps=[summed])
                mbarrier.arrive(value_empty.index(stage), count=1)
                acc = acc * gl.convert_layout(decay, out_rows_layout)[:, None]
                tile += 1
                stage, full = next_stage, next_full
            mbarrier.arrive(query_empty.index(place), count=1)
            mbarrier.wait(value_full.index(stage), full)
            if value_level > 1:
                fence_async_shared()
            acc = warpgroup_mma(weights, values.index(stage).reshape([128, DIM]), acc)
            mbarrier.arrive(value_empty.index(stage), count=1)
            tile += 1
        else:
            mbarrier.arrive(query_empty.index(place), count=1)

        q_block = plan_row % num_q_blocks
        head = plan_row // num_q_blocks % num_heads
        batch = plan_row // (num_q_blocks * num_heads)
        has_read = row_sum != 0  # true for NaN too: what is not a number shows
        row_sum = gl.where(has_read, row_sum, 1.0)
        lse = gl.where(has_read, (row_max + gl.log2(row_sum)) * 0.6931471805599453, float("-inf"))
        lse_token = q_block * 128 + PART * 64 + gl.arange(0, 64, rows_layout)
        gl.store(lse_ptr + (batch.to(gl.int64) * num_heads + head) * q_len + lse_token, lse, mask=lse_token < q_len)
        out = acc * gl.convert_layout(1.0 / row_sum, out_rows_layout)[:, None]
        token = q_block * 128 + PART * 64 + gl.arange(0, 64, out_rows_layout)
        dim = gl.arange(0, DIM, gl.SliceLayout(0, acc_layout))
        offset = token.to(gl.int64)[:, None] * out_strides[2] + dim.to(gl.int64)[None, :] * out_strides[3]
        out_head_ptr = out_ptr + batch.to(gl.int64) * out_strides[0] + head.to(gl.int64) * out_strides[1]
        mask = (token < q_len)[:, None] & (dim < HEAD_DIM)[None, :]
        gl.store(out_head_ptr + offset, out.to(dtype), mask=mask)


@gluon.jit(
    do_not_specialize=[
        "num_heads",
        "group",
        "q_len",
        "kv_len",
        "num_q_blocks",
        "num_kv_blocks",
        "num_work",
        "pooled_rows",
        "pooled_half",
    ]
)
def _forward_kernel(
    query_tma, key_tma, value_tma, pooled_ptr, order_ptr, indices_ptr, plan_offsets_ptr, out_ptr, lse_ptr, out_strides,
    num_heads, group, q_len, kv_len, num_q_blocks, num_kv_blocks, num_work, pooled_rows, pooled_half, scale_log2,
    NUM_LEVELS: gl.constexpr, HEAD_DIM: gl.constexpr, DIM: gl.constexpr, STAGES: gl.constexpr, QUERIES: gl.constexpr,
    LOAD_REGISTERS: gl.constexpr, COMPUTE_REGISTERS: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = key_tma.dtype
    queries = gl.allocate_shared_memory(dtype, [2 * QUERIES, 1, 1, 64, DIM], query_tma.layout)
    keys = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, 128, DIM], key_tma.layout)
    values = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, 128, DIM], key_tma.layout)
    barriers: gl.constexpr = mbarrier.MBarrierLayout()
    query_full = gl.allocate_shared_memory(gl.int64, [QUERIES, 1], barriers)
    query_empty = gl.allocate_shared_memory(gl.int64, [QUERIES, 1], barriers)
    key_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barriers)
    key_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barriers)
    value_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barriers)
    value_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barriers)
    for i in gl.static_range(QUERIES):
        mbarrier.init(query_full.index(i), count=1)
        mbarrier.init(query_empty.index(i), count=2)
    # Empty once both groups say so. Full after 129 arrivals: of 128 threads that copy rows and one more of them all, or
    # of a descriptor's copy and one that stands for the 128.
    for i in gl.static_range(STAGES):
        mbarrier.init(key_full.index(i), count=129)
        mbarrier.init(key_empty.index(i), count=2)
        mbarrier.init(value_full.index(i), count=129)
        mbarrier.init(value_empty.index(i), count=2)
    UPPER: gl.constexpr = 0
    LOWER: gl.constexpr = 1
    gl.warp_specialize(
        [
            (
                _compute,
                (
                    order_ptr, indices_ptr, plan_offsets_ptr, out_ptr, lse_ptr, out_strides,
                    queries, keys, values, query_full, query_empty, key_full, key_empty, value_full, value_empty,
                    num_heads, q_len, kv_len, num_q_blocks, num_kv_blocks, num_work, scale_log2,
                    UPPER, NUM_LEVELS, HEAD_DIM, DIM, STAGES, QUERIES,
                ),
            ),
            (
                _compute,
                (
                    order_ptr, indices_ptr, plan_offsets_ptr, out_ptr, lse_ptr, out_strides,
                    queries, keys, values, query_full, query_empty, key_full, key_empty, value_full, value_empty,
                    num_heads, q_len, kv_len, num_q_blocks, num_kv_blocks, num_work, scale_log2,
                    LOWER, NUM_LEVELS, HEAD_DIM, DIM, STAGES, QUERIES,
                ),
            ),
            (
                _load,
                (
                    query_tma, key_tma, value_tma, pooled_ptr, order_ptr, indices_ptr, plan_offsets_ptr,
                    queries, keys, values, query_full, query_empty, key_full, key_empty, value_full, value_empty,
                    num_heads, group, kv_len, num_q_blocks, num_kv_blocks, num_work, pooled_rows,
                    pooled_half, NUM_LEVELS, HEAD_DIM, DIM, STAGES, QUERIES,
                ),
            ),
        ],
        [4, 4],
        [COMPUTE_REGISTERS, LOAD_REGISTERS],
    )  # fmt: skip


def _descriptor(x: Tensor, rows: int, dim_tile: int) -> TensorDescriptor:
    """Tiles of rows through TMA."""
    dtype = gl.bfloat16 if x.dtype == torch.bfloat16 else gl.float16
    block = [1, 1, rows, dim_tile]
    return TensorDescriptor(
        x, list(x.shape), list(x.stride()), block, gl.NVMMASharedLayout.get_default_for(block, dtype)
    )


def _dim_tile(head_dim: int) -> int:
    return int(max(64, triton.next_power_of_2(head_dim)))


def shared_memory(head_dim: int, element_size: int) -> int:
    """Bytes that a program takes: the rings, and eight bytes for each of their barriers, aligned."""
    return (_QUERY_TILES + 2 * _STAGES) * BLOCK * _dim_tile(head_dim) * element_size + 1024


def takes(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kv_lengths: Tensor | None,
    block_q: int,
    block_kv: int,
    num_levels: int,
    is_causal: bool,
    scale: float,
) -> bool:
    """Whether the kernel can compute a call, and is the faster one for it.

    Up to head_dim 64 three programs of the other kernel share a multiprocessor, and it wins.
    """
    if num_levels > MOST_LEVELS:
        return False
    if not is_hopper(query.device) or query.dtype not in (torch.float16, torch.bfloat16):
        return False
    head_dim = query.shape[3]
    if (block_q, block_kv) != (BLOCK, BLOCK) or not 64 < head_dim <= 128 or head_dim % 8:
        return False
    if is_causal or kv_lengths is not None or scale <= 0 or 0 in query.shape or 0 in key.shape:
        return False
    if key.shape[2] * head_dim >= 2**30:  # offsets of pooled rows are of 32 bits
        return False
    if shared_memory(head_dim, query.element_size()) > shared_memory_limit(query.device):
        return False
    return all(can_copy_by_descriptor(x) for x in (query, key, value))


def launch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pooled: Tensor,
    order: Tensor,
    indices: Tensor,
    offsets: Tensor,
    out: Tensor,
    lse: Tensor,
    scale_log2: float,
) -> None:
    """Compute ``out`` and ``lse`` of a call that :func:`takes` takes.

    Args:
        query, key, value: ``[B, H, q_len, D]``, ``[B, H_kv, kv_len, D]``.
        pooled: ``[2, B, H_kv, rows, D]``, contiguous: the pooled levels of keys and of values.
        order: rows of the plan in the order to start them.
        indices, offsets: the plan, contiguous.
        out: ``[B, H, q_len, D]``.
        lse: ``[B, H, q_len]``, contiguous.
        scale_log2: what makes a score a logit in base 2.
    """
    batch, heads, q_len, head_dim = query.shape
    num_q_blocks, num_kv_blocks = indices.shape[2:]
    num_work = batch * heads * num_q_blocks
    dim_tile = _dim_tile(head_dim)
    descriptors = [_descriptor(x, rows, dim_tile) for x, rows in ((query, BLOCK // 2), (key, BLOCK), (value, BLOCK))]
    _forward_kernel[(min(num_work, num_multiprocessors(query.device)),)](
        *descriptors, pooled, order, indices, offsets, out, lse, out.stride(),
        heads, heads // key.shape[1], q_len, key.shape[2], num_q_blocks, num_kv_blocks, num_work, pooled.shape[3],
        pooled.stride(0), scale_log2,
        NUM_LEVELS=offsets.shape[3] - 1, HEAD_DIM=head_dim, DIM=dim_tile, STAGES=_STAGES, QUERIES=_QUERY_TILES,
        LOAD_REGISTERS=_LOAD_REGISTERS, COMPUTE_REGISTERS=_COMPUTE_REGISTERS, num_warps=4,
    )  # fmt: skip
