"""Orders by cluster: where k-means starts from in each call, and how long that is kept."""

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from psa_config import Preset, PyramidSparseAttention
from psa_integrations import PyramidAttention, apply_pyramid_sparse_attention
from psa_integrations.attention import sparse_attention
from psa_integrations.build import content_orders
from psa_integrations.clusters import ClusterOrders
from psa_kernels.testing import make_qkv
from psa_masks import AttentionOrder, MaskPolicy, SemanticOrder, VideoGrid, gilbert_order, semantic_order

MakePreset = Callable[..., Preset]

GRID = VideoGrid(frames=3, height=5, width=4, text=7, text_first=True)
SPARSE = (0.25, 0.4, 0.6, 0.75)


def settings(preset: Preset) -> PyramidSparseAttention:
    assert isinstance(preset.attention, PyramidSparseAttention)
    return preset.attention


@pytest.fixture
def orders(make_preset: MakePreset) -> ClusterOrders:
    preset = make_preset(SPARSE, rearrange_method="Semantic", num_clusters=6, cluster_iterations=1, seed=3)
    made = content_orders(settings(preset), GRID)
    assert made is not None
    return made


def qk(seed: int, **changes: Any) -> tuple[Tensor, Tensor]:
    """Queries and keys of a call, GQA."""
    return make_qkv(**{"heads": 4, "kv_heads": 2, "q_len": GRID.seq_len, "head_dim": 8} | changes, seed=seed)[:2]


def assert_starts_from(order: AttentionOrder, tensors: tuple[Tensor, Tensor], start: AttentionOrder | None) -> None:
    """Both sides are one iteration from the centroids of `start`, or from tokens."""
    for side, x in zip(("query", "key"), tensors, strict=True):
        before = None if start is None else getattr(start, side).centroids
        expected = semantic_order(x, 6, grid=GRID, centroids=before, num_iterations=1, seed=3)
        made = getattr(order, side)
        assert isinstance(made, SemanticOrder)
        assert torch.equal(made.order, expected.order)
        assert torch.equal(made.centroids, expected.centroids)


def test_a_step_starts_from_the_one_before(orders: ClusterOrders) -> None:
    first, second, third = (orders(*qk(step), step=step) for step in (4, 5, 7))
    assert_starts_from(first, qk(4), None)
    assert_starts_from(second, qk(5), first)
    assert_starts_from(third, qk(7), second)


def test_calls_of_one_step_start_alike(orders: ClusterOrders) -> None:
    """With and without the prompt, say; what the later one leaves goes on."""
    first = [orders(*qk(seed), step=0) for seed in (0, 1)]
    second = [orders(*qk(seed), step=1) for seed in (2, 3)]
    for seed, order in enumerate(first):
        assert_starts_from(order, qk(seed), None)
    for seed, order in enumerate(second):
        assert_starts_from(order, qk(2 + seed), first[1])


def test_layers_have_their_own(orders: ClusterOrders) -> None:
    first = [orders(*qk(layer), step=0, layer=layer) for layer in (0, 1)]
    for layer in (1, 0):
        assert_starts_from(orders(*qk(5), step=1, layer=layer), qk(5), first[layer])


@pytest.mark.parametrize("steps", [[0], [0, 1], [0, 1, 2]])
def test_a_run_starts_anew_wherever_the_last_one_ended(orders: ClusterOrders, steps: list[int]) -> None:
    for step in steps:
        orders(*qk(step), step=step)
    again = orders(*qk(9), step=0)
    assert_starts_from(again, qk(9), None)
    assert_starts_from(orders(*qk(8), step=1), qk(8), again)


def test_without_a_step_every_call_starts_anew(orders: ClusterOrders) -> None:
    for seed in (0, 1):
        assert_starts_from(orders(*qk(seed), step=None), qk(seed), None)


@pytest.mark.parametrize("changes", [{"batch": 2}, {"dtype": torch.float64}, {"head_dim": 9}])
def test_centroids_of_another_form_are_not_used(orders: ClusterOrders, changes: dict[str, Any]) -> None:
    orders(*qk(0), step=0)
    assert_starts_from(orders(*qk(1, **changes), step=1), qk(1, **changes), None)


def test_hybrid_leaves_queries_on_the_curve(make_preset: MakePreset) -> None:
    chosen = settings(make_preset(SPARSE, rearrange_method="Hybrid", num_clusters=6))
    curve = gilbert_order(GRID)
    made = content_orders(chosen, GRID, base=curve)
    assert made is not None
    query, key = qk(0)
    order = made(query, key, step=None)
    assert order.query is curve
    assert isinstance(order.key, SemanticOrder)
    assert torch.equal(order.key.order, semantic_order(key, 6, grid=GRID, base=curve, num_iterations=2).order)
    # Where tokens come in the order of the curve already, queries stay as they are.
    in_order = content_orders(chosen, GRID)
    assert in_order is not None
    assert in_order(query, key, step=None).query is None


