"""What the forward kernel for Hopper runs on the device: see :mod:`psa_kernels.pyramid_attention.hopper_fwd`."""

import triton
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

# Gluon is young and its functions change: of another Triton's nothing is known here.
if not (3, 6) <= tuple(int(part) for part in triton.__version__.split(".")[:2]) <= (3, 9):
    raise ImportError(f"the kernel for Hopper compiles with Triton 3.6 to 3.9, this is {triton.__version__}")
# The same functions by the names of Triton 3.9 and of 3.6.
_copy_tile = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
_store_tile = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global
_reinterpret = getattr(gl.shared_memory_descriptor, "reinterpret", None) or gl.shared_memory_descriptor._reinterpret
_copy_elements = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared


@gluon.jit
def _level_ends(ends_ptr, level):
    return gl.load(ends_ptr + level - 1), gl.load(ends_ptr + level)


@gluon.jit
def _tiles(first, last, log2_rows):
    """Tiles that the blocks in slots ``first`` to ``last`` fill, of ``2**log2_rows`` rows each."""
    return (((last - first) << log2_rows) + 127) >> 7


@gluon.jit
def _level_rows(kv_len, level):
    """Rows of a pooled level, by which the next level's start further on."""
    return (kv_len + (1 << (level - 1)) - 1) >> (level - 1)


@gluon.jit
def _place(plan_row, num_heads, num_q_blocks):
    """Batch, head and query block of a row of the plan."""
    return plan_row // (num_q_blocks * num_heads), plan_row // num_q_blocks % num_heads, plan_row % num_q_blocks


@gluon.jit
def _wait_for_row(plan_rows, query_full, turn, QUERIES: gl.constexpr, NUM_WARPS: gl.constexpr):
    """The row of the plan that the program's turn ``turn`` is for, negative when there is none left; its queries have
    arrived."""
    place = turn % QUERIES
    mbarrier.wait(query_full.index(place), turn // QUERIES & 1)
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [NUM_WARPS], [0])
    return gl.max(plan_rows.index(place).load(layout), axis=0)


