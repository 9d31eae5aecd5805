"""What the warps do that compute, in the forward kernel for Hopper, and the kernel of them all.

See :mod:`psa_kernels.pyramid_attention.hopper_fwd`.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from psa_kernels.pyramid_attention.hopper_loads import (
    gather_tiles,
    level_ends,
    load_tiles,
    place_of,
    store_tile,
    wait_for_row,
)


@gluon.jit
def _missing_rows(last_block, kv_len, level, LOG2_BLOCK_KV: gl.constexpr):
    """Rows that the last block of a level lacks of those which stand for as many tokens as any, and the tokens that
    the first of them stands for. Only the sequence's last block lacks any."""
    rows = 1 << (LOG2_BLOCK_KV + 1 - level)
    tokens = kv_len - (last_block << LOG2_BLOCK_KV)
    whole = gl.minimum(tokens >> (level - 1), rows)
    return rows - whole, gl.where(whole < rows, tokens - (whole << (level - 1)), 0)


@gluon.jit
def _without_missing(scores, column, edge, missing, left, level, scale_log2):
    """Scores of a level whose last block ends ahead of column ``edge``: -inf for the rows that it lacks, and less where
    one stands for fewer tokens. A level's slots are sorted by block."""
    if missing > 0:
        less = (gl.log2(left.to(gl.float32)) - (level - 1).to(gl.float32)) / scale_log2
        partial = edge - missing
        scores = gl.where((column == partial)[None, :], scores + less, scores)
        scores = gl.where(((column > partial) & (column < edge))[None, :], float("-inf"), scores)
    return scores


@gluon.jit
def _end_level(
    scores, level, start, end, last_block, slots_ptr, ends_ptr, kv_len, scale_log2,
    BOX_LEVELS: gl.constexpr, LOG2_BLOCK_KV: gl.constexpr,
):  # fmt: skip
    """Scores of a tile in which a level ends: of the levels after it more by what their rows stand for, of rows that do
    not exist -inf."""
    missing, left = _missing_rows(last_block, kv_len, level, LOG2_BLOCK_KV)
    edge = end - start  # the column in which the rows of the level end
    if (edge < 128) | (missing > 0):
        column = gl.arange(0, 128, gl.SliceLayout(0, scores.type.layout))
        scores = _without_missing(scores, column, edge, missing, left, level, scale_log2)
        coarser = level
        while (edge < 128) & (coarser < BOX_LEVELS):
            coarser += 1
            first, last = level_ends(ends_ptr, coarser)
            if first < last:
                more = (coarser - level).to(gl.float32) / scale_log2
                scores = gl.where((column >= edge)[None, :], scores + more, scores)
                level = coarser
                edge += (last - first) << (LOG2_BLOCK_KV + 1 - level)
                missing, left = _missing_rows(gl.load(slots_ptr + last - 1), kv_len, level, LOG2_BLOCK_KV)
                scores = _without_missing(scores, column, edge, missing, left, level, scale_log2)
        scores = gl.where((column < edge)[None, :], scores, float("-inf"))
    return scores


@gluon.jit
def _next_tile(
    level, start, end, last_block, slots_ptr, ends_ptr,
    NUM_LEVELS: gl.constexpr, BOX_LEVELS: gl.constexpr, LOG2_BLOCK_KV: gl.constexpr,
):  # fmt: skip
    """Where the tile after ``start`` starts, its level and where that ends, in rows counted through the level's slots,
    and the level's last block. There is none when ``start`` is not below ``end``."""
    start += 128
    while (start >= end) & (level < NUM_LEVELS):
        # Rows of the next level that the tile before has, where levels share tiles.
        had = gl.where(level < BOX_LEVELS, start - end, 0)
        level += 1
        first, last = level_ends(ends_ptr, level)
        start, end = (first << (LOG2_BLOCK_KV + 1 - level)) + had, last << (LOG2_BLOCK_KV + 1 - level)
        last_block = gl.load(slots_ptr + gl.maximum(last - 1, 0))
    return level, start, end, last_block


