"""``kmeans`` on every backend against its oracle, and what holds of Lloyd's algorithm whoever runs it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from psa_kernels import kmeans
from psa_kernels.kmeans.reference import distances
from psa_kernels.testing import VIEWS, assert_within_error_budget, error_budget, make_qkv


def assert_nearest(x, centroids, assignments):
    """Each token's centroid is as near as the nearest.

    Two distances are compared, and rounding may have moved each of them by a budget.
    """
    exact = distances(x.double(), centroids.double())
    low = distances(x, centroids.to(x.dtype))
    budget = error_budget(exact, low, torch.finfo(x.dtype).eps)
    chosen = exact.gather(-1, assignments.long().unsqueeze(-1)).squeeze(-1)
    assert (chosen - exact.min(-1).values).max() <= 2 * budget


def assert_means(x, before, clusters):
    """Centroids and counts are those of the assignments; an empty cluster has the centroid from before."""
    num_clusters = before.shape[2]
    member = torch.nn.functional.one_hot(clusters.assignments.long(), num_clusters).transpose(2, 3)  # [B, H, K, L]
    counts = member.sum(-1)
    assert clusters.counts.dtype == torch.int32
    assert torch.equal(clusters.counts.long(), counts)
    filled = counts > 0
    assert torch.equal(clusters.centroids[~filled], before[~filled])
    exact, low = (
        ((member.to(dtype) @ x.to(dtype)) / counts.unsqueeze(-1))[filled] for dtype in (torch.float64, before.dtype)
    )
    assert_within_error_budget(clusters.centroids[filled], exact, low)


@st.composite
def shapes(draw):
    """``[B, H, L, D]`` and a number of clusters, often one that no tile divides."""
    length = draw(st.integers(1, 150))
    shape = (draw(st.integers(1, 2)), draw(st.integers(1, 3)), length, draw(st.integers(1, 70)))
    return shape, draw(st.integers(1, min(length, 80)))


def make_tokens(shape, *, dtype, device, seed):
    batch, heads, length, head_dim = shape
    return make_qkv(batch=batch, heads=heads, q_len=length, head_dim=head_dim, dtype=dtype, device=device, seed=seed)[0]


def test_an_iteration_is_that_of_the_oracle(backend):
    @settings(max_examples=backend.examples)
    @given(case=shapes(), dtype=st.sampled_from(backend.dtypes), seed=st.integers(0, 2**16))
    def check(case, dtype, seed):
        shape, num_clusters = case
        x = make_tokens(shape, dtype=dtype, device=backend.device, seed=seed)
        before = kmeans(x, num_clusters, num_iterations=1, seed=seed, impl="reference").centroids
        clusters = kmeans(x, num_clusters, centroids=before, num_iterations=1, impl=backend.impl)
        assert clusters.assignments.dtype == torch.int32
        assert clusters.centroids.dtype == torch.float32
        assert_nearest(x, before, clusters.assignments)
        assert_means(x, before, clusters)

    check()


def test_ties_go_to_the_first(backend):
    """Small whole numbers, among which sums are exact and equal distances abound: equal to the oracle everywhere."""

    @settings(max_examples=backend.examples)
    @given(case=shapes(), seed=st.integers(0, 2**16))
    def check(case, seed):
        shape, num_clusters = case
        x = torch.randint(-1, 2, shape, generator=torch.Generator().manual_seed(seed)).float().to(backend.device)
        before = x[:, :, :num_clusters].contiguous()
        clusters = kmeans(x, num_clusters, centroids=before, num_iterations=1, impl=backend.impl)
        expected = kmeans(x, num_clusters, centroids=before, num_iterations=1, impl="reference")
        assert torch.equal(clusters.assignments, expected.assignments)
        assert torch.equal(clusters.counts, expected.counts)

    check()


def test_copies_of_a_centroid_stay_empty(backend):
    """However far behind the first they are listed."""
    for dtype in backend.dtypes:
        # Whole numbers, because equal columns of a product may round apart.
        x = make_tokens((1, 2, 150, 24), dtype=dtype, device=backend.device, seed=4).round()
        start = x[:, :, ::3].float().repeat(1, 1, 3, 1)
        clusters = kmeans(x, 150, centroids=start, num_iterations=1, impl=backend.impl)
        assert (clusters.assignments < 50).all()
        assert torch.equal(clusters.centroids[:, :, 50:], start[:, :, 50:])


def test_oracle_takes_the_nearest():
    x = torch.tensor([0.0, 1.0, 2.0, 10.0]).view(1, 1, 4, 1)
    clusters = kmeans(x, 3, centroids=torch.tensor([[[[2.0], [0.0], [-50.0]]]]), num_iterations=1, impl="reference")
    # 1 is as far from 2 as from 0 and goes to the first of them.
    assert clusters.assignments.tolist() == [[[1, 0, 0, 0]]]
    assert clusters.counts.tolist() == [[[3, 1, 0]]]
    assert clusters.centroids.flatten().tolist() == [torch.tensor(13 / 3).item(), 0.0, -50.0]


@given(case=shapes(), seed=st.integers(0, 2**16))
def test_no_iteration_moves_tokens_away_from_their_centroids(case, seed):
    shape, num_clusters = case
    x = make_tokens(shape, dtype=torch.float64, device="cpu", seed=seed)
    clusters, least = None, float("inf")
    for _ in range(4):
        before = None if clusters is None else clusters.centroids
        clusters = kmeans(x, num_clusters, centroids=before, num_iterations=1, seed=seed)
        assigned = clusters.assignments.long().unsqueeze(-1)
        total = distances(x, clusters.centroids).gather(-1, assigned).sum()
        assert total <= least * (1 + 1e3 * torch.finfo(torch.float64).eps)
        least = total


def test_iterations_follow_one_another(backend):
    for dtype in backend.dtypes:
        x = make_tokens((2, 2, 130, 24), dtype=dtype, device=backend.device, seed=1)
        clusters = kmeans(x, 9, num_iterations=1, seed=3, impl=backend.impl)
        for _ in range(2):
            clusters = kmeans(x, 9, centroids=clusters.centroids, num_iterations=1, impl=backend.impl)
        at_once = kmeans(x, 9, num_iterations=3, seed=3, impl=backend.impl)
        assert all(torch.equal(a, b) for a, b in zip(at_once, clusters, strict=True))


def test_same_bits_twice_and_no_random_state(backend):
    x = make_tokens((1, 3, 149, 40), dtype=torch.float16, device=backend.device, seed=2)
    before = torch.random.get_rng_state()
    first, again = (kmeans(x, 20, num_iterations=2, seed=7, impl=backend.impl) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert torch.equal(torch.random.get_rng_state(), before)
    other = kmeans(x, 20, num_iterations=2, seed=8, impl=backend.impl)
    assert not torch.equal(other.assignments, first.assignments)


def test_an_empty_cluster_keeps_its_centroid(backend):
    x = make_tokens((1, 2, 50, 16), dtype=torch.float32, device=backend.device, seed=0)
    start = torch.full((1, 2, 3, 16), 1e4, device=backend.device)
    start[:, :, 1] = 0
    clusters = kmeans(x, 3, centroids=start, num_iterations=3, impl=backend.impl)
    assert clusters.counts.tolist() == [[[0, 50, 0]] * 2]
    assert torch.equal(clusters.centroids[:, :, ::2], start[:, :, ::2])
    assert (start[:, :, 1] == 0).all()  # what was given is not written to


def test_as_many_clusters_as_tokens(backend):
    x = make_tokens((1, 1, 40, 16), dtype=torch.float32, device=backend.device, seed=0)
    clusters = kmeans(x, 40, num_iterations=1, impl=backend.impl)
    assert torch.equal(clusters.assignments.flatten().cpu(), torch.arange(40, dtype=torch.int32))
    assert torch.equal(clusters.centroids, x)


@pytest.mark.parametrize("view", VIEWS)
def test_strides_do_not_matter(backend, view):
    for dtype in backend.dtypes:
        x = VIEWS[view](make_tokens((1, 2, 75, 32), dtype=dtype, device=backend.device, seed=0))
        before = x[:, :, ::9].float()
        clusters = kmeans(x, before.shape[2], centroids=before.mT.contiguous().mT, num_iterations=1, impl=backend.impl)
        packed = x.clone(memory_format=torch.contiguous_format)
        expected = kmeans(packed, before.shape[2], centroids=before, num_iterations=1, impl=backend.impl)
        assert_nearest(packed, before, clusters.assignments)
        assert torch.equal(clusters.assignments, expected.assignments)
        assert_means(packed, before, clusters)


def test_a_token_that_is_no_number_is_in_some_cluster(backend):
    x = make_tokens((1, 1, 40, 16), dtype=torch.float32, device=backend.device, seed=0)
    x[0, 0, 3] = float("nan")
    assignments = kmeans(x, 5, num_iterations=2, impl=backend.impl).assignments
    assert ((assignments >= 0) & (assignments < 5)).all()


def test_nothing_flows_back():
    x = torch.rand(1, 1, 8, 4, requires_grad=True)
    assert not kmeans(x, 2).centroids.requires_grad


@pytest.mark.gpu
def test_many_heads_and_far_offsets():
    """More heads than a grid axis holds, and the last heads of a view whose offsets overflow 32 bits."""
    x = make_tokens((3, 22_000, 20, 16), dtype=torch.float16, device="cuda", seed=0)
    clusters = kmeans(x, 4, num_iterations=2)
    alone = kmeans(x[2:, 21_990:], 4, num_iterations=2)
    assert all(torch.equal(a[2:, 21_990:], b) for a, b in zip(clusters, alone, strict=True))
    fused = torch.empty(1, 70_000, 3, 90, 128, dtype=torch.bfloat16, device="cuda")
    small = make_tokens((1, 1, 70_000, 128), dtype=torch.bfloat16, device="cuda", seed=0)
    view = fused[:, :, 2].transpose(1, 2)[:, -2:]
    view.copy_(small.expand_as(view))
    far, near = kmeans(view, 200, num_iterations=1), kmeans(small, 200, num_iterations=1)
    assert all(torch.equal(a[:, 1:], b) for a, b in zip(far, near, strict=True))


@pytest.mark.gpu
def test_on_a_gpu_without_waiting_and_in_a_graph():
    x, other = (make_tokens((1, 2, 300, 64), dtype=torch.bfloat16, device="cuda", seed=seed) for seed in (0, 1))
    kmeans(x, 20)
    torch.cuda.set_sync_debug_mode("error")
    try:
        kmeans(x, 20)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        clusters = kmeans(x, 20)
    x.copy_(other)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(clusters, kmeans(other, 20), strict=True))


@pytest.mark.gpu
def test_no_compilation_for_a_new_length_or_number_of_clusters():
    from psa_kernels.kmeans.triton_fwd import _assign_kernel, _mean_kernel

    def compiled():
        return [len(next(iter(kernel.device_caches.values()))[0]) for kernel in (_assign_kernel, _mean_kernel)]

    def run(length, num_clusters):
        x = make_tokens((1, 16, length, 64), dtype=torch.float16, device="cuda", seed=0)
        kmeans(x, num_clusters, num_iterations=1)

    run(1000, 16)
    before = compiled()
    for length, num_clusters in ((1, 1), (7, 2), (16, 16), (1024, 64), (1040, 33), (2049, 1)):
        run(length, num_clusters)
    assert compiled() == before
