"""``permute_tokens``: the tokens of each head in an order of its own."""

import torch
from torch import Tensor

from psa_kernels import checks
from psa_kernels.permute_tokens.ops import permute_tokens_op


def permute_tokens(x: Tensor, order: Tensor, *, impl: str | None = None) -> Tensor:
    """Put the tokens of each head in an order: ``out[b, h, i] = x[b, h, order[b, h, i]]``.

    What ``x.gather`` with the order expanded over D gives, from an index a row. The gradient with respect to ``x`` is
    the permutation by the inverse order, without sums, and has derivatives of its own.

    Args:
        x: ``[B, H, L, D]``, float16, bfloat16, float32 or float64, any strides.
        order: int64 ``[B, H, L]``, any strides, in each head a permutation of 0..L-1. Nobody looks whether it is one:
            the result of other values is undefined, and with ``"triton"`` no error.
        impl: ``"triton"``, ``"torch"`` or ``"reference"``; None is Triton on a GPU, torch elsewhere.

    Returns:
        A new contiguous tensor, shaped like ``x`` and of its dtype.

    Raises:
        TypeError, ValueError: an argument breaks a rule above.
        NotImplementedError: as torch raises for a derivative that an operator lacks: here those in forward mode and
            of torch.func.
    """
    checks.sequence("x", x)
    if not isinstance(order, Tensor):
        raise TypeError(f"order must be a tensor, got {type(order).__name__}")
    checks.strided("order", order)
    if order.dtype != torch.int64:
        raise TypeError(f"order must be int64, got {order.dtype}")
    if order.shape != x.shape[:3]:
        raise ValueError(f"order must have shape [B, H, L] of x, {list(x.shape[:3])}, got {list(order.shape)}")
    if order.device != x.device:
        raise ValueError(f"order must be on x's device {x.device}, got {order.device}")
    checks.backward_mode_alone("permute_tokens", "; x.gather has them", x)
    out: Tensor = permute_tokens_op(x, order, checks.resolve_impl(impl, x))
    return out