@gluon.jit
def _weigh(
    scores, row_max, row_sum, level, start, end, last_block, slots_ptr, ends_ptr, kv_len, scale_log2,
    BOX_LEVELS: gl.constexpr, LOG2_BLOCK_KV: gl.constexpr, DTYPE: gl.constexpr, WEIGHTS_LAYOUT: gl.constexpr,
):  # fmt: skip
    """Weights of a tile as an operand, the new statistics, and by how much what has been summed decays."""
    bias = (level - 1).to(gl.float32)
    if start + 128 >= end:
        scores = _end_level(
            scores, level, start, end, last_block, slots_ptr, ends_ptr, kv_len, scale_log2, BOX_LEVELS, LOG2_BLOCK_KV
        )
    new_max = gl.maximum(row_max, gl.max(scores, axis=1) * scale_log2 + bias)
    weights = gl.exp2(scores * scale_log2 - (new_max - bias)[:, None])
    decay = gl.exp2(row_max - new_max)
    row_sum = row_sum * decay + gl.sum(weights, axis=1)
    return gl.convert_layout(weights.to(DTYPE), WEIGHTS_LAYOUT), decay, new_max, row_sum


@gluon.jit
def _product(left, right, acc, use_acc: gl.constexpr, is_gathered):
    """Start ``left @ right + acc`` with a tile in shared memory."""
    if is_gathered:
        fence_async_shared()  # what threads wrote becomes visible to the tensor cores
    return warpgroup_mma(left, right, acc, use_acc=use_acc, is_async=True)