@pytest.mark.parametrize("changes", [{}, {"rearrange_method": "Cube"}, {"use_rearrange": False}])
def test_other_orders_have_no_clusters(changes: dict[str, Any], make_preset: MakePreset) -> None:
    changes = {"num_clusters": 6} | changes
    assert content_orders(settings(make_preset(SPARSE, **changes)), GRID) is None


def test_a_causal_policy_is_refused() -> None:
    query, key, value = make_qkv(q_len=40)
    policy = MaskPolicy(mode="quota", bounds=(1.0,), block_q=32, block_kv=32, is_causal=True)
    with pytest.raises(ValueError, match="policy must not be causal where tokens are reordered, got is_causal True"):
        sparse_attention(query, key, value, policy, order=lambda q, k: AttentionOrder(None, semantic_order(k, 4)))


def test_the_module_follows_the_step_it_is_told(make_preset: MakePreset) -> None:
    preset = make_preset(SPARSE, rearrange_method="Semantic", num_clusters=6, cluster_iterations=1)
    first, second = (make_qkv(q_len=GRID.seq_len, seed=seed) for seed in (0, 1))
    attention = PyramidAttention(preset, GRID)
    outs = [[attention(*qkv, step=step) for step, qkv in enumerate((first, second))] for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*outs, strict=True))
    assert torch.equal(outs[0][0], attention(*first))
    assert not torch.equal(outs[0][1], attention(*second))


@pytest.mark.parametrize("name", ["wan21", "cogvideox_5b"])
@pytest.mark.parametrize("method", ["Semantic", "Hybrid"])
def test_in_a_pipeline(
    name: str, method: str, build: Callable[[str], Any], run: Callable[..., Tensor], make_preset: MakePreset
) -> None:
    """Runs are alike, whatever ran before; what is kept goes when the preset is taken off."""
    pipeline = build(name)
    untouched = run(pipeline)
    sparse = make_preset(SPARSE, rearrange_method=method, num_clusters=9, cluster_iterations=1, warmup_steps=1)
    with apply_pyramid_sparse_attention(pipeline, sparse) as handle:
        first = run(pipeline)
        run(pipeline, steps=2)
        run(pipeline, width=128)
        assert torch.equal(run(pipeline), first)
        assert handle.stats().dense_steps() == [0]
        kept = [
            weakref.ref(left.key)
            for forward in handle._sites[0]._forwards.values()
            for left in forward.contents._last.values()
        ]
        assert kept
    gc.collect()
    assert all(ref() is None for ref in kept)
    assert not torch.equal(first, untouched)
    assert torch.equal(run(pipeline), untouched)


@pytest.mark.parametrize(
    ("steps", "is_one_run"),
    [
        ([(1, 10), (2, 10)], True),
        ([(1, 10), (2, 40)], False),  # of a run of another length
        ([(1, 10), (0, 10), (2, 10)], False),  # a dense step tells too
        ([(2, None), (3, None)], True),
    ],
)
@torch.no_grad()
def test_another_run_of_a_transformer(
    steps: list[tuple[int, int | None]],
    is_one_run: bool,
    build: Callable[[str], Any],
    make_preset: MakePreset,
    wan_call: dict[str, Tensor],
) -> None:
    transformer = build("wan21").transformer
    sparse = make_preset(SPARSE, rearrange_method="Hybrid", num_clusters=9, cluster_iterations=1, warmup_steps=1)

    def last_of(steps: list[tuple[int, int | None]]) -> Tensor:
        with apply_pyramid_sparse_attention(transformer, sparse) as handle:
            for index, total in steps:
                with handle.at_step(index, total):
                    flow: Tensor = transformer(**wan_call).sample
        return flow

    assert torch.equal(last_of(steps), last_of(steps[-1:])) != is_one_run


def test_too_many_clusters_are_refused_before_the_dense_steps(
    build: Callable[[str], Any], run: Callable[..., Tensor], make_preset: MakePreset
) -> None:
    sparse = make_preset(SPARSE, rearrange_method="Hybrid", num_clusters=1000, warmup_steps=1)
    pipeline = build("wan21")
    with apply_pyramid_sparse_attention(pipeline, sparse) as handle:
        with pytest.raises(ValueError, match=r"num_clusters must be at most the \d+ video tokens of VideoGrid"):
            run(pipeline)
        assert handle.stats().calls == 0
