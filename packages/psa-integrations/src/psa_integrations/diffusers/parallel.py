"""Context parallelism of diffusers: a sequence cut over processes, put together for the sparse op.

Levels are chosen from whole sequences, so the sparse op cannot run on a part of one. Ulysses gives each process all
tokens of a part of the heads instead: one exchange before attention, one after. Layers that run dense are diffusers'
own affair.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from psa_integrations.diffusers.adapter import Order


@dataclass(frozen=True)
class Ulysses:
    """The processes that share a forward; each holds an equal part of the tokens, in the order of their ranks."""

    group: Any

    @property
    def size(self) -> int:
        return dist.get_world_size(self.group)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, attend: Callable[[Tensor, Tensor, Tensor], Tensor]
    ) -> Tensor:
        """Attention on all tokens of this process's share of the heads.

        Args:
            query, key, value: [B, H, L / size, D], the tokens of this process; H a multiple of `size`.
            attend: takes and returns [B, H / size, L, D].

        Returns:
            [B, H, L / size, D] in the dtype of `value`.
        """
        tokens = torch.stack((query.to(value.dtype), key.to(value.dtype), value))  # [3, B, H, L / size, D]
        heads = tokens.unflatten(2, (self.size, -1)).movedim(2, 0)
        received = self._exchange(heads)  # [size, 3, B, H / size, L / size, D], of each process its tokens
        query, key, value = received.movedim(0, 3).flatten(3, 4).unbind()
        out = attend(query, key, value).to(value.dtype)
        received = self._exchange(out.unflatten(2, (self.size, -1)).movedim(2, 0))  # of each process its heads
        return received.movedim(0, 1).flatten(1, 2)

    def order(self, part: Tensor, order: Order, dim: int) -> Tensor:
        """This process's part of the tokens that lie in parts along `dim`, after all are put in `order`."""
        gathered = [torch.empty_like(part, memory_format=torch.contiguous_format) for _ in range(self.size)]
        dist.all_gather(gathered, part.contiguous(), group=self.group)
        whole = order.apply(torch.cat(gathered, dim=dim), dim)
        return whole.chunk(self.size, dim=dim)[dist.get_rank(self.group)].contiguous()

    def _exchange(self, parts: Tensor) -> Tensor:
        """Sends entry i of the first dimension to process i, and returns what each process sent here."""
        return _exchange(parts, self.group)


class _Exchange(torch.autograd.Function):
    """Entry i of the first dimension to process i. Gradients go back the way the numbers came: the same again."""

    @staticmethod
    def forward(ctx: Any, parts: Tensor, group: Any) -> Tensor:
        ctx.group = group
        received = torch.empty_like(parts, memory_format=torch.contiguous_format)
        dist.all_to_all_single(received, parts.contiguous(), group=group)
        return received

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _exchange(gradient, ctx.group), None


def _exchange(parts: Tensor, group: Any) -> Tensor:
    apply: Any = _Exchange.apply  # torch gives it no types
    received: Tensor = apply(parts, group)
    return received


def ulysses_of(transformer: Any) -> Ulysses | None:
    """How the sequence of this transformer is cut at the moment; None where it is whole."""
    config = _config(transformer)
    return None if config is None else Ulysses(config._ulysses_mesh.get_group())


def parallel_problem(transformer: Any, heads: int, refusal: str | None, tokens: int) -> str | None:
    """What keeps the sparse op from the context parallelism that is on, None where nothing does or none is on.

    Args:
        heads: of the self-attention.
        refusal: why a sequence in parts cannot be followed in this model, None where it can.
        tokens: of the sequence.
    """
    config = _config(transformer)
    if config is None:
        return None
    if refusal is not None:
        return f"context parallelism does not go with this model: {refusal}"
    if config.ring_degree > 1:
        return (
            f"context parallelism by ring attention (ring_degree {config.ring_degree}) never has a whole sequence in "
            "one place, which levels are chosen from; use ulysses_degree"
        )
    if getattr(config, "ulysses_anything", False):
        return "context parallelism with ulysses_anything cuts heads and tokens into unequal parts"
    for what, count in (("heads", heads), ("tokens", tokens)):
        if count % config.ulysses_degree:
            return f"context parallelism must divide the {what}, got {count} for ulysses_degree {config.ulysses_degree}"
    return None


def _config(transformer: Any) -> Any:
    return getattr(getattr(transformer, "_parallel_config", None), "context_parallel_config", None)
