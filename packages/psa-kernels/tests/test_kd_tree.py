"""``kd_tree`` on every backend: equal to the oracle, ties and all, and what holds of the tree itself."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from psa_kernels import checks, kd_tree

SPECIAL = [0.0, -0.0, float("inf"), -float("inf"), float("nan"), -float("nan"), 1e-45, -1e-45, 65504.0, 3e38, -3e38]


def make_points(shape, values, seed):
    """Random numbers of several sizes; or only as many different ones as ``values`` says, so that ties abound."""
    generator = torch.Generator().manual_seed(seed)
    if values == 0:
        sizes = 10.0 ** torch.randint(-3, 4, (*shape[:-2], 1, 1), generator=generator)
        return sizes * torch.randn(shape, generator=generator)
    few = torch.cat([torch.tensor(SPECIAL), torch.randn(values, generator=generator)])
    few = few[torch.randperm(len(few), generator=generator)[:values]]
    return few[torch.randint(values, shape, generator=generator)]


@st.composite
def cases(draw, max_bits):
    shape = [
        *draw(st.lists(st.integers(0, 2), max_size=2)),
        2 ** draw(st.integers(0, max_bits)),
        draw(st.integers(1, 17)),
    ]
    return make_points(shape, draw(st.sampled_from([0, 1, 2, 5, 15])), draw(st.integers(0, 2**32)))


def test_orders_are_those_of_the_oracle(backend):
    @settings(max_examples=backend.examples)
    @given(points=cases(max_bits=4), dtype=st.sampled_from(backend.dtypes))
    def check(points, dtype):
        points = points.to(backend.device, dtype)
        order = kd_tree(points, impl=backend.impl)
        assert order.dtype == torch.int32
        assert order.is_contiguous()
        assert torch.equal(order.cpu(), kd_tree(points.cpu(), impl="reference"))

    check()


def test_large_blocks(backend):
    interpreted = backend.impl == "triton" and backend.device == "cpu"
    for size in (64,) if interpreted else (64, 128, 256):  # a sort of more takes seconds there
        for num_coordinates in (8, 40):
            points = make_points((1, size, num_coordinates), 0, seed=size).to(backend.device)
            order = kd_tree(points, impl=backend.impl)
            assert torch.equal(order.cpu(), kd_tree(points.cpu(), impl="reference"))


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_every_node_is_split_at_its_median(impl):
    """At each depth one half lies below the other along the coordinate that varies most; float64 sums, no near ties."""
    points = make_points((3, 64, 5), 0, seed=1)
    order = kd_tree(points, impl=impl).long()
    nodes = points.double().take_along_dim(order.unsqueeze(-1), 1)
    while nodes.shape[1] > 2:
        axis = nodes.var(1, correction=0).argmax(-1)
        along = nodes.take_along_dim(axis[:, None, None], 2).squeeze(2)
        low, high = along.chunk(2, dim=1)
        assert (low.amax(1) <= high.amin(1)).all()
        nodes = nodes.reshape(-1, nodes.shape[1] // 2, nodes.shape[2])


def test_one_coordinate_is_sorted_up_to_pairs(backend):
    points = torch.randperm(32, generator=torch.Generator().manual_seed(0)).to(backend.device, torch.float32)
    order = kd_tree(points.view(1, 32, 1), impl=backend.impl).long()
    assert torch.equal(points[order].view(16, 2).amin(1), torch.arange(0, 32, 2, device=backend.device).float())


def test_equal_tokens_stay_as_they_are(backend):
    points = torch.ones(2, 16, 3, device=backend.device)
    assert torch.equal(kd_tree(points, impl=backend.impl).cpu(), torch.arange(16, dtype=torch.int32).expand(2, 16))


def test_any_strides(backend):
    points = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0)).to(backend.device)
    for view in (points.mT, points.transpose(0, 2)[..., ::2], points[:1].expand(2, -1, -1).mT):
        assert torch.equal(kd_tree(view, impl=backend.impl), kd_tree(view.clone(), impl=backend.impl))


def test_float64_is_rounded_to_float32():
    points = torch.tensor([1 + 2**-50, 1.0, 3.0, 0.0], dtype=torch.float64).view(4, 1)
    assert kd_tree(points).tolist() == [3, 0, 1, 2]


def test_more_than_the_kernel_holds_goes_to_torch_by_itself(monkeypatch):
    monkeypatch.setattr(checks, "resolve_impl", lambda impl, tensor: impl or "triton")  # as on a GPU
    points = torch.rand(1, 256, 65, generator=torch.Generator().manual_seed(0))
    assert torch.equal(kd_tree(points), kd_tree(points, impl="torch"))


def test_nothing_flows_back():
    assert not kd_tree(torch.rand(3, 8, 2, requires_grad=True)).requires_grad


@pytest.mark.gpu
def test_on_a_gpu_without_waiting_and_in_a_graph():
    points, other = (make_points((2, 40, 128, 8), 0, seed).to("cuda", torch.bfloat16) for seed in (0, 1))
    kd_tree(points)
    torch.cuda.set_sync_debug_mode("error")
    try:
        kd_tree(points)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        order = kd_tree(points)
    points.copy_(other)
    graph.replay()
    assert torch.equal(order, kd_tree(other))
