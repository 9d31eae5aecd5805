"""The registered operators behind ``pyramid_attention``: attention, and its gradients."""

from typing import Any

import torch
from torch import Tensor

from psa_kernels.registry import register, register_gradient


def lse_dtype(query: Tensor) -> torch.dtype:
    return torch.promote_types(query.dtype, torch.float32)


def empty_out(query: Tensor) -> Tensor:
    """Room for the output, ``[B, H, q_len, D]``: token by token where the queries lie so, as after a projection that is
    split into heads, so that joining them copies nothing."""
    batch, heads, q_len, head_dim = query.shape
    if query.transpose(1, 2).is_contiguous():
        return query.new_empty((batch, q_len, heads, head_dim)).transpose(1, 2)
    return query.new_empty(query.shape)


def _fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    indices: Tensor,
    offsets: Tensor,
    kv_lengths: Tensor | None,
    block_q: int,
    block_kv: int,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    return empty_out(query), query.new_empty(query.shape[:3], dtype=lse_dtype(query))


pyramid_attention_op = register(
    "psa_kernels.pyramid_attention",
    "pyramid_attention(Tensor query, Tensor key, Tensor value, Tensor indices, Tensor offsets, Tensor? kv_lengths, "
    "int block_q, int block_kv, bool is_causal, float scale) -> (Tensor, Tensor)",
    _fake,
)


def _fake_backward(
    grad_out: Tensor, grad_lse: Tensor | None, query: Tensor, key: Tensor, value: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


pyramid_attention_backward_op = register(
    "psa_kernels.pyramid_attention",
    "pyramid_attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor query, Tensor key, Tensor value, Tensor out, "
    "Tensor lse, Tensor indices, Tensor offsets, Tensor? kv_lengths, int block_q, int block_kv, bool is_causal, "
    "float scale) -> (Tensor, Tensor, Tensor)",
    _fake_backward,
    direction="backward",
)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, indices, offsets, kv_lengths, *ctx.options = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(query, key, value, *output, indices, offsets, kv_lengths)


def _backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    if grad_out is None:
        grad_out = torch.zeros_like(saved[0])
    gradients = pyramid_attention_backward_op(grad_out, grad_lse, *saved, *ctx.options)
    return (*gradients, *[None] * (3 + len(ctx.options)))


def _refuse(ctx: Any, *gradients: Tensor | None) -> None:
    raise NotImplementedError(  # torch's own type where an operator lacks a derivative
        "pyramid_attention has first derivatives only: its backward pass cannot be differentiated; impl='reference' can"
    )


register_gradient("pyramid_attention", _backward, _keep)
register_gradient("pyramid_attention_backward", _refuse)
