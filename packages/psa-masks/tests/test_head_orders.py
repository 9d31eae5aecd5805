"""Orders of a head's own: permutations with an exact inverse, made of clusters."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from psa_kernels import kmeans
from psa_kernels.testing import assert_within_error_budget, make_qkv
from psa_masks import (
    AttentionOrder,
    HeadOrder,
    SemanticOrder,
    TokenOrder,
    VideoGrid,
    cube_order,
    gilbert_order,
    hybrid_order,
    semantic_order,
)
from psa_masks.order.semantic import path_through

seeds = st.integers(0, 2**32)
sides = st.integers(1, 6)
grids = st.builds(
    VideoGrid, frames=sides, height=sides, width=sides, text=st.integers(0, 5), text_first=st.booleans()
)  # fmt: skip
GRID = VideoGrid(frames=3, height=5, width=6, text=7)


def tokens(length: int, *, batch: int = 2, heads: int = 2, dim: int = 5, seed: int = 0) -> Tensor:
    return make_qkv(batch=batch, heads=heads, q_len=length, head_dim=dim, seed=seed)[0]


def assert_inverse(order: HeadOrder, x: Tensor) -> None:
    places = torch.arange(x.shape[2]).expand_as(order.order)
    assert torch.equal(order.order.sort(dim=-1).values, places)
    assert torch.equal(order.order.gather(2, order.inverse), places)
    before = x.clone()
    assert torch.equal(order.undo(order.apply(x)), x)
    assert torch.equal(order.apply(order.undo(x, -2), 2), x)
    for b, h in ((0, 0), (-1, -1)):
        assert torch.equal(order.apply(x)[b, h], x[b, h, order.order[b, h]])
    assert torch.equal(x, before)


@given(batch=st.integers(1, 2), heads=st.integers(1, 3), length=st.integers(1, 50), seed=seeds)
def test_any_permutations_are_an_order(batch: int, heads: int, length: int, seed: int) -> None:
    noise = torch.rand(batch, heads, length, generator=torch.Generator().manual_seed(seed))
    order = HeadOrder(noise.argsort())
    assert_inverse(order, tokens(length, batch=batch, heads=heads))
    assert torch.equal(order.apply(noise), noise.sort().values)  # of tokens without features too


@given(grid=grids, seed=seeds, share=st.floats(0, 1), heads=st.integers(1, 3), data=st.data())
def test_tokens_of_a_cluster_stand_together(
    grid: VideoGrid, seed: int, share: float, heads: int, data: st.DataObject
) -> None:
    num_clusters = max(1, round(share * grid.video_len))
    x = tokens(grid.seq_len, heads=heads, seed=seed)
    base = data.draw(st.sampled_from([None, gilbert_order(grid), cube_order(grid, (1, 2, 2))]))
    order = semantic_order(x, num_clusters, grid=grid, base=base, num_iterations=2)
    assert_inverse(order, x)
    start, stop = grid.text_range
    assert torch.equal(order.order[..., start:stop], torch.arange(start, stop).expand(2, heads, -1))

    start, stop = grid.video_range
    video = order.order[..., start:stop] - start
    clusters = kmeans(x[:, :, start:stop], num_clusters, num_iterations=2)
    assert torch.equal(order.centroids, clusters.centroids)
    sequence = clusters.assignments.gather(2, video)
    changes = sequence.diff(dim=-1) != 0
    assert torch.equal(changes.sum(-1) + 1, (clusters.counts > 0).sum(-1))  # each cluster comes once
    within = (torch.arange(grid.seq_len) if base is None else base.inverse)[start:stop][video]
    assert ((within.diff(dim=-1) > 0) | changes).all()  # and its tokens in the order of the base


def test_same_arguments_same_order_and_no_random_state() -> None:
    x, state = tokens(GRID.seq_len), torch.get_rng_state()
    order, again = (semantic_order(x, 9, grid=GRID, seed=4) for _ in range(2))
    assert torch.equal(order.order, again.order)
    assert torch.equal(torch.get_rng_state(), state)
    # A head's order depends on nothing but its own tokens.
    alone = semantic_order(x[1:, 1:], 9, grid=GRID, seed=4)
    assert torch.equal(alone.order, order.order[1:, 1:])


@given(seed=seeds)
def test_centroids_carry_over(seed: int) -> None:
    """Two calls of which the second starts from the first's centroids are one call of as many iterations."""
    x = tokens(60, seed=seed)
    first = semantic_order(x, 7, num_iterations=2)
    second = semantic_order(x, 7, num_iterations=3, centroids=first.centroids)
    at_once = semantic_order(x, 7, num_iterations=5)
    assert torch.equal(second.order, at_once.order)
    assert torch.equal(second.centroids, at_once.centroids)


def test_clusters_follow_the_direction_in_which_they_differ() -> None:
    generator = torch.Generator().manual_seed(0)
    along = torch.randn(2, 3, 20, generator=generator)
    axis = torch.nn.functional.normalize(torch.randn(8, generator=generator), dim=0)
    place = path_through(along[..., None] * axis + 5)
    rising = along.argsort(dim=-1).argsort(dim=-1)
    # Nothing says which end comes first.
    assert ((place == rising).all(dim=-1) | (place == 19 - rising).all(dim=-1)).all()


def test_equal_clusters_stay_in_sequence() -> None:
    assert path_through(torch.ones(1, 1, 4, 3)).tolist() == [[[0, 1, 2, 3]]]


