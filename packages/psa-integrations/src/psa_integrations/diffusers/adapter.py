"""What the integration has to know about a transformer class."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor
from torch.utils.hooks import RemovableHandle

from psa_masks import TokenOrder, VideoGrid


class SelfAttention(Protocol):
    """What a processor asks of the integration. Calls are made once per forward of a layer."""

    @property
    def active(self) -> bool:
        """False once the integration has been taken off."""

    def runs_sparse(self, layer: int, hidden_states: Tensor, attention_mask: Tensor | None) -> bool:
        """Whether this call is the processor's to compute; otherwise the model's own processor does.

        Raises:
            ValueError: if the implementation asked for cannot run on the device of `hidden_states`.
            UnsupportedError: if there is an attention mask in a sparse step.
        """

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Sparse attention over [B, H, L, D] tensors."""


class Processor:
    """A self-attention processor that computes the sparse calls and leaves all others to `original`."""

    def __init__(self, original: Any, attention: SelfAttention, layer: int) -> None:
        self.original = original
        self.attention = attention
        self.layer = layer


class Adapter(ABC):
    """One subclass per transformer class; stateless."""

    processor_classes: tuple[type, ...]
    """The processors of the self-attention that this package can stand in for."""

    context_parallel: bool = False
    """Whether the token order can follow a sequence that diffusers has cut over several processes."""

    @abstractmethod
    def attentions(self, transformer: Any) -> list[Any]:
        """The self-attention modules, one a layer."""

    @abstractmethod
    def model(self, transformer: Any, pipeline: Any | None) -> str | None:
        """The shipped model this is, None where its configuration does not tell."""

    @abstractmethod
    def grid(self, transformer: Any, call: dict[str, Any]) -> VideoGrid:
        """The tokens of a call, from the tensors given to forward.

        Args:
            call: the arguments of the transformer's forward by name.
        """

    @abstractmethod
    def order_call(self, call: dict[str, Any], order: TokenOrder) -> None:
        """Puts those arguments of forward in token order, in place, that have an entry per video token."""

    @abstractmethod
    def order_hooks(self, transformer: Any, current: Callable[[], TokenOrder | None]) -> list[RemovableHandle]:
        """Hooks that put the tokens in order behind the patch embedding and back after the output projection.

        Args:
            current: the order of the forward under way, None where tokens stay as they are.
        """

    @abstractmethod
    def processor(self, original: Any, attention: SelfAttention, layer: int) -> Processor:
        """The processor to set on a layer in place of `original`."""


def in_order(tokens: Tensor, order: TokenOrder, dim: int, what: str) -> Tensor:
    """`tokens` in `order` along `dim`.

    Raises:
        ValueError: if their number is not that of the order.
    """
    if tokens.shape[dim] != len(order):
        raise ValueError(
            f"{what} must have one entry for each of the {len(order)} video tokens, got {tokens.shape[dim]}"
        )
    return order.apply(tokens, dim)
