"""The integration's part of a forward as operators, which torch.compile takes as they are.

What they do depends on the layer, the step and the grid, and none of these may be read where a graph is traced, or
there would be one graph for each. So a layer is named by a tensor, its ticket, and the rest is looked up when the
operator runs.
"""

from collections.abc import Sequence
from itertools import count
from typing import Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from psa_masks import TokenOrder, VideoGrid


class Site(Protocol):
    """What the operators ask of a transformer's integration."""

    def attend_in(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, kv_lengths: Tensor | None, grid: VideoGrid | None
    ) -> Tensor:
        """Sparse attention of a layer; the grid None is that of the forward under way."""

    def count_dense(self, layer: int) -> None:
        """Notes a dense call of a layer."""

    def order_of(self, grid: VideoGrid) -> TokenOrder:
        """The order of the video tokens of `grid`."""


_SITES: WeakValueDictionary[int, Site] = WeakValueDictionary()
_NUMBERS = count()


def tickets(site: Site, layers: int) -> list[Tensor]:
    """One for each layer, int64 [2] on the CPU, where reading them waits for nothing."""
    number = next(_NUMBERS)
    _SITES[number] = site
    return [torch.tensor([number, layer], device="cpu") for layer in range(layers)]


@torch.library.custom_op("psa_integrations::attend", mutates_args=())
def attend(
    query: Tensor, key: Tensor, value: Tensor, kv_lengths: Tensor | None, ticket: Tensor, grid: Sequence[int]
) -> Tensor:
    """Sparse attention over [B, H, L, D], in the dtype of value; `grid` as of `sizes`, empty in a compiled block."""
    number, layer = ticket.tolist()
    where = _grid(grid) if grid else None
    return _SITES[number].attend_in(layer, query, key, value, kv_lengths, where).contiguous()


@attend.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, kv_lengths: Tensor | None, ticket: Tensor, grid: Sequence[int]
) -> Tensor:
    return value.new_empty(query.shape)


# Said to change the ticket, or the call would have no effect and be left out.
@torch.library.custom_op("psa_integrations::count_dense", mutates_args=("ticket",))
def count_dense(ticket: Tensor) -> None:
    """Notes a dense call."""
    number, layer = ticket.tolist()
    _SITES[number].count_dense(layer)


@count_dense.register_fake
def _(ticket: Tensor) -> None:
    return None


@torch.library.custom_op("psa_integrations::reorder", mutates_args=())
def reorder(x: Tensor, ticket: Tensor, grid: Sequence[int], dim: int, undo: bool) -> Tensor:
    """The tokens of `x` along `dim` in the order of `grid`, or back from it."""
    order = _SITES[int(ticket[0])].order_of(_grid(grid))
    return (order.undo(x, dim) if undo else order.apply(x, dim)).contiguous()


@reorder.register_fake
def _(x: Tensor, ticket: Tensor, grid: Sequence[int], dim: int, undo: bool) -> Tensor:
    return x.new_empty(x.shape)


class OrderInGraph:
    """A token order where a graph is traced."""

    def __init__(self, ticket: Tensor, grid: VideoGrid) -> None:
        self._ticket = ticket
        self._sizes = sizes(grid)
        self._length = grid.video_len

    def __len__(self) -> int:
        return self._length

    def apply(self, x: Tensor, dim: int) -> Tensor:
        """See TokenOrder."""
        out: Tensor = reorder(x, self._ticket, self._sizes, dim, False)
        return out

    def undo(self, x: Tensor, dim: int) -> Tensor:
        """See TokenOrder."""
        out: Tensor = reorder(x, self._ticket, self._sizes, dim, True)
        return out


def sizes(grid: VideoGrid) -> list[int]:
    """A grid as an operator takes it."""
    return [grid.frames, grid.height, grid.width, grid.text, int(grid.text_first)]


def _grid(sizes: Sequence[int]) -> VideoGrid:
    frames, height, width, text, text_first = sizes
    return VideoGrid(frames=frames, height=height, width=width, text=text, text_first=bool(text_first))
