"""The integration's part of a forward as operators, which torch.compile takes as they are.

What they do depends on the layer, the step and the grid, and none of these may be read where a graph is traced, or
there would be one graph for each. So a layer is named by a tensor, its ticket, and the rest is looked up when the
operator runs.

Where gradients are wanted, only what has none is an operator of ours: the orders by cluster and the plan. The attention
itself is then traced, and has the gradients of psa_kernels.
"""

from collections.abc import Sequence
from itertools import count
from typing import Any, Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from psa_kernels import LevelPlan
from psa_masks import AttentionOrder, HeadOrder, TokenOrder, VideoGrid


class Site(Protocol):
    """What the operators ask of a transformer's integration."""

    def attend_in(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, kv_lengths: Tensor | None, grid: VideoGrid | None
    ) -> Tensor:
        """Sparse attention of a layer; the grid None is that of the forward under way."""

    def content_orders_in(self, layer: int, query: Tensor, key: Tensor, grid: VideoGrid | None) -> AttentionOrder:
        """The orders by cluster of a layer."""

    def plan_in(
        self, layer: int, query: Tensor, key: Tensor, kv_lengths: Tensor | None, grid: VideoGrid | None
    ) -> LevelPlan:
        """What a layer is to execute."""

    def count_sparse(self, layer: int, density: Tensor) -> None:
        """Notes a sparse call of a layer."""

    def count_dense(self, layer: int) -> None:
        """Notes a dense call of a layer."""

    def order_of(self, grid: VideoGrid) -> TokenOrder:
        """The order of the video tokens of `grid`."""


_SITES: WeakValueDictionary[int, Site] = WeakValueDictionary()
_NUMBERS = count()


def tickets(site: Site, how_many: int) -> list[Tensor]:
    """That many, one a layer, int64 [2] on the CPU, where reading them waits for nothing."""
    number = next(_NUMBERS)
    _SITES[number] = site
    # Operators write to them, in inference mode and out of it, whichever this is called in.
    with torch.inference_mode(False):
        return [torch.tensor([number, layer], device="cpu") for layer in range(how_many)]


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


@torch.library.custom_op("psa_integrations::plan", mutates_args=())
def plan(
    query: Tensor,
    key: Tensor,
    kv_lengths: Tensor | None,
    ticket: Tensor,
    grid: Sequence[int],
    num_q_blocks: int,
    num_kv_blocks: int,
    num_levels: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """`indices` and `offsets` of the LevelPlan of a layer, and its density; `grid` as in `attend`."""
    number, layer = ticket.tolist()
    found = _SITES[number].plan_in(layer, query, key, kv_lengths, _grid(grid) if grid else None)
    return found.indices, found.offsets, found.density()


@plan.register_fake
def _(
    query: Tensor,
    key: Tensor,
    kv_lengths: Tensor | None,
    ticket: Tensor,
    grid: Sequence[int],
    num_q_blocks: int,
    num_kv_blocks: int,
    num_levels: int,
) -> tuple[Tensor, Tensor, Tensor]:
    heads = query.shape[:2]
    indices = query.new_empty((*heads, num_q_blocks, num_kv_blocks), dtype=torch.int32)
    offsets = query.new_empty((*heads, num_q_blocks, num_levels + 1), dtype=torch.int32)
    return indices, offsets, query.new_empty(heads, dtype=torch.float32)


@torch.library.custom_op("psa_integrations::clusters", mutates_args=())
def clusters(query: Tensor, key: Tensor, ticket: Tensor, grid: Sequence[int], of_queries: bool) -> Tensor:
    """The orders of a layer's tokens by cluster, int64 [S, 2, B, H, L]: each the order and its inverse, of the keys,
    and behind it with `of_queries` of the queries. `grid` as in `attend`."""
    number, layer = ticket.tolist()
    orders = _SITES[number].content_orders_in(layer, query, key, _grid(grid) if grid else None)
    sides = (orders.key, orders.query) if of_queries else (orders.key,)
    return torch.stack([torch.stack((side.order, side.inverse)) for side in sides if isinstance(side, HeadOrder)])


@clusters.register_fake
def _(query: Tensor, key: Tensor, ticket: Tensor, grid: Sequence[int], of_queries: bool) -> Tensor:
    return query.new_empty((1 + of_queries, 2, *query.shape[:3]), dtype=torch.int64)


# These two are said to change the ticket, or the call would have no effect and be left out. A checkpoint that computes
# its part of the graph anew leaves them out then.
@torch.library.custom_op("psa_integrations::count_dense", mutates_args=("ticket",))
def count_dense(ticket: Tensor) -> None:
    """Notes a dense call."""
    number, layer = ticket.tolist()
    _SITES[number].count_dense(layer)


@count_dense.register_fake
def _(ticket: Tensor) -> None:
    return None


@torch.library.custom_op("psa_integrations::count_sparse", mutates_args=("ticket",))
def count_sparse(ticket: Tensor, density: Tensor) -> None:
    """Notes a sparse call, of which `attend` itself takes note."""
    number, layer = ticket.tolist()
    _SITES[number].count_sparse(layer, density)


@count_sparse.register_fake
def _(ticket: Tensor, density: Tensor) -> None:
    return None


@torch.library.custom_op("psa_integrations::reorder", mutates_args=())
def reorder(x: Tensor, ticket: Tensor, grid: Sequence[int], dim: int, undo: bool) -> Tensor:
    """The tokens of `x` along `dim` in the order of `grid`, or back from it."""
    order = _SITES[int(ticket[0])].order_of(_grid(grid))
    return (order.undo(x, dim) if undo else order.apply(x, dim)).contiguous()


@reorder.register_fake
def _(x: Tensor, ticket: Tensor, grid: Sequence[int], dim: int, undo: bool) -> Tensor:
    return x.new_empty(x.shape)


def _keep_order(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ticket, *ctx.where = inputs
    ctx.save_for_backward(ticket)


def _reorder_gradient(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    grid, dim, undo = ctx.where
    return reorder(gradient, *ctx.saved_tensors, grid, dim, not undo), None, None, None, None


reorder.register_autograd(_reorder_gradient, setup_context=_keep_order)


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
