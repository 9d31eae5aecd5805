from itertools import product

import pytest
import torch
from torch import Tensor

from psa_masks import TokenOrder, VideoGrid, cube_order, gilbert_order
from psa_masks.order.gilbert import _moves, _path

VIDEOS = [(21, 45, 80), (13, 30, 45), (18, 48, 80), (16, 16, 16), (24, 24, 24), (16, 20, 24), (31, 44, 80)]
GRIDS = [
    *VIDEOS,
    *[(frames, width, height) for frames, height, width in VIDEOS],
    (1, 1, 1),
    (1, 45, 80),
    (21, 1, 80),
    (21, 45, 1),
    (1, 1, 5001),
    (5000, 1, 1),
    (3, 401, 7),
    (2, 1, 333),
]


def places(order: TokenOrder, shape: tuple[int, int, int]) -> Tensor:
    """Grid coordinates ``[tokens, 3]`` along the order."""
    _, height, width = shape
    tokens = order.order
    return torch.stack([tokens // (height * width), tokens // width % height, tokens % width], dim=1)


def spread(order: TokenOrder, shape: tuple[int, int, int], block: int) -> float:
    """Root mean square distance between two tokens of a block."""
    whole = order.order.numel() // block * block
    blocks = places(order, shape)[:whole].reshape(-1, block, 3).double()
    return (2 * blocks.var(dim=1, correction=0).sum(dim=1)).mean().sqrt().item()


@pytest.mark.parametrize("shape", GRIDS, ids=lambda shape: "x".join(map(str, shape)))
def test_no_step_is_a_jump(shape: tuple[int, int, int]) -> None:
    order = gilbert_order(VideoGrid(frames=shape[0], height=shape[1], width=shape[2]))
    assert torch.equal(order.order.sort().values, torch.arange(len(order)))
    assert (places(order, shape).diff(dim=0).abs().sum(dim=1) == 1).all()


def test_every_move_through_every_small_box_is_made_without_a_jump() -> None:
    made = 0
    for dims in product(range(1, 6), repeat=3):
        for move in _moves(dims):
            path = _path(dims, move, {})
            end = [size - 1 if move >> axis & 1 else 0 for axis, size in enumerate(dims)]
            assert path[0].tolist() == [0, 0, 0], (dims, move)
            assert path[-1].tolist() == end, (dims, move)
            assert (path.diff(dim=0).abs().sum(dim=1) == 1).all(), (dims, move)
            assert len(torch.unique(path, dim=0)) == len(path) == dims[0] * dims[1] * dims[2], (dims, move)
            made += 1
    assert made > 5**3


@pytest.mark.parametrize("shape", VIDEOS, ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize("block", [64, 128])
def test_blocks_are_more_compact_than_rows_and_flat_cubes(shape: tuple[int, int, int], block: int) -> None:
    grid = VideoGrid(frames=shape[0], height=shape[1], width=shape[2])
    curve = spread(gilbert_order(grid), shape, block)
    assert curve < spread(cube_order(grid, (block // 64, 8, 8)), shape, block)
    assert curve < spread(TokenOrder.identity(grid.seq_len), shape, block)


@pytest.mark.parametrize("shape", VIDEOS, ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize("block", [64, 128])
def test_blocks_of_cubes_along_the_curve_are_not_torn_apart(shape: tuple[int, int, int], block: int) -> None:
    grid = VideoGrid(frames=shape[0], height=shape[1], width=shape[2])
    cube = (block // 64, 8, 8)
    whole = spread(TokenOrder.identity(block), cube, block)
    curve = spread(gilbert_order(grid), shape, block)
    assert curve < spread(cube_order(grid, cube, along="gilbert"), shape, block) < 1.5 * whole
