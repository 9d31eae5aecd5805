"""Keys in the order of a k-d tree: every block keeps its tokens, and what is pooled is more alike."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from psa_kernels import pyramid_attention
from psa_kernels.testing import assert_within_error_budget, make_qkv
from psa_masks import AttentionOrder, VideoGrid, gilbert_order, kd_tree_order
from psa_masks.order.kd_tree import even_samples

sides = st.integers(1, 6)
grids = st.builds(
    VideoGrid, frames=sides, height=sides, width=sides, text=st.integers(0, 5), text_first=st.booleans()
)  # fmt: skip


def inputs(length: int, *, heads: int = 4, kv_heads: int = 2, dim: int = 16, seed: int = 0) -> tuple[Tensor, ...]:
    return make_qkv(batch=2, heads=heads, kv_heads=kv_heads, q_len=length, kv_len=length, head_dim=dim, seed=seed)


@given(grid=grids, block=st.sampled_from([1, 2, 8, 16, 64]), along_curve=st.booleans(), seed=st.integers(0, 2**32))
def test_blocks_keep_their_tokens_and_text_its_place(grid: VideoGrid, block: int, along_curve: bool, seed: int) -> None:
    query, key, _ = inputs(grid.seq_len, seed=seed)
    base = gilbert_order(grid) if along_curve else None
    order = kd_tree_order(query, key, block_kv=block, grid=grid, base=base).order
    plain = torch.arange(grid.seq_len) if base is None else base.order
    start, stop = grid.video_range
    for first in range(0, grid.seq_len, block):
        last = min(first + block, grid.seq_len)
        expected = plain[first:last].expand(2, 2, -1)
        assert torch.equal(order[..., first:last].sort(-1).values, expected.sort(-1).values)
        if first < start or last > stop or last - first < block:
            assert torch.equal(order[..., first:last], expected)
    assert torch.equal(kd_tree_order(query, key, block_kv=block, grid=grid, base=base).order, order)


def test_each_half_lies_on_one_side_of_a_direction() -> None:
    """Pairs of keys on a line, seen by all queries alike, come sorted, up to the sense of the line."""
    torch.manual_seed(0)
    query, along = torch.randn(1, 1, 64, 8), torch.randn(1, 1, 1, 8)
    places = torch.randn(1, 1, 64, 1)
    order = kd_tree_order(query, places * along, block_kv=16).order
    for block in places.squeeze().take(order.view(4, 16)):
        step = block.view(8, 2).sum(1).diff()
        assert (step >= 0).all() or (step <= 0).all()


def test_narrow_heads_have_as_many_directions_as_they_are_wide() -> None:
    query, key, _ = inputs(64, dim=4)
    order = kd_tree_order(query, key, block_kv=16).order
    assert torch.equal(order, kd_tree_order(query, key, block_kv=16, num_directions=4).order)
    assert not torch.equal(order, kd_tree_order(query, key, block_kv=16, num_directions=1).order)


def test_attention_to_whole_blocks_does_not_change() -> None:
    query, key, value = inputs(300)
    orders = AttentionOrder(query=None, key=kd_tree_order(query, key, block_kv=32))
    levels = torch.ones(2, 4, 10, 10, dtype=torch.int8)
    got = pyramid_attention(*orders.apply(query, key, value), levels, block_q=32, block_kv=32)
    exact, low = (
        scaled_dot_product_attention(*(x.to(dtype) for x in (query, key, value)), enable_gqa=True)
        for dtype in (torch.float64, torch.float32)
    )
    assert_within_error_budget(got, exact, low, input_dtype=torch.float32)


def test_pooled_levels_come_nearer_to_dense() -> None:
    """Tokens of two kinds, mixed in every block: pairs of one kind say what each of them would."""
    torch.manual_seed(0)
    kinds = torch.randn(1, 1, 2, 16) * 3
    which = torch.randint(2, (256,))
    key = kinds[:, :, which] + 0.1 * torch.randn(1, 1, 256, 16)
    query, value = torch.randn(1, 1, 256, 16), torch.randn(1, 1, 2, 16)[:, :, which]
    dense = scaled_dot_product_attention(query, key, value)
    levels = torch.full((1, 1, 4, 4), 2, dtype=torch.int8)

    def error(keys: Tensor, values: Tensor) -> float:
        out = pyramid_attention(query, keys, values, levels, block_q=64, block_kv=64)
        return float((out - dense).norm() / dense.norm())

    order = kd_tree_order(query, key, block_kv=64)
    assert error(order.apply(key), order.apply(value)) < 0.3 * error(key, value)


@pytest.mark.parametrize("length", [1, 7, 100, 4096, 8191, 12287])
def test_samples_reach_the_end(length: int) -> None:
    """But for the few that do not make up equal parts."""
    key = torch.arange(length, dtype=torch.float32).view(1, 1, length, 1)
    samples = even_samples(key).flatten()
    step = -(-length // 4096)
    assert torch.equal(samples, key.flatten()[::step][: len(samples)])
    assert length - samples[-1] <= 8 * step


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_numbers_at_the_ends_of_a_dtype_are_still_ordered(dtype: torch.dtype) -> None:
    query, key, _ = inputs(128)
    for size in (0.0, 1e-4, 1e4):
        order = kd_tree_order((query * size).to(dtype), (key * size).to(dtype), block_kv=32)
        assert torch.equal(order.order.sort(-1).values, torch.arange(128).expand_as(order.order))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_kv": 24}, "block_kv must be a power of two"),
        ({"num_directions": 0}, "num_directions must be 1 to the head_dim 16, got 0"),
        ({"num_directions": 17}, "num_directions must be 1 to the head_dim 16, got 17"),
        ({"grid": VideoGrid(frames=1, height=1, width=1)}, "grid must have the 64 tokens of key, got 1"),
        ({"base": gilbert_order(VideoGrid(frames=1, height=1, width=1))}, "base must have the 64 tokens of key"),
        ({"query": torch.zeros(2, 4, 64, 16, device="meta")}, "query must be on key's device cpu, got meta"),
        ({"query": torch.zeros(2, 3, 64, 16)}, r"query must have the batch and head_dim of key \[2, 2, 64, 16\]"),
    ],
    ids=str,
)
def test_wrong_arguments(change: dict[str, object], message: str) -> None:
    query, key, _ = inputs(64)
    given_ = {"query": query, "key": key, "block_kv": 16} | change
    with pytest.raises(ValueError, match=message):
        kd_tree_order(given_.pop("query"), given_.pop("key"), **given_)


@pytest.mark.gpu
def test_on_a_gpu_the_host_does_not_wait() -> None:
    grid = VideoGrid(frames=5, height=17, width=19, text=30)
    query, key, value = make_qkv(
        heads=4, kv_heads=2, q_len=grid.seq_len, head_dim=64, dtype=torch.bfloat16, device="cuda"
    )
    base = gilbert_order(grid)

    def run() -> AttentionOrder:
        order = AttentionOrder(base, kd_tree_order(query, key, block_kv=64, grid=grid, base=base))
        order.undo(order.apply(query, key, value)[0])
        return order

    run()
    torch.cuda.set_sync_debug_mode("error")
    try:
        order, again = run(), run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert order.key is not None
    places = torch.arange(grid.seq_len, device="cuda").expand(1, 2, -1)
    assert torch.equal(order.key.order.sort(dim=-1).values, places)
    assert torch.equal(order.apply(query, key, value)[1], again.apply(query, key, value)[1])
