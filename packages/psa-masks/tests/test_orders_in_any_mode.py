"""Orders are cached between callers, so they must not depend on the mode of the first."""

from functools import partial

import pytest
import torch

from psa_masks import TokenOrder, VideoGrid, cube_order, gilbert_order, kd_tree_order, semantic_order

MAKERS = [gilbert_order, cube_order, partial(cube_order, along="gilbert")]


@pytest.mark.parametrize("make", MAKERS)
def test_an_order_made_in_inference_mode_serves_training(make):
    grid = VideoGrid(frames=3, height=5, width=11)  # a size no other test uses, so that nothing is cached yet
    with torch.inference_mode():
        order = make(grid)
        order.apply(torch.zeros(grid.seq_len), 0)
    x = torch.randn(grid.seq_len, requires_grad=True)
    order.undo(order.apply(x, 0), 0).sum().backward()
    assert torch.equal(x.grad, torch.ones(grid.seq_len))


def test_an_inference_tensor_may_be_an_order():
    with torch.inference_mode():
        order = TokenOrder(torch.tensor([2, 0, 1]))
    x = torch.randn(3, requires_grad=True)
    order.apply(x, 0).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("make", MAKERS)
def test_the_default_device_does_not_matter(make):
    grid = VideoGrid(frames=3, height=7, width=11)
    with torch.device("meta"):
        order = make(grid)
        given = TokenOrder(order.order)
    assert order.order.device.type == given.inverse.device.type == "cpu"


CURVE = gilbert_order(VideoGrid(frames=2, height=4, width=4))


@pytest.mark.parametrize(
    "make",
    [
        lambda x: kd_tree_order(x, x, block_kv=8, base=CURVE),
        lambda x: semantic_order(x, 3, base=CURVE),
        lambda x: CURVE,
    ],
    ids=["kd tree", "semantic", "curve"],
)
def test_there_and_back_compile_whole(make):
    def there_and_back(x):
        order = make(x)
        moved = order.apply(x, dim=2)
        return moved, order.undo(moved, dim=2)

    x = torch.randn(1, 2, 32, 8, generator=torch.Generator().manual_seed(0))
    compiled = torch.compile(there_and_back, fullgraph=True, backend="eager")(x)
    assert torch.equal(compiled[0], there_and_back(x)[0])
    assert torch.equal(compiled[1], x)


def test_an_order_of_what_has_no_values():
    x = torch.empty(1, 2, 32, 8, device="meta")
    assert kd_tree_order(x, x, block_kv=8).apply(x).shape == x.shape
    assert semantic_order(x, 3).undo(x).shape == x.shape


@pytest.mark.parametrize("make", [lambda x: kd_tree_order(x, x, block_kv=8), lambda x: semantic_order(x, 3)])
def test_vmap_orders_each_sample(make):
    x = torch.randn(2, 1, 2, 20, 8, generator=torch.Generator().manual_seed(0))
    mapped = torch.func.vmap(lambda sample: make(sample).apply(sample))(x)
    assert torch.equal(mapped, torch.stack([make(sample).apply(sample) for sample in x]))
