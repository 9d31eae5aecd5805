"""Orders are cached between callers, so they must not depend on the mode of the first."""

from functools import partial

import pytest
import torch

from psa_masks import TokenOrder, VideoGrid, cube_order, gilbert_order

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