@gluon.jit
def _attend(
    tile, query, keys, values, key_full, key_empty, value_full, value_empty, slots_ptr, ends_ptr, kv_len, scale_log2,
    NUM_LEVELS: gl.constexpr, BOX_LEVELS: gl.constexpr, LOG2_BLOCK_KV: gl.constexpr, DIM: gl.constexpr,
    KEYS: gl.constexpr, VALUES: gl.constexpr,
):  # fmt: skip
    """Half a query block against all its tiles: the weighted sum [64, DIM], and each row's maximum and sum.

    While the weights of a tile are worked out, the tensor cores multiply those of the one before with its values.
    """
    scores_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16])
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DIM, 16])
    weights_layout: gl.constexpr = gl.DotOperandLayout(0, acc_layout, 2)
    rows_layout: gl.constexpr = gl.SliceLayout(1, scores_layout)
    out_rows_layout: gl.constexpr = gl.SliceLayout(1, acc_layout)
    row_max = gl.full([64], float("-inf"), gl.float32, rows_layout)
    row_sum = gl.full([64], 0.0, gl.float32, rows_layout)
    acc = gl.full([64, DIM], 0.0, gl.float32, acc_layout)
    no_scores = gl.full([64, 128], 0.0, gl.float32, scores_layout)
    none = gl.to_tensor(0)
    level, start, end, last_block = _next_tile(
        none, gl.to_tensor(-128), none, none, slots_ptr, ends_ptr, NUM_LEVELS, BOX_LEVELS, LOG2_BLOCK_KV
    )
    if start < end:
        stage = tile % KEYS
        mbarrier.wait(key_full.index(stage), tile // KEYS & 1)
        key = keys.index(stage).reshape([128, DIM]).permute([1, 0])
        scores = warpgroup_mma_wait(0, deps=[_product(query, key, no_scores, False, level > BOX_LEVELS)])
        mbarrier.arrive(key_empty.index(stage), count=1)
        weights, decay, row_max, row_sum = _weigh(
            scores, row_max, row_sum, level, start, end, last_block, slots_ptr, ends_ptr, kv_len, scale_log2,
            BOX_LEVELS, LOG2_BLOCK_KV, keys.dtype, weights_layout,
        )  # fmt: skip
        is_gathered = level > BOX_LEVELS
        level, start, end, last_block = _next_tile(
            level, start, end, last_block, slots_ptr, ends_ptr, NUM_LEVELS, BOX_LEVELS, LOG2_BLOCK_KV
        )
        while start < end:
            # The scores of the next tile, and behind them what the values of this one give.
            key_stage = (tile + 1) % KEYS
            value_stage = tile % VALUES
            mbarrier.wait(key_full.index(key_stage), (tile + 1) // KEYS & 1)
            key = keys.index(key_stage).reshape([128, DIM]).permute([1, 0])
            scores = _product(query, key, no_scores, False, level > BOX_LEVELS)
            mbarrier.wait(value_full.index(value_stage), tile // VALUES & 1)
            summed = _product(weights, values.index(value_stage).reshape([128, DIM]), acc, True, is_gathered)
            is_gathered = level > BOX_LEVELS
            scores = warpgroup_mma_wait(1, deps=[scores])
            mbarrier.arrive(key_empty.index(key_stage), count=1)
            weights, decay, row_max, row_sum = _weigh(
                scores, row_max, row_sum, level, start, end, last_block, slots_ptr, ends_ptr, kv_len, scale_log2,
                BOX_LEVELS, LOG2_BLOCK_KV, keys.dtype, weights_layout,
            )  # fmt: skip
            level, start, end, last_block = _next_tile(
                level, start, end, last_block, slots_ptr, ends_ptr, NUM_LEVELS, BOX_LEVELS, LOG2_BLOCK_KV
            )
            acc = warpgroup_mma_wait(0, deps=[summed])
            mbarrier.arrive(value_empty.index(value_stage), count=1)
            acc = acc * gl.convert_layout(decay, out_rows_layout)[:, None]
            tile += 1
        value_stage = tile % VALUES
        mbarrier.wait(value_full.index(value_stage), tile // VALUES & 1)
        summed = _product(weights, values.index(value_stage).reshape([128, DIM]), acc, True, is_gathered)
        acc = warpgroup_mma_wait(0, deps=[summed])
        mbarrier.arrive(value_empty.index(value_stage), count=1)
        tile += 1
    return tile, acc, row_max, row_sum


@gluon.jit
def _compute(
    given, PART: gl.constexpr, NUM_LEVELS: gl.constexpr, BOX_LEVELS: gl.constexpr, LOG2_BLOCK_KV: gl.constexpr,
    DIM: gl.constexpr, KEYS: gl.constexpr, VALUES: gl.constexpr, QUERIES: gl.constexpr,
):  # fmt: skip
    """What a group of four warps does: one half of each query block."""
    (
        indices_ptr, plan_offsets_ptr, out_tma, lse_ptr,
        queries, keys, values, query_full, query_empty, plan_rows, key_full, key_empty, value_full, value_empty,
        num_heads, q_len, kv_len, num_q_blocks, num_kv_blocks, scale_log2,
    ) = given  # fmt: skip
    tile = 0
    turn = 0
    plan_row = wait_for_row(plan_rows, query_full, turn, QUERIES, 4)
    while plan_row >= 0:
        slots_ptr = indices_ptr + plan_row.to(gl.int64) * num_kv_blocks
        ends_ptr = plan_offsets_ptr + plan_row.to(gl.int64) * (NUM_LEVELS + 1)
        place = turn % QUERIES
        query = queries.index(place * 2 + PART).reshape([64, DIM])
        tile, acc, row_max, row_sum = _attend(
            tile, query, keys, values, key_full, key_empty, value_full, value_empty, slots_ptr, ends_ptr, kv_len,
            scale_log2, NUM_LEVELS, BOX_LEVELS, LOG2_BLOCK_KV, DIM, KEYS, VALUES,
        )  # fmt: skip

        batch, head, q_block = place_of(plan_row, num_heads, num_q_blocks)
        rows_layout: gl.constexpr = row_sum.type.layout
        out_rows_layout: gl.constexpr = gl.SliceLayout(1, acc.type.layout)
        has_read = row_sum != 0  # true for NaN too: what is not a number shows
        row_sum = gl.where(has_read, row_sum, 1.0)
        lse = gl.where(has_read, (row_max + gl.log2(row_sum)) * 0.6931471805599453, float("-inf"))
        lse_token = q_block * 128 + PART * 64 + gl.arange(0, 64, rows_layout)
        gl.store(lse_ptr + (batch.to(gl.int64) * num_heads + head) * q_len + lse_token, lse, mask=lse_token < q_len)
        # Through the place of the queries, which nothing reads any more.
        out = acc * gl.convert_layout(1.0 / row_sum, out_rows_layout)[:, None]
        query.store(out.to(out_tma.dtype))
        fence_async_shared()
        store_tile(out_tma, [batch, head, q_block * 128 + PART * 64, 0], queries.index(place * 2 + PART))
        tma.store_wait(0)
        mbarrier.arrive(query_empty.index(place), count=1)
        turn += 1
        plan_row = wait_for_row(plan_rows, query_full, turn, QUERIES, 4)


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
        "sequences",
    ]
)
def _forward_kernel(
    query_tma, out_tma, key_tma, value_tma, level_2_tma, level_3_tma, level_4_tma, level_5_tma,
    pooled_ptr, order_ptr, next_ptr, indices_ptr, plan_offsets_ptr, lse_ptr,
    num_heads, group, q_len, kv_len, num_q_blocks, num_kv_blocks, num_work, pooled_rows, sequences, scale_log2,
    NUM_LEVELS: gl.constexpr, BOX_LEVELS: gl.constexpr, LOG2_BLOCK_KV: gl.constexpr, HEAD_DIM: gl.constexpr,
    DIM: gl.constexpr, KEYS: gl.constexpr, VALUES: gl.constexpr, QUERIES: gl.constexpr,
    LOAD_REGISTERS: gl.constexpr, COMPUTE_REGISTERS: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = key_tma.dtype
    key_tmas = (key_tma, level_2_tma, level_3_tma, level_4_tma, level_5_tma)
    value_tmas = (value_tma, level_2_tma, level_3_tma, level_4_tma, level_5_tma)
    queries = gl.allocate_shared_memory(dtype, [2 * QUERIES, 1, 1, 64, DIM], query_tma.layout)
    keys = gl.allocate_shared_memory(dtype, [KEYS, 1, 1, 128, DIM], key_tma.layout)
    values = gl.allocate_shared_memory(dtype, [VALUES, 1, 1, 128, DIM], key_tma.layout)
    barriers: gl.constexpr = mbarrier.MBarrierLayout()
    query_full = gl.allocate_shared_memory(gl.int64, [QUERIES, 1], barriers)
    query_empty = gl.allocate_shared_memory(gl.int64, [QUERIES, 1], barriers)
    plan_rows = gl.allocate_shared_memory(gl.int32, [QUERIES, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    key_full = gl.allocate_shared_memory(gl.int64, [KEYS, 1], barriers)
    key_empty = gl.allocate_shared_memory(gl.int64, [KEYS, 1], barriers)
    value_full = gl.allocate_shared_memory(gl.int64, [VALUES, 1], barriers)
    value_empty = gl.allocate_shared_memory(gl.int64, [VALUES, 1], barriers)
    keys_to_gather = gl.allocate_shared_memory(gl.int64, [KEYS, 1], barriers)
    values_to_gather = gl.allocate_shared_memory(gl.int64, [VALUES, 1], barriers)
    # Which row of the plan is next the warp that loads queries takes from a counter, so that programs with little work
    # take more of them, and says it with the queries; their place is empty once all warps have read it.
    # Empty once both groups say so. Full once the warp with the descriptors has said so and its bytes are there; where
    # threads gather rows too, also once each of these has, or that warp in their place.
    GATHER_THREADS: gl.constexpr = 128 if NUM_LEVELS > BOX_LEVELS else 0
    for i in gl.static_range(QUERIES):
        mbarrier.init(query_full.index(i), count=2)
        mbarrier.init(query_empty.index(i), count=4 if GATHER_THREADS > 0 else 3)
    for i in gl.static_range(KEYS):
        mbarrier.init(key_full.index(i), count=GATHER_THREADS + 1)
        mbarrier.init(key_empty.index(i), count=2)
        mbarrier.init(keys_to_gather.index(i), count=1)
    for i in gl.static_range(VALUES):
        mbarrier.init(value_full.index(i), count=GATHER_THREADS + 1)
        mbarrier.init(value_empty.index(i), count=2)
        mbarrier.init(values_to_gather.index(i), count=1)
    UPPER: gl.constexpr = 0
    LOWER: gl.constexpr = 1
    IS_KEYS: gl.constexpr = True
    IS_VALUES: gl.constexpr = False
    key_sequence = gl.to_tensor(0)
    compute = (
        indices_ptr, plan_offsets_ptr, out_tma, lse_ptr,
        queries, keys, values, query_full, query_empty, plan_rows, key_full, key_empty, value_full, value_empty,
        num_heads, q_len, kv_len, num_q_blocks, num_kv_blocks, scale_log2,
    )  # fmt: skip
    load_keys = (
        order_ptr, next_ptr, indices_ptr, plan_offsets_ptr, key_tmas, query_tma, queries, query_full, query_empty,
        plan_rows, keys, key_full, key_empty, keys_to_gather,
        num_heads, group, num_q_blocks, num_kv_blocks, num_work, key_sequence,
    )  # fmt: skip
    load_values = (
        order_ptr, next_ptr, indices_ptr, plan_offsets_ptr, value_tmas, query_tma, queries, query_full, query_empty,
        plan_rows, values, value_full, value_empty, values_to_gather,
        num_heads, group, num_q_blocks, num_kv_blocks, num_work, sequences,
    )  # fmt: skip
    gather = (
        indices_ptr, plan_offsets_ptr, pooled_ptr, query_full, query_empty, plan_rows,
        keys, key_full, keys_to_gather, values, value_full, values_to_gather,
        num_heads, group, kv_len, num_q_blocks, num_kv_blocks, pooled_rows, sequences,
    )  # fmt: skip
    if GATHER_THREADS > 0:
        gl.warp_specialize(
            [
                (_compute, (compute, UPPER, NUM_LEVELS, BOX_LEVELS, LOG2_BLOCK_KV, DIM, KEYS, VALUES, QUERIES)),
                (_compute, (compute, LOWER, NUM_LEVELS, BOX_LEVELS, LOG2_BLOCK_KV, DIM, KEYS, VALUES, QUERIES)),
                (load_tiles, (load_keys, IS_KEYS, NUM_LEVELS, BOX_LEVELS, LOG2_BLOCK_KV, DIM, KEYS, QUERIES)),
                (load_tiles, (load_values, IS_VALUES, NUM_LEVELS, BOX_LEVELS, LOG2_BLOCK_KV, DIM, VALUES, QUERIES)),
                (gather_tiles, (gather, NUM_LEVELS, BOX_LEVELS, LOG2_BLOCK_KV, HEAD_DIM, DIM, KEYS, VALUES, QUERIES)),
            ],
            [4, 1, 1, 4],
            [COMPUTE_REGISTERS, LOAD_REGISTERS, LOAD_REGISTERS, LOAD_REGISTERS],
        )
    else:
        gl.warp_specialize(
            [
                (_compute, (compute, UPPER, NUM_LEVELS, BOX_LEVELS, LOG2_BLOCK_KV, DIM, KEYS, VALUES, QUERIES)),
                (_compute, (compute, LOWER, NUM_LEVELS, BOX_LEVELS, LOG2_BLOCK_KV, DIM, KEYS, VALUES, QUERIES)),
                (load_tiles, (load_keys, IS_KEYS, NUM_LEVELS, BOX_LEVELS, LOG2_BLOCK_KV, DIM, KEYS, QUERIES)),
                (load_tiles, (load_values, IS_VALUES, NUM_LEVELS, BOX_LEVELS, LOG2_BLOCK_KV, DIM, VALUES, QUERIES)),
            ],
            [4, 1, 1],
            [COMPUTE_REGISTERS, LOAD_REGISTERS, LOAD_REGISTERS],
        )
