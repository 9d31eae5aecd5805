"""Video tokens cube by cube."""

from collections.abc import Sequence
from functools import lru_cache

import torch

from psa_masks import checks
from psa_masks.grid import VideoGrid
from psa_masks.order.token_order import TokenOrder, ordinary_cpu_tensors


def cube_order(grid: VideoGrid, cube: Sequence[int] = (2, 8, 8)) -> TokenOrder:
    """Order the video so that the tokens of each 3-D cube follow one another.

    Cubes come row by row, and so do the tokens in a cube. Where the grid is no multiple of the cube, the
    last cubes along an axis are smaller. Text tokens stay where they are.

    Args:
        grid: the token grid.
        cube: tokens of a cube along (frames, height, width), each at least 1.

    Returns:
        The order of the whole sequence, shared between equal calls.

    Raises:
        TypeError, ValueError: ``cube`` is not three ints of at least 1.
    """
    sides = checks.sequence("cube", cube)
    if len(sides) != 3:
        raise ValueError(f"cube must be (frames, height, width), got {cube!r}")
    frames, height, width = (checks.integer(f"cube[{i}]", side, 1) for i, side in enumerate(sides))
    return _cube_order(grid, (frames, height, width))


@lru_cache(maxsize=16)
@ordinary_cpu_tensors()
def _cube_order(grid: VideoGrid, cube: tuple[int, int, int]) -> TokenOrder:
    t, y, x = (torch.arange(size) // side for size, side in zip(grid.shape, cube, strict=True))
    rows, columns = (-(-size // side) for size, side in zip(grid.shape[1:], cube[1:], strict=True))
    cube_of_token = (t[:, None, None] * rows + y[:, None]) * columns + x
    return TokenOrder.of_video(grid, cube_of_token.flatten().argsort(stable=True))
