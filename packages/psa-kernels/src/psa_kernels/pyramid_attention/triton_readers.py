"""Who reads what: a plan turned round, for each tile of rows the query blocks that read any of it.

A reader is a query block of one of the heads that share a KV head, numbered ``head in its group * num_q_blocks + query
block``. Readers of a block lie in rising order, a level after another, as blocks do in a plan: sums over them have one
order, and need no atomics.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_CHUNK = 512


@triton.jit(do_not_specialize=["group", "num_q_blocks", "num_kv_blocks"])
def _turn_kernel(
    indices_ptr, offsets_ptr, map_ptr, group, num_q_blocks, num_kv_blocks, NUM_LEVELS: tl.constexpr, CHUNK: tl.constexpr
):  # fmt: skip
    """Write the levels of a row of the plan into a column of the map."""
    row = tl.program_id(0).to(tl.int64)
    indices_ptr += row * num_kv_blocks
    offsets_ptr += row * (NUM_LEVELS + 1)
    readers = group * num_q_blocks
    map_ptr += row // readers * num_kv_blocks * readers + row % readers
    first = 0
    for level in tl.static_range(1, NUM_LEVELS + 1):
        last = tl.load(offsets_ptr + level)
        for start in range(first, last, CHUNK):
            slot = start + tl.arange(0, CHUNK)
            block = tl.load(indices_ptr + slot, mask=slot < last, other=0).to(tl.int64)  # [CHUNK]
            tl.store(map_ptr + block * readers, tl.full([CHUNK], level, tl.int8), mask=slot < last)
        first = last


@triton.jit
def level_of_tile(tile, num_kv_blocks, first_level, BLOCK_KV: tl.constexpr, TILE_N: tl.constexpr):
    """The level of a tile, and its number there, in a count of the tiles of all levels from ``first_level`` on."""
    level = first_level
    rows = num_kv_blocks * (BLOCK_KV >> (level - 1))
    while tile >= (rows + TILE_N - 1) // TILE_N:
        tile -= (rows + TILE_N - 1) // TILE_N
        level += 1
        rows = num_kv_blocks * (BLOCK_KV >> (level - 1))
    return level, tile


def count_tiles(num_kv_blocks: int, first_level: int, last_level: int, block_kv: int, tile_n: int) -> int:
    """Tiles of ``tile_n`` rows that levels ``first_level`` to ``last_level`` have together, all blocks taken whole."""
    levels = range(first_level, last_level + 1)
    return sum(triton.cdiv(num_kv_blocks * (block_kv >> (level - 1)), tile_n) for level in levels)


@triton.jit(do_not_specialize=["readers", "num_kv_blocks", "num_tiles", "first_level"])
def _readers_kernel(
    map_ptr, lists_ptr, counts_ptr, readers, num_kv_blocks, num_tiles, first_level,
    BLOCK_KV: tl.constexpr, TILE_N: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The readers of one tile of several blocks: those that read any of its blocks at the tile's level."""
    pid = tl.program_id(0).to(tl.int64)
    level, tile = level_of_tile((pid % num_tiles).to(tl.int32), num_kv_blocks, first_level, BLOCK_KV, TILE_N)
    blocks = TILE_N // (BLOCK_KV >> (level - 1))
    first = tile * blocks
    last = tl.minimum(first + blocks, num_kv_blocks)
    map_ptr += (pid // num_tiles * num_kv_blocks + first) * readers
    lists_ptr += pid * readers
    end = 0
    for start in range(0, readers, CHUNK):
        reader = start + tl.arange(0, CHUNK)
        reads = tl.zeros([CHUNK], tl.int32)
        block_ptr = map_ptr
        for _ in range(first, last):
            own = tl.load(block_ptr + reader, mask=reader < readers, other=0)  # [CHUNK]
            reads |= (own == level).to(tl.int32)
            block_ptr += readers
        tl.store(lists_ptr + end + tl.cumsum(reads, 0) - reads, reader, mask=reads == 1)
        end += tl.sum(reads, 0)
    tl.store(counts_ptr + pid, end)


def turn(indices: Tensor, offsets: Tensor, num_kv_heads: int) -> Tensor:
    """The level map of a plan with KV blocks first.

    Args:
        indices, offsets: int32 ``[B, H, num_q_blocks, num_kv_blocks]`` and ``[B, H, num_q_blocks, num_levels + 1]`` of
            the plan, contiguous.

    Returns:
        int8 ``[B, H_kv, num_kv_blocks, readers]``, with ``readers = H / H_kv * num_q_blocks``.
    """
    batch, heads, num_q_blocks, num_kv_blocks = indices.shape
    group = heads // num_kv_heads
    shape = (batch, num_kv_heads, num_kv_blocks, group * num_q_blocks)
    turned = torch.zeros(shape, dtype=torch.int8, device=indices.device)
    _turn_kernel[(batch * heads * num_q_blocks,)](
        indices, offsets, turned, group, num_q_blocks, num_kv_blocks, NUM_LEVELS=offsets.shape[3] - 1, CHUNK=_CHUNK
    )
    return turned


def readers_of_tiles(
    turned: Tensor, first_level: int, last_level: int, block_kv: int, tile_n: int
) -> tuple[Tensor, Tensor]:
    """The readers of each tile of levels whose blocks are smaller than a tile.

    Returns:
        int32 ``[B, H_kv, tiles, readers]``, of which only the first mean something, and int32 ``[B, H_kv, tiles]``, how
        many. Tiles are counted through the levels, see :func:`count_tiles`.
    """
    batch, num_kv_heads, num_kv_blocks, readers = turned.shape
    tiles = count_tiles(num_kv_blocks, first_level, last_level, block_kv, tile_n)
    lists = torch.empty((batch, num_kv_heads, tiles, readers), dtype=torch.int32, device=turned.device)
    counts = torch.empty((batch, num_kv_heads, tiles), dtype=torch.int32, device=turned.device)
    _readers_kernel[(batch * num_kv_heads * tiles,)](
        turned, lists, counts, readers, num_kv_blocks, tiles, first_level,
        BLOCK_KV=block_kv, TILE_N=tile_n, CHUNK=_CHUNK,
    )  # fmt: skip
    return lists, counts
