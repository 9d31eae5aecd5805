"""The registered operator behind ``permute_tokens``, and its gradient: the same with the inverse order."""

from typing import Any

import torch
from torch import Tensor

from psa_kernels.registry import register, register_gradient


def _fake(x: Tensor, order: Tensor) -> Tensor:
    return x.new_empty(x.shape)


permute_tokens_op = register("psa_kernels.permute_tokens", "permute_tokens(Tensor x, Tensor order) -> Tensor", _fake)


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, str], output: Tensor) -> None:
    _, order, ctx.impl = inputs
    ctx.save_for_backward(order)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    (order,) = ctx.saved_tensors
    places = torch.arange(order.shape[2], device=order.device).expand_as(order)
    inverse = torch.zeros_like(order).scatter(2, order, places)
    return permute_tokens_op(grad, inverse, ctx.impl), None, None


register_gradient("permute_tokens", _backward, _keep)
