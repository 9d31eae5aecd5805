"""``leading_directions`` on every backend against its oracle, and the oracle against a decomposition."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from psa_kernels import leading_directions
from psa_kernels.testing import assert_within_error_budget


def moments(leading, dim, *, fall=0.0, seed=0, device="cpu", dtype=torch.float32):
    """Second moments of queries and covariance of keys; feature i of these is smaller by ``i ** fall``."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.arange(1, dim + 1) ** -fall
    samples = torch.randn(2, *leading, 3 * dim, dim, generator=generator, dtype=torch.float64)
    seen, spread = samples[0].mT @ samples[0], (samples[1] * sizes).mT @ (samples[1] * sizes)
    return (1e5 * seen).to(device, dtype), (1e-4 * spread).to(device, dtype)


def assert_as_the_oracle(seen, spread, count, impl):
    out = leading_directions(seen, spread, count, impl=impl)
    exact = leading_directions(seen.double(), spread.double(), count, impl="reference")
    assert_within_error_budget(out, exact, leading_directions(seen, spread, count, impl="reference"))


def test_directions_are_those_of_the_oracle(backend):
    @settings(max_examples=backend.examples // 2)
    @given(
        leading=st.lists(st.integers(1, 2), max_size=2),
        dim=st.integers(2, 40),
        count=st.integers(1, 5),
        fall=st.sampled_from([0.0, 0.5, 1.0]),
        seed=st.integers(0, 2**32),
    )
    def check(leading, dim, count, fall, seed):
        seen, spread = moments(leading, dim, fall=fall, seed=seed, device=backend.device)
        assert_as_the_oracle(seen, spread, min(count, dim), backend.impl)

    check()


@pytest.mark.parametrize(("dim", "count"), [(1, 1), (64, 8), (128, 8), (256, 3)])
def test_sizes_of_heads(backend, dim, count):
    assert_as_the_oracle(*moments([1], dim, fall=0.5, device=backend.device), count, backend.impl)


def test_oracle_finds_eigenvectors_with_their_scale():
    """Of matrices whose eigenvalues lie apart, where 7 steps are enough."""
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    seen = root @ root.T
    turned = torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=torch.float64)).Q
    inner = turned @ torch.diag(10.0 ** -torch.arange(0, 18, 3, dtype=torch.float64)) @ turned.T  # S^(1/2) C S^(1/2)
    values, vectors = torch.linalg.eigh(seen)
    half = vectors @ torch.diag(values.sqrt()) @ vectors.T
    spread = torch.linalg.inv(half) @ inner @ torch.linalg.inv(half)
    found = leading_directions(seen, spread, 2, impl="reference")
    expected = half @ turned[:, :2]
    expected = expected / expected.norm(dim=0).max()
    # The ridge moves them by what it is beside the second eigenvalue, times how far S is from round.
    assert ((found.abs() - expected.abs()).abs() < 1e-6 / 1e-3 * values[-1] / values[0]).all()


def test_scales_do_not_matter(backend):
    seen, spread = moments([1], 16, device=backend.device)
    expected = leading_directions(seen, spread, 2, impl=backend.impl)
    assert torch.equal(leading_directions(seen * 2.0**40, spread * 2.0**-40, 2, impl=backend.impl), expected)


# The interpreter's maximum, by numpy, warns where all numbers are NaN.
@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")
def test_nothing_and_no_number(backend):
    """Zeros have directions like any other; NaN stays NaN, without an error."""
    zero = torch.zeros(1, 16, 16, device=backend.device)
    assert leading_directions(zero, zero, 3, impl=backend.impl).isfinite().all()
    one = torch.ones(1, 16, 16, device=backend.device)  # of rank 1
    assert leading_directions(one, one, 3, impl=backend.impl).isfinite().all()
    assert leading_directions(zero * float("nan"), one, 3, impl=backend.impl).isnan().any()


def test_same_bits_twice_and_any_strides(backend):
    seen, spread = moments([2], 16, device=backend.device)
    expected = leading_directions(seen, spread, 3, impl=backend.impl)
    apart = torch.stack([seen, spread], -1)
    assert torch.equal(leading_directions(*apart.unbind(-1), 3, impl=backend.impl), expected)


def test_what_triton_does_not_take_goes_to_torch_by_itself(monkeypatch):
    from psa_kernels import checks

    monkeypatch.setattr(checks, "resolve_impl", lambda impl, tensor: impl or "triton")  # as on a GPU
    for dim, count, dtype in ((40, 33, torch.float32), (8, 2, torch.float64)):
        seen, spread = moments([], dim, dtype=dtype)
        found = leading_directions(seen, spread, count)
        assert torch.equal(found, leading_directions(seen, spread, count, impl="torch"))


def test_nothing_flows_back():
    seen, spread = moments([], 8)
    assert not leading_directions(seen.requires_grad_(), spread, 2).requires_grad


@pytest.mark.gpu
def test_on_a_gpu_without_waiting_and_in_a_graph():
    (seen, spread), (other, others) = (moments([12], 128, seed=seed, device="cuda") for seed in (0, 1))
    leading_directions(seen, spread, 8)
    torch.cuda.set_sync_debug_mode("error")
    try:
        leading_directions(seen, spread, 8)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = leading_directions(seen, spread, 8)
    seen.copy_(other)
    spread.copy_(others)
    graph.replay()
    assert torch.equal(found, leading_directions(other, others, 8))
