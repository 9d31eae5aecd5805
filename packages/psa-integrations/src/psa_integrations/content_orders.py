"""What makes token orders from what the tokens of an attention hold."""

from typing import Protocol

from torch import Tensor

from psa_masks import AttentionOrder


class ContentOrders(Protocol):
    """Makes the orders of one attention after another."""

    keeps_blocks: bool
    """Whether every block holds the tokens it has without these orders, so that levels still tell of places."""

    def __call__(
        self, query: Tensor, key: Tensor, *, step: int | None, layer: int = 0, impl: str | None = None
    ) -> AttentionOrder:
        """The orders of one attention.

        Args:
            query: [B, H, L, D].
            key: [B, H_kv, L, D].
            step: the denoising step, None where it is unknown.
            layer: whose attention it is.
            impl: of the operators in it, None picks by device.
        """

    def reset(self) -> None:
        """Forgets what earlier calls left."""
