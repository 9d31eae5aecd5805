"""An order of tokens for every head, made on the device from what the tokens hold."""

from dataclasses import dataclass

import torch
from torch import Tensor

from psa_kernels import checks as kernel_checks
from psa_kernels import permute_tokens
from psa_masks.order.token_order import TokenOrder


class HeadOrder:
    """An order of the tokens of each head, and its exact inverse.

    Args:
        order: int64 ``[B, H, L]``, in each head a permutation of 0..L-1; ``order[b, h, i]`` is the original index of
            the token that comes i-th. Kept where it lies, not copied. Only on the CPU are its values looked at, and not
            those that torch.compile traces: nobody waits for a GPU.

    Attributes:
        order: the argument.

    Raises:
        TypeError, ValueError: ``order`` is no int64 tensor of that shape, or on the CPU no permutation.
    """

    def __init__(self, order: Tensor) -> None:
        if not isinstance(order, Tensor) or order.dtype != torch.int64:
            kind = order.dtype if isinstance(order, Tensor) else type(order).__name__
            raise TypeError(f"order must be an int64 tensor, got {kind}")
        kernel_checks.strided("order", order)
        if order.ndim != 3:
            raise ValueError(f"order must have shape [B, H, L], got {list(order.shape)}")
        self.order = order
        self._inverse: Tensor | None = None
        length = order.shape[2]
        if kernel_checks.has_values(order):
            within = bool(((order >= 0) & (order < length)).all())
            if not within or (self.inverse < 0).any():
                raise ValueError(
                    f"order must hold each of 0..{length - 1} once a head, got {order[0, 0, :16].tolist()}"
                )

    @property
    def inverse(self) -> Tensor:
        """int64 ``[B, H, L]``; ``inverse[b, h, j]`` is the new place of original token j."""
        # No cached_property: its lock is what torch.compile cannot trace.
        if self._inverse is None:
            places = torch.arange(self.order.shape[2], device=self.order.device).expand_as(self.order)
            self._inverse = torch.full_like(self.order, -1).scatter_(2, self.order, places)
        return self._inverse

    def __repr__(self) -> str:
        batch, heads, length = self.order.shape
        return f"{type(self).__name__}({batch} x {heads} heads, {length} tokens)"

    def apply(self, x: Tensor, dim: int = 2) -> Tensor:
        """``x`` ``[B, H, L, ...]`` with the tokens of each head in its order; a new tensor.

        Args:
            x: on the order's device.
            dim: 2, or -2 where that is the same; there so that all kinds of order are called alike.

        Raises:
            TypeError, ValueError: ``x`` has not the order's batch, heads and tokens, or ``dim`` is another axis.
        """
        return self._select(x, dim, self.order)

    def undo(self, x: Tensor, dim: int = 2) -> Tensor:
        """``x`` with the tokens of each head back in their original order: ``undo(apply(x)) == x``.

        Raises:
            TypeError, ValueError: ``x`` has not the order's batch, heads and tokens, or ``dim`` is another axis.
        """
        return self._select(x, dim, self.inverse)

    def _select(self, x: Tensor, dim: int, index: Tensor) -> Tensor:
        if not isinstance(x, Tensor):
            raise TypeError(f"x must be a tensor, got {type(x).__name__}")
        kernel_checks.strided("x", x)
        kernel_checks.integer("dim", dim)
        if tuple(x.shape[:3]) != tuple(index.shape):
            raise ValueError(f"x must have shape {[*index.shape, '...']}, got {list(x.shape)}")
        if dim not in (2, 2 - x.ndim):
            raise ValueError(f"dim must be 2, where the tokens of {list(x.shape)} are, got {dim}")
        if x.device != index.device:
            raise ValueError(f"x must be on the order's device {index.device}, got {x.device}")
        if x.ndim == 4 and x.is_floating_point() and x.element_size() > 1 and x.numel():
            return permute_tokens(x, index)
        return x.gather(2, index.reshape(*index.shape, *[1] * (x.ndim - 3)).expand_as(x))


@dataclass(frozen=True)
class AttentionOrder:
    """How the tokens of an attention are ordered: queries one way, keys with their values another.

    Attention without a causal mask does not care in which order keys come, as long as values come in the same; and a
    query's output depends on no other query. So both sides may be ordered on their own, and the output is in the order
    of the queries. Ranges of tokens that a policy protects must stay where they are on both sides.

    Attributes:
        query, key: the orders; None leaves the tokens as they are.

    Raises:
        TypeError: one of them is something else.
    """

    query: TokenOrder | HeadOrder | None
    key: TokenOrder | HeadOrder | None

    def __post_init__(self) -> None:
        for name, order in (("query", self.query), ("key", self.key)):
            if not isinstance(order, TokenOrder | HeadOrder | None):
                raise TypeError(f"{name} must be a TokenOrder, a HeadOrder or None, got {type(order).__name__}")

    def apply(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query ``[B, H, q_len, D]``, key and value ``[B, H_kv, kv_len, D]`` in their orders.

        Raises:
            TypeError, ValueError: a tensor does not go with its order.
        """
        if self.query is not None:
            query = self.query.apply(query, 2)
        if self.key is not None:
            key, value = self.key.apply(key, 2), self.key.apply(value, 2)
        return query, key, value

    def undo(self, out: Tensor) -> Tensor:
        """The output ``[B, H, q_len, D]`` in the original order of the queries.

        Raises:
            TypeError, ValueError: ``out`` does not go with the order of the queries.
        """
        return out if self.query is None else self.query.undo(out, 2)
