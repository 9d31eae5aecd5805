"""What the warps do that load, in the forward kernel for Hopper.

See :mod:`psa_kernels.pyramid_attention.hopper_fwd`.
"""

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    mbarrier,
    tma,
)

# Gluon is young and its functions change: of another Triton's nothing is known here.
if not (3, 6) <= tuple(int(part) for part in triton.__version__.split(".")[:2]) <= (3, 9):
    raise ImportError(f"the kernel for Hopper compiles with Triton 3.6 to 3.9, this is {triton.__version__}")
# The same functions by the names of Triton 3.9 and of 3.6.
_copy_tile = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
store_tile = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global
_reinterpret = getattr(gl.shared_memory_descriptor, "reinterpret", None) or gl.shared_memory_descriptor._reinterpret
_copy_elements = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared


@gluon.jit
def level_ends(ends_ptr, level):
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
def place_of(plan_row, num_heads, num_q_blocks):
    """Batch, head and query block of a row of the plan."""
    return plan_row // (num_q_blocks * num_heads), plan_row // num_q_blocks % num_heads, plan_row % num_q_blocks


@gluon.jit
def wait_for_row(plan_rows, query_full, turn, QUERIES: gl.constexpr, NUM_WARPS: gl.constexpr):
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
def load_tiles(
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
        plan_row = wait_for_row(plan_rows, query_full, turn, QUERIES, 1)
    while plan_row >= 0:
        place = turn % QUERIES
        batch, head, q_block = place_of(plan_row, num_heads, num_q_blocks)
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
            first, last = level_ends(ends_ptr, level)
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
            first, last = level_ends(ends_ptr, level)
            for _ in range(_tiles(first, last, LOG2_BLOCK_KV + 1 - level)):
                stage = tile % STAGES
                mbarrier.wait(empty.index(stage), (tile // STAGES & 1) ^ 1)
                mbarrier.arrive(full.index(stage), count=1)
                mbarrier.arrive(to_gather.index(stage), count=1)
                tile += 1
        turn += 1
        if not IS_KEYS:
            plan_row = wait_for_row(plan_rows, query_full, turn, QUERIES, 1)
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
def gather_tiles(
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
    plan_row = wait_for_row(plan_rows, query_full, turn, QUERIES, 4)
    while plan_row >= 0:
        mbarrier.arrive(query_empty.index(turn % QUERIES), count=1)
        batch, head, _ = place_of(plan_row, num_heads, num_q_blocks)
        slots_ptr = indices_ptr + plan_row.to(gl.int64) * num_kv_blocks
        ends_ptr = plan_offsets_ptr + plan_row.to(gl.int64) * (NUM_LEVELS + 1)
        sequence = batch.to(gl.int64) * (num_heads // group) + head // group
        key_ptr = pooled_ptr + sequence * pooled_rows * HEAD_DIM
        value_ptr = key_ptr + sequences.to(gl.int64) * pooled_rows * HEAD_DIM
        level_start = 0
        box_rows = 0
        for level in range(1, BOX_LEVELS + 1):
            first, last = level_ends(ends_ptr, level)
            box_rows += (last - first) << (LOG2_BLOCK_KV + 1 - level)
            if level > 1:
                level_start += _level_rows(kv_len, level)
        tile += (box_rows + 127) >> 7
        for level in range(BOX_LEVELS + 1, NUM_LEVELS + 1):
            log2_rows = LOG2_BLOCK_KV + 1 - level
            first, last = level_ends(ends_ptr, level)
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
        plan_row = wait_for_row(plan_rows, query_full, turn, QUERIES, 4)
