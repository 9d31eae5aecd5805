import re
from itertools import pairwise
from math import prod

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from psa_masks import TokenOrder, VideoGrid, cube_order, gilbert_order

sides = st.integers(1, 9)
triples = st.tuples(sides, sides, sides)
cubes = st.tuples(*[st.integers(1, 10)] * 3)
alongs = st.sampled_from(["raster", "gilbert"])
texts = st.fixed_dictionaries({"text": st.integers(0, 5), "text_first": st.booleans()})


def grid_of(shape: tuple[int, int, int], **text: object) -> VideoGrid:
    frames, height, width = shape
    return VideoGrid(frames=frames, height=height, width=width, **text)


def video_of(order: TokenOrder, grid: VideoGrid) -> Tensor:
    """Video tokens int64 ``[grid.video_len]`` in their order, counted from 0."""
    start, stop = grid.video_range
    return order.order[start:stop] - start


def cubes_of(video: Tensor, grid: VideoGrid, cube: tuple[int, int, int]) -> Tensor:
    """Coordinates int64 ``[tokens, 3]`` of the cube that each token lies in."""
    t, y, x = video // (grid.height * grid.width), video // grid.width % grid.height, video % grid.width
    return torch.stack([t // cube[0], y // cube[1], x // cube[2]], dim=1)


@given(shape=triples, cube=cubes, text=texts, along=alongs)
def test_tokens_of_a_cube_follow_one_another_in_raster_order(
    shape: tuple[int, int, int], cube: tuple[int, int, int], text: dict[str, object], along: str
) -> None:
    grid = grid_of(shape, **text)
    video = video_of(cube_order(grid, cube, along=along), grid)
    runs, lengths = torch.unique_consecutive(cubes_of(video, grid, cube), dim=0, return_counts=True)
    assert len(runs) == prod(-(-size // side) for size, side in zip(shape, cube, strict=True))
    assert len(torch.unique(runs, dim=0)) == len(runs)
    assert all((tokens.diff() > 0).all() for tokens in video.split(lengths.tolist()))


@given(shape=triples, cube=cubes)
def test_cubes_come_in_raster_order_or_without_a_jump(shape: tuple[int, int, int], cube: tuple[int, int, int]) -> None:
    grid = grid_of(shape)
    raster, curve = (
        torch.unique_consecutive(cubes_of(video_of(cube_order(grid, cube, along=along), grid), grid, cube), dim=0)
        for along in ("raster", "gilbert")
    )
    assert all(before < after for before, after in pairwise(raster.tolist()))
    assert (curve.diff(dim=0).abs().sum(dim=1) == 1).all()


@given(shape=triples, text=texts)
def test_cubes_of_one_token_are_the_order_of_the_cubes(shape: tuple[int, int, int], text: dict[str, object]) -> None:
    grid = grid_of(shape, **text)
    raster, curve = (cube_order(grid, (1, 1, 1), along=along) for along in ("raster", "gilbert"))
    assert torch.equal(raster.order, torch.arange(grid.seq_len))
    assert torch.equal(curve.order, gilbert_order(grid).order)


@given(shape=triples, text=texts, along=alongs, longer=st.sampled_from([0, 1, 2**63, 2**70]))
def test_a_cube_that_holds_the_grid_changes_nothing(
    shape: tuple[int, int, int], text: dict[str, object], along: str, longer: int
) -> None:
    grid = grid_of(shape, **text)
    order = cube_order(grid, [size + longer for size in shape], along=along)
    assert torch.equal(order.order, torch.arange(grid.seq_len))


@given(cube=st.tuples(*[st.integers(1, 4)] * 3), times=st.tuples(*[st.integers(1, 4)] * 3), along=alongs)
def test_cubes_that_divide_the_grid_are_the_blocks(
    cube: tuple[int, int, int], times: tuple[int, int, int], along: str
) -> None:
    frames, height, width = (side * count for side, count in zip(cube, times, strict=True))
    grid = VideoGrid(frames=frames, height=height, width=width, text=3)
    video = video_of(cube_order(grid, cube, along=along), grid)
    blocks = cubes_of(video, grid, cube).reshape(prod(times), prod(cube), 3)
    assert (blocks == blocks[:, :1]).all()
    assert len(torch.unique(blocks[:, 0], dim=0)) == prod(times)


def test_by_hand() -> None:
    grid = VideoGrid(frames=1, height=3, width=3, text=1, text_first=True)
    assert cube_order(grid, (1, 2, 2)).order.tolist() == [0, 1, 2, 4, 5, 3, 6, 7, 8, 9]
    grid = VideoGrid(frames=1, height=4, width=5)
    order = cube_order(grid, (1, 2, 2), along="gilbert").order.tolist()
    there = [0, 1, 5, 6, 2, 3, 7, 8, 4, 9]
    back = [14, 19, 12, 13, 17, 18, 10, 11, 15, 16]
    assert order == there + back


def test_equal_calls_share_their_order() -> None:
    grid = {"frames": 3, "height": 4, "width": 5}
    order = cube_order(VideoGrid(**grid), (2, 4, 2))
    assert order is cube_order(VideoGrid(**grid), [2, 4, 2])
    assert order is cube_order(VideoGrid(**grid), (2, 100, 2), along="raster")
    assert order is not cube_order(VideoGrid(**grid), (2, 4, 2), along="gilbert")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"cube": (2, 8)}, ValueError, "cube must be (frames, height, width), got (2, 8)"),
        ({"cube": (2, 8, 8, 8)}, ValueError, "cube must be (frames, height, width), got (2, 8, 8, 8)"),
        ({"cube": (2, 8, 0)}, ValueError, "cube[2] must be at least 1, got 0"),
        ({"cube": (2, 8.0, 8)}, TypeError, "cube[1] must be an int, got 8.0"),
        ({"cube": (True, 8, 8)}, TypeError, "cube[0] must be an int, got True"),
        ({"cube": 8}, TypeError, "cube must be a sequence, got 8"),
        ({"cube": "288"}, TypeError, "cube must be a sequence, got '288'"),
        ({"along": "Gilbert"}, ValueError, "along must be one of 'raster', 'gilbert', got 'Gilbert'"),
        ({"along": None}, ValueError, "along must be one of 'raster', 'gilbert', got None"),
    ],
)
def test_refuses(options: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        cube_order(VideoGrid(frames=2, height=2, width=2), **options)
