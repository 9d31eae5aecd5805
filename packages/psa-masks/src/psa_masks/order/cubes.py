"""Video tokens cube by cube: the tile order of Sliding Tile Attention (arXiv 2502.04507) for grids of any size."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from psa_kernels import checks as kernel_checks
from psa_masks import checks
from psa_masks.grid import VideoGrid, check_grid
from psa_masks.order.gilbert import gilbert_order
from psa_masks.order.token_order import TokenOrder, ordinary_cpu_tensors

_Sides = tuple[int, int, int]


def cube_order(
    grid: VideoGrid, cube: Sequence[int] = (2, 8, 8), *, along: Literal["raster", "gilbert"] = "raster"
) -> TokenOrder:
    """Order the video so that the tokens of each 3-D cube follow one another.

    The tokens in a cube come in raster order (frame by frame, row by row). Where the grid is no multiple of the
    cube, the last cubes along an axis are smaller: nothing is padded or dropped. Text tokens stay where they are.

    Where cubes divide the grid and hold as many tokens as a block, and no text stands before them, every block is
    a cube. Otherwise blocks hold parts of consecutive cubes, which ``along="gilbert"`` keeps close to each other.

    Args:
        grid: the token grid.
        cube: tokens of a cube along (frames, height, width), each at least 1; more than the grid has is all of it.
        along: how cubes follow one another. ``"raster"``: frame by frame, row by row. ``"gilbert"``: along the
            curve of ``gilbert_order`` over the grid of cubes, so that each shares a face with the next.

    Returns:
        The order of the whole sequence, shared between equal calls. Make it outside of what torch.compile traces.

    Raises:
        TypeError: ``grid`` is no VideoGrid, or ``cube`` no sequence of ints.
        ValueError: ``cube`` has not three sides of at least 1, or ``along`` is another word.
    """
    check_grid(grid)
    sides = checks.sequence("cube", cube)
    if len(sides) != 3:
        raise ValueError(f"cube must be (frames, height, width), got {cube!r}")
    frames, height, width = (checks.integer(f"cube[{i}]", side, 1) for i, side in enumerate(sides))
    kernel_checks.choice("along", along, ("raster", "gilbert"))
    # Longer sides mean the same, but need not fit into an int64.
    cut = min(frames, grid.frames), min(height, grid.height), min(width, grid.width)
    return _cube_order(grid, cut, along)


@lru_cache(maxsize=16)
@ordinary_cpu_tensors()
def _cube_order(grid: VideoGrid, cube: _Sides, along: str) -> TokenOrder:
    frames, rows, columns = (-(-size // side) for size, side in zip(grid.shape, cube, strict=True))
    t, y, x = (torch.arange(size) // side for size, side in zip(grid.shape, cube, strict=True))
    place: Tensor = ((t[:, None, None] * rows + y[:, None]) * columns + x).flatten()  # of each token's cube
    if along == "gilbert":
        place = gilbert_order(VideoGrid(frames=frames, height=rows, width=columns)).inverse[place]
    return TokenOrder.of_video(grid, place.argsort(stable=True))