@given(grid=grids, seed=seeds)
def test_queries_along_the_curve_and_keys_by_cluster(grid: VideoGrid, seed: int) -> None:
    query, key, value = make_qkv(heads=4, kv_heads=2, q_len=grid.seq_len, head_dim=8, seed=seed)
    order = hybrid_order(grid, key, 1 + grid.video_len // 8)
    q, k, v = order.apply(query, key, value)
    assert torch.equal(q, gilbert_order(grid).apply(query, 2))
    expected = semantic_order(key, 1 + grid.video_len // 8, grid=grid, base=gilbert_order(grid))
    assert torch.equal(k, expected.apply(key))
    assert torch.equal(v, expected.apply(value))
    assert torch.equal(order.undo(q), query)


def test_attention_does_not_see_the_order() -> None:
    query, key, value = make_qkv(heads=4, kv_heads=2, q_len=GRID.seq_len, head_dim=8)
    exact = scaled_dot_product_attention(query.double(), key.double(), value.double(), enable_gqa=True)
    low = scaled_dot_product_attention(query, key, value, enable_gqa=True)
    by_cluster = AttentionOrder(semantic_order(query, 6, grid=GRID), semantic_order(key, 6, grid=GRID))
    for order in (by_cluster, hybrid_order(GRID, key, 6), AttentionOrder(None, None)):
        q, k, v = order.apply(query, key, value)
        out = order.undo(scaled_dot_product_attention(q, k, v, enable_gqa=True))
        assert_within_error_budget(out, exact, low)


@pytest.mark.parametrize(
    ("order", "error", "message"),
    [
        (torch.zeros(1, 2, 3), TypeError, "order must be an int64 tensor, got torch.float32"),
        ([[[0]]], TypeError, "order must be an int64 tensor, got list"),
        (torch.arange(3), ValueError, r"order must have shape \[B, H, L\], got \[3\]"),
        (torch.tensor([[[0, 0, 2]]]), ValueError, r"order must hold each of 0..2 once a head, got \[0, 0, 2\]"),
        (torch.tensor([[[0, 1, 3]]]), ValueError, r"order must hold each of 0..2 once a head, got \[0, 1, 3\]"),
    ],
)
def test_order_refuses(order: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        HeadOrder(order)


def test_apply_refuses_what_does_not_go_with_it() -> None:
    order = HeadOrder(torch.arange(4).expand(2, 3, 4).contiguous())
    with pytest.raises(ValueError, match=r"x must have shape \[2, 3, 4, '...'\], got \[2, 6, 4, 5\]"):
        order.apply(torch.zeros(2, 6, 4, 5))
    with pytest.raises(ValueError, match=r"dim must be 2, where the tokens of \[2, 3, 4, 5\] are, got 3"):
        order.undo(torch.zeros(2, 3, 4, 5), 3)
    with pytest.raises(ValueError, match="x must be on the order's device cpu, got meta"):
        order.apply(torch.zeros(2, 3, 4, 5, device="meta"))
    with pytest.raises(TypeError, match="x must be a tensor, got list"):
        order.apply([1])


def test_semantic_order_refuses() -> None:
    x = tokens(GRID.seq_len)
    everywhere = TokenOrder(torch.arange(GRID.seq_len).flip(0))
    with pytest.raises(ValueError, match="num_clusters must be at most the 90 tokens of x, got 91"):
        semantic_order(x, 91, grid=GRID)
    with pytest.raises(ValueError, match=r"grid must have the 96 tokens of x, got 97 in VideoGrid"):
        semantic_order(x[:, :, 1:], 5, grid=GRID)
    with pytest.raises(TypeError, match=r"grid must be a psa_masks.VideoGrid, got tuple"):
        semantic_order(x, 5, grid=(3, 5, 6))
    with pytest.raises(ValueError, match=r"base must keep the text tokens, all outside of 0\.\.90, where they are"):
        semantic_order(x, 5, grid=GRID, base=everywhere)
    with pytest.raises(ValueError, match="base must have the 97 tokens of x, got 4"):
        semantic_order(x, 5, base=TokenOrder.identity(4))
    with pytest.raises(TypeError, match=r"base must be a psa_masks.TokenOrder, got SemanticOrder"):
        semantic_order(x, 5, base=semantic_order(x, 5))
    with pytest.raises(ValueError, match=r"x must have shape \[B, H, L, D\], got \[2, 97, 5\]"):
        semantic_order(x[0], 5)
    with pytest.raises(TypeError, match="x must be a tensor, got NoneType"):
        semantic_order(None, 5)


@pytest.mark.gpu
def test_on_a_gpu_the_host_does_not_wait() -> None:
    grid = VideoGrid(frames=5, height=17, width=19, text=30)
    query, key, value = make_qkv(
        heads=4, kv_heads=2, q_len=grid.seq_len, head_dim=64, dtype=torch.bfloat16, device="cuda"
    )

    def run() -> AttentionOrder:
        order = hybrid_order(grid, key, 40)
        order.undo(order.apply(query, key, value)[0])
        keys = order.key
        assert isinstance(keys, SemanticOrder)
        semantic_order(query, 40, num_iterations=1).apply(query)
        return AttentionOrder(None, semantic_order(key, 40, grid=grid, centroids=keys.centroids))

    run()
    torch.cuda.set_sync_debug_mode("error")
    try:
        order, again = run(), run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for keys in (order.key, again.key):
        assert isinstance(keys, HeadOrder)
        places = torch.arange(grid.seq_len, device="cuda").expand_as(keys.order)
        assert torch.equal(keys.order.sort(dim=-1).values, places)
        assert torch.equal(keys.undo(keys.apply(key)), key)
    assert torch.equal(order.apply(query, key, value)[1], again.apply(query, key, value)[1])
