"""Token orders by k-d tree, made anew in every call."""

from torch import Tensor

from psa_masks import AttentionOrder, TokenOrder, VideoGrid, kd_tree_order


class KdTreeOrders:
    """Reorders the keys of each attention inside their blocks, and leaves queries in the order of `base`.

    Args:
        block_kv: tokens of a key/value block.
        grid: the sequence; its text stays where it is.
        base: the order in which blocks are cut, None where the tokens come in it already.
    """

    keeps_blocks = True

    def __init__(self, *, block_kv: int, grid: VideoGrid, base: TokenOrder | None = None) -> None:
        self._block_kv = block_kv
        self._grid = grid
        self._base = base

    def __call__(
        self, query: Tensor, key: Tensor, *, step: int | None, layer: int = 0, impl: str | None = None
    ) -> AttentionOrder:
        """The orders of one attention; `step` and `layer` make no difference."""
        keys = kd_tree_order(query, key, block_kv=self._block_kv, grid=self._grid, base=self._base, impl=impl)
        return AttentionOrder(query=self._base, key=keys)

    def reset(self) -> None:
        """Nothing is kept from one call to the next."""