@gluon.jit
def _announce_row(plan_rows, query_full, place, plan_row):
    """Tell the other warps what the next turn is for."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    plan_rows.index(place).store(gl.full([1], 0, gl.int32, layout) + plan_row)
    mbarrier.arrive(query_full.index(place), count=1)


@gluon.jit
def _next_row(order_ptr, next_ptr, num_work):
    """Take the next row of the plan that nobody has taken, negative when there is none left."""
    work = gl.atomic_add(next_ptr, 1, sem="relaxed")
    return gl.load(order_ptr + work, mask=work < num_work, other=-1)


@gluon.jit
def _boxes(slots_ptr, slot, first_place, last, num_kv_blocks, ROWS: gl.constexpr):
    """First rows of the blocks that a level has in a tile, int32 each, counted from the level's own first row, and in
    which places there are any: those from ``first_place`` on, as far as slots from ``slot`` to ``last`` go."""
    rows = ()
    there = ()
    for place in gl.static_range(128 // ROWS):
        is_there = (place >= first_place) & (slot + place - first_place < last)
        block = gl.load(slots_ptr + slot + place - first_place, mask=is_there, other=num_kv_blocks)
        rows += (block * ROWS,)
        there += (is_there,)
    return rows, there


@gluon.constexpr_function
def _boxes_shape(count, box_shape):
    """The shape of a ring as ``count`` boxes."""
    return [count, *box_shape]


@gluon.jit
def _copy_boxes(
    stage, rows, there, ring, full, source_tma, sequence, ROWS: gl.constexpr, DIM: gl.constexpr, STAGES: gl.constexpr
):  # fmt: skip
    """Copy blocks of ``ROWS`` rows to their places of a tile [128, DIM].

    In a tile 64 columns lie together, row after row: a box of a block's rows and 64 columns fills bytes that follow
    each other, and every block has its place.
    """
    PLACES: gl.constexpr = 128 // ROWS
    PARTS: gl.constexpr = DIM // 64
    boxes = _reinterpret(
        ring, source_tma.dtype, _boxes_shape(STAGES * PARTS * PLACES, source_tma.block_shape), source_tma.layout
    )
    for place in gl.static_range(PLACES):
        for part in gl.static_range(PARTS):
            box = boxes.index((stage * PARTS + part) * PLACES + place)
            corner = (rows[place], part * 64)
            _copy_tile(source_tma, sequence + corner, full.index(stage), box, pred=there[place])


@gluon.jit
def _copy_level(
    tile, filled, ring, full, empty, source_tma, sequence, slots_ptr, first, last, num_kv_blocks,
    ROWS: gl.constexpr, DIM: gl.constexpr, STAGES: gl.constexpr, GATHER_THREADS: gl.constexpr,
):  # fmt: skip
    """Fill tiles of a ring with the blocks of a level in slots ``first`` to ``last``, of ``ROWS`` rows each, from row
    ``filled`` of a tile on, and return where the next level goes on. As blocks become smaller from level to level,
    they always fit."""
    PLACES: gl.constexpr = 128 // ROWS
    slot = first
    while slot < last:
        # Before the tile is free: a block's number takes as long to come as half a tile to compute.
        first_place = filled // ROWS
        rows, there = _boxes(slots_ptr, slot, first_place, last, num_kv_blocks, ROWS)
        stage = tile % STAGES
        if filled == 0:
            mbarrier.wait(empty.index(stage), (tile // STAGES & 1) ^ 1)
            mbarrier.expect(full.index(stage), 128 * DIM * 2)
            if GATHER_THREADS > 0:  # none of them has a part in this tile
                mbarrier.arrive(full.index(stage), count=GATHER_THREADS)
        _copy_boxes(stage, rows, there, ring, full, source_tma, sequence, ROWS, DIM, STAGES)
        taken = gl.minimum(PLACES - first_place, last - slot)
        slot += taken
        filled += taken * ROWS
        tile += filled >> 7
        filled &= 127
    return tile, filled


@gluon.jit
def _fill_up(
    tile, filled, ring, full, source_tma, sequence, slots_ptr, num_kv_blocks,
    ROWS: gl.constexpr, DIM: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Zeros in a tile from row ``filled`` on, which a descriptor reads past a level's last block."""
    if filled > 0:
        rows = ()
        there = ()
        for place in gl.static_range(128 // ROWS):
            rows += (num_kv_blocks * ROWS,)
            there += (place * ROWS >= filled,)
        _copy_boxes(tile % STAGES, rows, there, ring, full, source_tma, sequence, ROWS, DIM, STAGES)
        tile += 1
    return tile


@gluon.jit
def _load(
    given, IS_KEYS: gl.constexpr, NUM_LEVELS: gl.constexpr, BOX_LEVELS: gl.constexpr, LOG2_BLOCK_KV: gl.constexpr,
    DIM: gl.constexpr, STAGES: gl.constexpr, QUERIES: gl.constexpr,
):  # fmt: skip
    """What the warp does that loads queries and keys by descriptor, and the one that loads values."""
    GATHER_THREADS: gl.constexpr = 128 if NUM_LEVELS > BOX_LEVELS else 0
    (
        order_ptr, next_ptr, indices_ptr, plan_offsets_ptr, tmas, query_tma, queries, query_full, query_empty,
        plan_rows, ring, full, empty, to_gather,
        num_heads, group, num_q_blocks, num_kv_blocks, num_work, first_sequence,
    ) = given  # fmt: skip
    tile = 0
    turn = 0
    if IS_KEYS:
        plan_row = _next_row(order_ptr, next_ptr, num_work)
    else:
        plan_row = _wait_for_row(plan_rows, query_full, turn, QUERIES, 1)
    while plan_row >= 0:
        place = turn % QUERIES
        batch, head, q_block = _place(plan_row, num_heads, num_q_blocks)
        kv_head = head // group
        slots_ptr = indices_ptr + plan_row.to(gl.int64) * num_kv_blocks
        ends_ptr = plan_offsets_ptr + plan_row.to(gl.int64) * (NUM_LEVELS + 1)

        if IS_KEYS:
            mbarrier.wait(query_empty.index(place), (turn // QUERIES & 1) ^ 1)
            mbarrier.expect(query_full.index(place), 128 * DIM * 2)
            for half in gl.static_range(2):
                _copy_tile(
                    query_tma, [batch, head, q_block * 128 + half * 64, 0], query_full.index(place),
                    queries.index(place * 2 + half),
                )  # fmt: skip
            _announce_row(plan_rows, query_full, place, plan_row)
        else:
            mbarrier.arrive(query_empty.index(place), count=1)

        filled = 0  # rows of the tile that the levels before have filled
        for level in gl.static_range(1, BOX_LEVELS + 1):
            first, last = _level_ends(ends_ptr, level)
            sequence = (batch, kv_head) if level == 1 else (first_sequence + batch * (num_heads // group) + kv_head,)
            tile, filled = _copy_level(
                tile, filled, ring, full, empty, tmas[level - 1], sequence, slots_ptr, first, last, num_kv_blocks,
                (1 << LOG2_BLOCK_KV) >> (level - 1), DIM, STAGES, GATHER_THREADS,
            )  # fmt: skip
            if IS_KEYS and level == 1:
                # Takes as long to come as a tile to compute: not when a tile is waited for, nor when queries are.
                plan_row = _next_row(order_ptr, next_ptr, num_work)
            if level == BOX_LEVELS:
                tile = _fill_up(
                    tile, filled, ring, full, tmas[level - 1], sequence, slots_ptr, num_kv_blocks,
                    (1 << LOG2_BLOCK_KV) >> (level - 1), DIM, STAGES,
                )  # fmt: skip
        for level in range(BOX_LEVELS + 1, NUM_LEVELS + 1):
            first, last = _level_ends(ends_ptr, level)
            for _ in range(_tiles(first, last, LOG2_BLOCK_KV + 1 - level)):
                stage = tile % STAGES
                mbarrier.wait(empty.index(stage), (tile // STAGES & 1) ^ 1)
                mbarrier.arrive(full.index(stage), count=1)
                mbarrier.arrive(to_gather.index(stage), count=1)
                tile += 1
        turn += 1
        if not IS_KEYS:
            plan_row = _wait_for_row(plan_rows, query_full, turn, QUERIES, 1)
    if IS_KEYS:
        place = turn % QUERIES
        mbarrier.wait(query_empty.index(place), (turn // QUERIES & 1) ^ 1)
        mbarrier.arrive(query_full.index(place), count=1)
        _announce_row(plan_rows, query_full, place, plan_row)


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
def _gather_rows(rows, full, base_ptr, offsets, DIM: gl.constexpr, HEAD_DIM: gl.constexpr):
    """Start to copy the 128 rows at ``offsets`` into a tile [128, DIM], zeros where there is none. ``full`` hears of it
    from each thread, when its copies have arrived."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // DIM, DIM // 8], [4, 1], [1, 0])
    dim = gl.arange(0, DIM, gl.SliceLayout(0, layout))
    for part in gl.static_range(4):
        offset = offsets[part]
        source = base_ptr + (gl.maximum(offset, 0)[:, None] + dim[None, :])
        # 16 bytes at a time: what is known of an argument's alignment is not known to the warps that it is handed to.
        source = gl.max_contiguous(gl.multiple_of(source, [16, 16]), [1, 8])
        mask = (offset >= 0)[:, None] & (dim < HEAD_DIM)[None, :]
        _copy_elements(rows.slice(part * 32, 32), source, mask=mask)
    async_copy.mbarrier_arrive(full, increment_count=False)


@gluon.jit
def _gather(
    given, NUM_LEVELS: gl.constexpr, BOX_LEVELS: gl.constexpr, LOG2_BLOCK_KV: gl.constexpr, HEAD_DIM: gl.constexpr,
    DIM: gl.constexpr, KEYS: gl.constexpr, VALUES: gl.constexpr, QUERIES: gl.constexpr,
):  # fmt: skip
    """What the warps do that load the rows of blocks too small for a descriptor, several blocks to a tile.

    The warps with the descriptors say when such a tile is empty. A wait tells only even from odd turns of a barrier:
    who does not look at every turn takes one for another, and to look at those of all tiles takes time from the warps
    that compute.
    """
    (
        indices_ptr, plan_offsets_ptr, pooled_ptr, query_full, query_empty, plan_rows,
        keys, key_full, keys_to_gather, values, value_full, values_to_gather,
        num_heads, group, kv_len, num_q_blocks, num_kv_blocks, pooled_rows, sequences,
    ) = given  # fmt: skip
    tile = 0
    key_turns = 0  # bit s is that of the next turn of stage s
    value_turns = 0
    turn = 0
    plan_row = _wait_for_row(plan_rows, query_full, turn, QUERIES, 4)
    while plan_row >= 0:
        mbarrier.arrive(query_empty.index(turn % QUERIES), count=1)
        batch, head, _ = _place(plan_row, num_heads, num_q_blocks)
        slots_ptr = indices_ptr + plan_row.to(gl.int64) * num_kv_blocks
        ends_ptr = plan_offsets_ptr + plan_row.to(gl.int64) * (NUM_LEVELS + 1)
        sequence = batch.to(gl.int64) * (num_heads // group) + head // group
        key_ptr = pooled_ptr + sequence * pooled_rows * HEAD_DIM
        value_ptr = key_ptr + sequences.to(gl.int64) * pooled_rows * HEAD_DIM
        level_start = 0
        box_rows = 0
        for level in range(1, BOX_LEVELS + 1):
            first, last = _level_ends(ends_ptr, level)
            box_rows += (last - first) << (LOG2_BLOCK_KV + 1 - level)
            if level > 1:
                level_start += _level_rows(kv_len, level)
        tile += (box_rows + 127) >> 7
        for level in range(BOX_LEVELS + 1, NUM_LEVELS + 1):
            log2_rows = LOG2_BLOCK_KV + 1 - level
            first, last = _level_ends(ends_ptr, level)
            level_rows = _level_rows(kv_len, level)
            end = last << log2_rows
            for start in range(first << log2_rows, end, 128):
                # Before the tile is free, as above.
                offsets = (
                    _row_offsets(0, slots_ptr, start, end, level_start, log2_rows, level_rows, DIM, HEAD_DIM),
                    _row_offsets(1, slots_ptr, start, end, level_start, log2_rows, level_rows, DIM, HEAD_DIM),
                    _row_offsets(2, slots_ptr, start, end, level_start, log2_rows, level_rows, DIM, HEAD_DIM),
                    _row_offsets(3, slots_ptr, start, end, level_start, log2_rows, level_rows, DIM, HEAD_DIM),
                )  # fmt: skip
                stage = tile % KEYS
                mbarrier.wait(keys_to_gather.index(stage), (key_turns >> stage) & 1)
                key_turns ^= 1 << stage
                rows = keys.index(stage).reshape([128, DIM])
                _gather_rows(rows, key_full.index(stage), key_ptr, offsets, DIM, HEAD_DIM)
                stage = tile % VALUES
                mbarrier.wait(values_to_gather.index(stage), (value_turns >> stage) & 1)
                value_turns ^= 1 << stage
                rows = values.index(stage).reshape([128, DIM])
                _gather_rows(rows, value_full.index(stage), value_ptr, offsets, DIM, HEAD_DIM)
                tile += 1
            level_start += level_rows
        turn += 1
        plan_row = _wait_for_row(plan_rows, query_full, turn, QUERIES, 4)


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
            first, last = _level_ends(ends_ptr, coarser)
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
        first, last = _level_ends(ends_ptr, level)
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
    plan_row = _wait_for_row(plan_rows, query_full, turn, QUERIES, 4)
    while plan_row >= 0:
        slots_ptr = indices_ptr + plan_row.to(gl.int64) * num_kv_blocks
        ends_ptr = plan_offsets_ptr + plan_row.to(gl.int64) * (NUM_LEVELS + 1)
        place = turn % QUERIES
        query = queries.index(place * 2 + PART).reshape([64, DIM])
        tile, acc, row_max, row_sum = _attend(
            tile, query, keys, values, key_full, key_empty, value_full, value_empty, slots_ptr, ends_ptr, kv_len,
            scale_log2, NUM_LEVELS, BOX_LEVELS, LOG2_BLOCK_KV, DIM, KEYS, VALUES,
        )  # fmt: skip

        batch, head, q_block = _place(plan_row, num_heads, num_q_blocks)
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
        _store_tile(out_tma, [batch, head, q_block * 128 + PART * 64, 0], queries.index(place * 2 + PART))
        tma.store_wait(0)
        mbarrier.arrive(query_empty.index(place), count=1)
        turn += 1
        plan_row = _wait_for_row(plan_rows, query_full, turn, QUERIES, 4)


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
                (_load, (load_keys, IS_KEYS, NUM_LEVELS, BOX_LEVELS, LOG2_BLOCK_KV, DIM, KEYS, QUERIES)),
                (_load, (load_values, IS_VALUES, NUM_LEVELS, BOX_LEVELS, LOG2_BLOCK_KV, DIM, VALUES, QUERIES)),
                (_gather, (gather, NUM_LEVELS, BOX_LEVELS, LOG2_BLOCK_KV, HEAD_DIM, DIM, KEYS, VALUES, QUERIES)),
            ],
            [4, 1, 1, 4],
            [COMPUTE_REGISTERS, LOAD_REGISTERS, LOAD_REGISTERS, LOAD_REGISTERS],
        )
    else:
        gl.warp_specialize(
            [
                (_compute, (compute, UPPER, NUM_LEVELS, BOX_LEVELS, LOG2_BLOCK_KV, DIM, KEYS, VALUES, QUERIES)),
                (_compute, (compute, LOWER, NUM_LEVELS, BOX_LEVELS, LOG2_BLOCK_KV, DIM, KEYS, VALUES, QUERIES)),
                (_load, (load_keys, IS_KEYS, NUM_LEVELS, BOX_LEVELS, LOG2_BLOCK_KV, DIM, KEYS, QUERIES)),
                (_load, (load_values, IS_VALUES, NUM_LEVELS, BOX_LEVELS, LOG2_BLOCK_KV, DIM, VALUES, QUERIES)),
            ],
            [4, 1, 1],
            [COMPUTE_REGISTERS, LOAD_REGISTERS, LOAD_REGISTERS],
        )
