"""What the integration has to know about a transformer class."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from psa_masks import VideoGrid


class SelfAttention(Protocol):
    """What a processor asks of the integration. Calls are made once per forward of a layer."""

    active: bool
    """False once the integration has been taken off."""

    def runs_sparse(self, processor: "Processor", hidden_states: Tensor, attention_mask: Tensor | None) -> bool:
        """Whether this call is the processor's to compute; otherwise the model's own processor does.

        Raises:
            ValueError: if the implementation asked for cannot run on the device of `hidden_states`.
            UnsupportedError: if there is an attention mask in a sparse step.
        """

    def attend(
        self, processor: "Processor", query: Tensor, key: Tensor, value: Tensor, *, kv_lengths: Tensor | None = None
    ) -> Tensor:
        """Sparse attention over [B, H, L, D] tensors.

        Args:
            kv_lengths: int [B], how many of each sample's keys there are; the padding is behind them. None is all.
        """


class Processor:
    """A self-attention processor that computes the sparse calls and leaves all others to `original`.

    `ticket` names it in compiled graphs; `dense` is whether its layer is one of the preset's dense ones.
    """

    ticket: Tensor
    dense: bool

    def __init__(self, original: Any, attention: SelfAttention, layer: int) -> None:
        self.original = original
        self.attention = attention
        self.layer = layer


class DispatchedProcessor(Processor):
    """A processor in place of one that calls diffusers' attention dispatch."""

    # diffusers sets these two on every processor that has them; the dense calls are the ones to follow them.
    @property
    def _attention_backend(self) -> Any:
        return self.original._attention_backend

    @_attention_backend.setter
    def _attention_backend(self, backend: Any) -> None:
        self.original._attention_backend = backend

    @property
    def _parallel_config(self) -> Any:
        return self.original._parallel_config

    @_parallel_config.setter
    def _parallel_config(self, config: Any) -> None:
        self.original._parallel_config = config


class Order(Protocol):
    """A psa_masks.TokenOrder, or what stands for one in a compiled graph."""

    def __len__(self) -> int: ...

    def apply(self, x: Tensor, dim: int) -> Tensor: ...

    def undo(self, x: Tensor, dim: int) -> Tensor: ...


CurrentOrder = Callable[[], Order | None]
"""The order of the forward under way, None where tokens stay as they are."""


class Adapter(ABC):
    """One subclass per transformer class; stateless."""

    processor_classes: tuple[type, ...]
    """The processors of the self-attention that this package can stand in for."""

    no_context_parallel: str | None
    """Why a sequence that diffusers has cut over several processes cannot be followed, None where it can."""

    @abstractmethod
    def attentions(self, transformer: Any) -> list[Any]:
        """The self-attention modules, one a layer."""

    @abstractmethod
    def model(self, transformer: Any, pipeline: Any | None) -> str | None:
        """The shipped model this is, None where its configuration does not tell."""

    @abstractmethod
    def grid(self, transformer: Any, call: dict[str, Any]) -> VideoGrid | None:
        """The tokens of a call, from the tensors given to forward; None where they do not tell.

        Args:
            call: the arguments of the transformer's forward by name.

        Raises:
            ValueError: if the arguments contradict each other.
        """

    def frames_apart(self, transformer: Any) -> int:
        """How many frames at the start must keep their tokens in front of all others."""
        return 0

    def order_call(self, call: dict[str, Any], order: Order) -> None:
        """Puts those arguments of forward in token order, in place, that have an entry per video token."""
        return

    @abstractmethod
    def order_hooks(self, transformer: Any, current: CurrentOrder) -> list[RemovableHandle]:
        """Hooks that put the tokens in order behind the patch embedding and back after the output projection."""

    @abstractmethod
    def processor(self, original: Any, attention: SelfAttention, layer: int) -> Processor:
        """The processor to set on a layer in place of `original`."""


def in_order(tokens: Tensor, order: Order, dim: int, what: str) -> Tensor:
    """`tokens` in `order` along `dim`.

    Raises:
        ValueError: if their number is not that of the order.
    """
    if tokens.shape[dim] != len(order):
        raise ValueError(
            f"{what} must have one entry for each of the {len(order)} video tokens, got {tokens.shape[dim]}"
        )
    return order.apply(tokens, dim)


def order_output(module: nn.Module, current: CurrentOrder, dim: int, what: str) -> RemovableHandle:
    """Hooks `module` so that its output, a tensor or a tuple of tensors, comes in the current order."""

    def order_it(module: nn.Module, args: Any, output: Any) -> Any:
        order = current()
        if order is None:
            return None
        if isinstance(output, Tensor):
            return in_order(output, order, dim, what)
        return tuple(in_order(one, order, dim, what) for one in output)

    return module.register_forward_hook(order_it)


def undo_output(module: nn.Module, current: CurrentOrder) -> RemovableHandle:
    """Hooks `module` so that its output [B, L, C] comes in the model's own order."""

    def undo_it(module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        order = current()
        return None if order is None else order.undo(output, 1)

    return module.register_forward_hook(undo_it)
