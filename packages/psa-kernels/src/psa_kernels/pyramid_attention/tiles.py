"""Tile sizes, warps and pipeline stages as data, chosen by what a device has."""

from dataclasses import dataclass, replace

import torch

from psa_kernels.checks import MAX_HEAD_DIM

_BARRIERS_AND_ALIGNMENT = 2048


@dataclass(frozen=True)
class Tile:
    """What one program of the forward kernel works on at a time.

    Attributes:
        tile_m: query tokens.
        tile_n: rows of keys and values.
        num_warps, num_stages: of the launch.
        max_head_dim: the widest head that its registers hold.
        max_registers: of a thread, fewer than the compiler would take where one more program on a multiprocessor is
            worth some spilled words; None leaves it to the compiler.
    """

    tile_m: int
    tile_n: int
    num_warps: int
    num_stages: int
    max_head_dim: int = MAX_HEAD_DIM
    max_registers: int | None = None

    def shared_memory(self, head_dim: int, element_size: int) -> int:
        """Bytes of shared memory that a program takes at most.

        The queries once, keys and values once a stage, and the weights on their way to the second product: they may
        have the room of a tile of keys, which is spent by then, and what they need beyond it. The compiler adds
        barriers and aligns what is copied by descriptor.
        """
        tiles = (self.tile_m + 2 * self.num_stages * self.tile_n) * head_dim
        weights = self.tile_n * max(0, self.tile_m - head_dim)
        return (tiles + weights) * element_size + _BARRIERS_AND_ALIGNMENT


# Best first, as measured on an H100. Up to head_dim 64 three programs share a multiprocessor, which takes at most 168
# registers a thread; up to 128 it is two, and one with a third stage. Half precision runs on tensor cores; float32 in
# full precision does not, and holds less in registers.
_HALF = (
    Tile(128, 64, 4, 3, max_head_dim=64, max_registers=168),
    Tile(128, 64, 4, 2, max_head_dim=128),
    Tile(128, 64, 8, 2),
    Tile(64, 64, 4, 2),
    Tile(64, 32, 4, 2),
    Tile(32, 32, 4, 1),
)
_FLOAT = (Tile(64, 32, 4, 2), Tile(32, 32, 4, 1), Tile(16, 16, 4, 1))


def choose_tile(*, block_q: int, head_dim: int, dtype: torch.dtype, shared_memory: int) -> Tile:
    """The best tile that fits a device.

    Args:
        block_q: query tokens of a block; a tile never covers more than one block.
        head_dim: rounded up to a power of two.
        dtype: of queries, keys and values.
        shared_memory: bytes a program may have.

    Raises:
        ValueError: nothing fits.
    """
    candidates = _FLOAT if dtype == torch.float32 else _HALF
    for tile in candidates:
        if head_dim <= tile.max_head_dim and tile.shared_memory(head_dim, dtype.itemsize) <= shared_memory:
            return replace(tile, tile_m=min(tile.tile_m, max(16, block_q)))
    raise ValueError(f"no tile for head_dim {head_dim} in {dtype} fits {shared_memory} bytes of shared memory")


@dataclass(frozen=True)
class BackwardTile:
    """What one program of a backward kernel works on at a time.

    Attributes:
        held: rows whose gradients it adds up: queries, or keys and values.
        streamed: rows of the other side that one iteration loads.
        num_warps, num_stages: of the launch.
        max_head_dim: the widest head that its registers hold.
    """

    held: int
    streamed: int
    num_warps: int
    num_stages: int
    max_head_dim: int = MAX_HEAD_DIM

    def shared_memory(self, head_dim: int, element_size: int) -> int:
        """Bytes of shared memory that a program takes at most.

        Two tensors on either side, what is streamed once a stage, and the weights and their gradients on their way to a
        product. Without a pipeline a tile may be laid out twice, once for each product that it enters.
        """
        rows = 2 * self.held + 2 * self.num_stages * self.streamed
        if self.num_stages == 1:
            rows += self.streamed
        return (rows * head_dim + 2 * self.held * self.streamed) * element_size + _BARRIERS_AND_ALIGNMENT


# A program for rows holds two sums, one for queries holds one and has room for twice the rows.
_HALF_QUERIES = (
    BackwardTile(128, 64, 4, 2, max_head_dim=64),
    BackwardTile(128, 64, 8, 2, max_head_dim=128),
    BackwardTile(64, 64, 8, 2),
    BackwardTile(64, 32, 8, 2),
    BackwardTile(32, 32, 4, 1),
    BackwardTile(16, 16, 4, 1),
)
_HALF_ROWS = (
    BackwardTile(64, 64, 4, 2, max_head_dim=128),
    BackwardTile(64, 64, 8, 2),
    BackwardTile(64, 32, 8, 2),
    BackwardTile(32, 32, 4, 1),
    BackwardTile(16, 16, 4, 1),
)
_FLOAT_BACKWARD = (
    BackwardTile(32, 32, 4, 1, max_head_dim=128),
    BackwardTile(16, 16, 4, 1),
)


def choose_backward_tiles(
    *, block_q: int, head_dim: int, dtype: torch.dtype, shared_memory: int
) -> tuple[BackwardTile, BackwardTile]:
    """The best tiles that fit a device, for the gradients of queries and for those of keys and values.

    Args, errors: as :func:`choose_tile`. A tile of rows may cover several blocks.
    """
    chosen = []
    tables = (_FLOAT_BACKWARD, _FLOAT_BACKWARD) if dtype == torch.float32 else (_HALF_QUERIES, _HALF_ROWS)
    for candidates in tables:
        for tile in candidates:
            if head_dim <= tile.max_head_dim and tile.shared_memory(head_dim, dtype.itemsize) <= shared_memory:
                chosen.append(tile)
                break
        else:
            raise ValueError(
                f"no backward tile for head_dim {head_dim} in {dtype} fits {shared_memory} bytes of shared memory"
            )
    of_queries, of_rows = chosen
    return replace(of_queries, held=min(of_queries.held, max(16, block_q))), of_rows
