from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from psa_masks import TokenOrder, VideoGrid, cube_order, gilbert_order

sides = st.integers(1, 9)
grids = st.builds(
    VideoGrid,
    frames=sides,
    height=sides,
    width=sides,
    text=st.integers(0, 5),
    text_first=st.booleans(),
)
cubes = st.tuples(*[st.integers(1, 10)] * 3)
alongs = st.sampled_from(["raster", "gilbert"])


@given(grid=grids)
def test_grid_counts_its_tokens(grid: VideoGrid) -> None:
    assert grid.video_len == grid.frames * grid.height * grid.width
    assert grid.seq_len == grid.video_len + grid.text
    first, last = sorted([grid.text_range, grid.video_range])
    assert (first[0], first[1], last[1]) == (0, last[0], grid.seq_len)
    assert grid.text_range[1] - grid.text_range[0] == grid.text
    assert grid.text == 0 or (grid.text_range[0] == 0) == grid.text_first


@pytest.mark.parametrize(
    ("sizes", "error", "message"),
    [
        ({"frames": 0}, ValueError, "frames must be at least 1, got 0"),
        ({"width": 2.0}, TypeError, "width must be an int, got 2.0"),
        ({"text": -1}, ValueError, "text must be at least 0, got -1"),
    ],
)
def test_grid_refuses(sizes: dict[str, int], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        VideoGrid(**{"frames": 2, "height": 2, "width": 2, **sizes})


@given(grid=grids, cube=cubes, along=alongs, seed=st.integers(0, 2**32))
def test_order_then_inverse_is_the_identity(grid: VideoGrid, cube: tuple[int, ...], along: str, seed: int) -> None:
    x = torch.randn(2, 3, grid.seq_len, 2, generator=torch.Generator().manual_seed(seed))
    before = x.clone()
    for order in (gilbert_order(grid), cube_order(grid, cube, along=along), TokenOrder.identity(grid.seq_len)):
        assert torch.equal(order.order.sort().values, torch.arange(grid.seq_len))
        assert torch.equal(order.order[order.inverse], torch.arange(grid.seq_len))
        assert torch.equal(order.undo(order.apply(x, 2), 2), x)
        assert torch.equal(order.apply(order.undo(x, -2), -2), x)
        assert torch.equal(order.apply(x, 2)[:, :, 0], x[:, :, order.order[0]])
    assert torch.equal(x, before)


@given(grid=grids, cube=cubes, along=alongs)
def test_text_stays_where_it_is(grid: VideoGrid, cube: tuple[int, ...], along: str) -> None:
    start, stop = grid.text_range
    for order in (gilbert_order(grid), cube_order(grid, cube, along=along)):
        assert torch.equal(order.order[start:stop], torch.arange(start, stop))


def test_equal_grids_share_their_order() -> None:
    sizes = {"frames": 3, "height": 4, "width": 5}
    assert gilbert_order(VideoGrid(**sizes)) is gilbert_order(VideoGrid(**sizes))


def test_order_is_its_own_copy() -> None:
    given_order = torch.tensor([2, 0, 1])
    order = TokenOrder(given_order)
    given_order.zero_()
    assert order.apply(torch.tensor([10, 11, 12]), 0).tolist() == [12, 10, 11]
    assert order.undo(torch.tensor([12, 10, 11]), 0).tolist() == [10, 11, 12]


def test_index_is_moved_to_a_device_once() -> None:
    order = TokenOrder.identity(4)
    x = torch.empty(4, 2, device="meta")
    assert order.apply(x, 0).device == x.device
    moved = order._on_device[x.device, False]
    order.apply(x, 0)
    assert order._on_device[x.device, False] is moved


@pytest.mark.parametrize(
    ("order", "error", "message"),
    [
        (torch.tensor([0, 0, 2]), ValueError, r"order must hold each of 0..2 once, got \[0, 0, 2\]"),
        (torch.tensor([[0, 1]]), ValueError, r"order must have shape \[n\], got \[1, 2\]"),
        (torch.tensor([0, 1], dtype=torch.int32), TypeError, r"order must be an int64 tensor, got torch.int32"),
        ([0, 1], TypeError, r"order must be an int64 tensor, got list"),
    ],
)
def test_order_refuses(order: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        TokenOrder(order)


def test_apply_refuses_another_length() -> None:
    order = TokenOrder.identity(4)
    with pytest.raises(ValueError, match=r"x must have 4 tokens along dim 1, got shape \[4, 5\]"):
        order.apply(torch.zeros(4, 5), 1)
    with pytest.raises(ValueError, match=r"dim must be an axis of x with shape \[4, 5\], got 2"):
        order.undo(torch.zeros(4, 5), 2)


@pytest.mark.parametrize("make", [gilbert_order, cube_order])
@pytest.mark.parametrize("grid", [(2, 3, 4), [2, 3, 4], None])
def test_orders_are_of_a_grid(make: Callable[[object], TokenOrder], grid: object) -> None:
    with pytest.raises(TypeError, match=rf"grid must be a psa_masks.VideoGrid, got {type(grid).__name__}"):
        make(grid)
