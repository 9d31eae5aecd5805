"""``permute_tokens`` on every backend: rows are moved, bit by bit, and gradients back."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from psa_kernels import permute_tokens
from psa_kernels.testing import VIEWS


def make(shape, *, dtype=torch.float32, device="cpu", seed=0):
    """Tokens, and an order for each head."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator).to(device, dtype)
    return x, torch.rand(shape[:3], generator=generator).argsort().to(device)


def moved(x, order):
    return torch.stack([x[b, h, order[b, h]] for b, h in torch.cartesian_prod(*map(torch.arange, x.shape[:2]))]).view(
        x.shape
    )


def test_rows_are_moved(backend):
    @settings(max_examples=backend.examples)
    @given(
        shape=st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 150), st.integers(1, 70)),
        dtype=st.sampled_from(backend.dtypes),
        seed=st.integers(0, 2**32),
    )
    def check(shape, dtype, seed):
        x, order = make(shape, dtype=dtype, device=backend.device, seed=seed)
        out = permute_tokens(x, order, impl=backend.impl)
        assert out.is_contiguous()
        assert torch.equal(out, moved(x, order))
        assert torch.equal(permute_tokens(x, order, impl="reference"), out)

    check()


@pytest.mark.parametrize("view", VIEWS)
def test_strides_do_not_matter(backend, view):
    x, order = make((1, 2, 75, 32), device=backend.device)
    x = VIEWS[view](x)
    for by in (order, order[:, :1].expand(1, 2, -1), order.mT.contiguous().mT):
        assert torch.equal(permute_tokens(x, by, impl=backend.impl), moved(x, by))


def test_wide_rows(backend):
    x, order = make((1, 1, 5, 2500), device=backend.device)
    assert torch.equal(permute_tokens(x, order, impl=backend.impl), moved(x, order))


def test_gradients_go_back_to_their_rows(backend):
    """Those of a gather, the second ones too, where what comes in is an expanded number and where it is not."""
    x, order = make((2, 2, 40, 16), device=backend.device)
    weight = make((2, 2, 40, 16), device=backend.device, seed=1)[0]
    gradients = []
    for put in (
        lambda y: permute_tokens(y, order, impl=backend.impl),
        lambda y: y.gather(2, order[..., None].expand_as(y)),
    ):
        y = x.clone().requires_grad_()
        (plain,) = torch.autograd.grad(put(y).sum(), y)
        (first,) = torch.autograd.grad((put(y).square() * weight).sum(), y, create_graph=True)
        (second,) = torch.autograd.grad((first * weight).sum(), y)
        gradients.append((plain, first.detach(), second))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.gpu
def test_many_heads_and_far_offsets():
    """More heads than a grid axis holds, and the last head of a view whose offsets overflow 32 bits."""
    x, order = make((3, 22_000, 5, 16), dtype=torch.float16, device="cuda")
    assert torch.equal(permute_tokens(x, order), x.gather(2, order[..., None].expand_as(x)))
    fused = torch.empty(1, 70_000, 3, 90, 128, dtype=torch.bfloat16, device="cuda")
    view = fused[:, :, 2].transpose(1, 2)[:, -1:]
    x, order = make((1, 1, 70_000, 128), dtype=torch.bfloat16, device="cuda")
    view.copy_(x)
    assert torch.equal(permute_tokens(view, order), permute_tokens(x, order))


@pytest.mark.gpu
def test_on_a_gpu_without_waiting_and_in_a_graph():
    (x, order), (other, other_order) = (make((1, 2, 300, 64), device="cuda", seed=seed) for seed in (0, 1))
    permute_tokens(x, order)
    torch.cuda.set_sync_debug_mode("error")
    try:
        permute_tokens(x, order)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = permute_tokens(x, order)
    x.copy_(other)
    order.copy_(other_order)
    graph.replay()
    assert torch.equal(out, permute_tokens(other, other_order))
