"""A 3-D Hilbert-like curve for grids of any size, without a jump.

The curve fills a box from one corner to another. To do so it cuts the box into halves along one, two or
three axes, tours the parts so that each shares a face with the next, and fills every part by the same rule.
Because all parts along an axis are cut at one plane, leaving a part at a corner of that face means entering
the next at a corner too, and the two tokens are neighbours.

Which corners can be reached is a matter of colouring: colour the tokens black and white like a chessboard,
and a path without a jump alternates. Call a move from one corner of a box to another by the set of axes it
crosses. If the box has a side of even length, both colours are equally many and the corners must differ in
colour: the move crosses an odd number of even sides. If all sides are odd, all corners have the more
frequent colour and any move but the empty one will do. Sides of length 1 count as not crossed.

Every such move can be filled, by cutting along a single axis and induction on the size:

- All sides odd: cut a crossed side of length n into n1 even and n2 odd, n2 > 1 if n > 3. The first part
  must cross that axis, and may cross any of the others; the second may make any move but the empty one, so
  together they cross what is asked for.
- Some side even: a crossed even side longer than 2 is cut into two even parts. The first makes the asked
  move, the second crosses just that axis. A crossed side of length 2 is cut into two slices whose moves add
  up to what is asked for on the other two axes. They can't where one of these has length 1, the other an
  odd length, and the other is crossed; then the other is cut instead, into an odd part and an even one.

So the search below, which first tries to cut all long axes because that keeps the parts compact, always finds
a way, and every grid has a curve without a jump. The name is that of the generalised Hilbert curves of
J. Cerveny (github.com/jakubcerveny/gilbert); the construction is another one, theirs jumps on most odd sizes.
"""

import itertools
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from psa_masks.grid import VideoGrid, check_grid
from psa_masks.order.token_order import TokenOrder, ordinary_cpu_tensors

# Sets of axes and corners of a box are numbers of three bits, one an axis: the corner at the far end of axes
# 0 and 2 is 0b101, and a move that crosses the axes m takes corner c to c ^ m.
_AXES = (0, 1, 2)
_Dims = tuple[int, ...]


class _Part(NamedTuple):
    origin: _Dims
    dims: _Dims
    entry: int
    move: int


def gilbert_order(grid: VideoGrid) -> TokenOrder:
    """Order the video along a 3-D Hilbert-like curve, so that a run of tokens is compact in all three axes.

    Consecutive video tokens are neighbours on the grid (Manhattan distance 1), whatever its size. Text tokens
    stay where they are.

    Args:
        grid: the token grid.

    Returns:
        The order of the whole sequence, shared between equal calls. Make it outside of what torch.compile traces.

    Raises:
        TypeError: ``grid`` is no VideoGrid.
    """
    check_grid(grid)
    return _gilbert_order(grid)


@lru_cache(maxsize=16)
@ordinary_cpu_tensors()
def _gilbert_order(grid: VideoGrid) -> TokenOrder:
    moves = sorted(_moves(grid.shape), key=int.bit_count)
    t, y, x = _path(grid.shape, moves[0], {}).unbind(dim=1)
    return TokenOrder.of_video(grid, (t * grid.height + y) * grid.width + x)


def _path(dims: _Dims, move: int, known: dict[tuple[_Dims, int], Tensor]) -> Tensor:
    """Coordinates int64 ``[tokens, 3]`` along the curve that makes ``move`` from corner 0 of the box."""
    if dims == (1, 1, 1):
        return torch.zeros(1, 3, dtype=torch.int64)
    if (dims, move) not in known:
        pieces = []
        for part in _plan(dims, move):
            far = [part.dims[axis] - 1 if part.entry >> axis & 1 else 0 for axis in _AXES]
            # Seen from corner ``entry``, the coordinates of a crossed axis run backwards.
            steps = (_path(part.dims, part.move, known) - torch.tensor(far)).abs()
            pieces.append(steps + torch.tensor(part.origin))
        known[dims, move] = torch.cat(pieces)
    return known[dims, move]


@lru_cache(maxsize=4096)
def _plan(dims: _Dims, move: int) -> tuple[_Part, ...]:
    """The parts of a box in the order of the curve that makes ``move`` from corner 0."""
    return next(
        parts
        for axes, cut in _cuts(dims)
        for tour in _tours(axes, move & axes)
        if (parts := _fill(cut, tour, move)) is not None
    )


def _cuts(dims: _Dims) -> Iterator[tuple[int, tuple[tuple[int, ...], ...]]]:
    """Ways to cut a box: the axes, and for each axis the lengths of its halves (or its whole length).

    The first way cuts the axes longer than half the longest, so that parts become no flatter than the box.
    """
    long = sum(1 << axis for axis in _AXES if dims[axis] > 1 and max(dims) < 2 * dims[axis])
    able = sum(1 << axis for axis in _AXES if dims[axis] > 1)
    choices = [axes for axes in range(1, 8) if axes & ~able == 0]
    choices.sort(key=lambda axes: (axes != long, -axes.bit_count()))
    for axes in choices:
        halves = (_halves(dims[axis]) if axes >> axis & 1 else [(dims[axis],)] for axis in _AXES)
        for cut in itertools.product(*halves):
            yield axes, cut


def _halves(length: int) -> list[tuple[int, ...]]:
    """The most even cuts of a side; one of them has an even part wherever a side of 3 or more allows it."""
    half = length // 2
    if length % 2:
        return [(half, half + 1), (half + 1, half)]
    if half % 2 and half > 1:
        return [(half, half), (half - 1, half + 1)]
    return [(half, half)]


@lru_cache(maxsize=64)
def _tours(axes: int, last: int) -> tuple[tuple[int, ...], ...]:
    """The ways through the parts of a box cut along ``axes``, from part 0 to part ``last``, each part once.

    A part is numbered like the corner of the box that it holds.
    """

    def extend(tour: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
        if len(tour) == 1 << axes.bit_count():
            if tour[-1] == last:
                yield tour
            return
        for axis in _AXES:
            part = tour[-1] ^ (1 << axis)
            if axes >> axis & 1 and part not in tour:
                yield from extend((*tour, part))

    return tuple(extend((0,)))


def _fill(cut: tuple[tuple[int, ...], ...], tour: tuple[int, ...], move: int) -> tuple[_Part, ...] | None:
    """Moves through the parts of a tour that add up to ``move``, None if there are none."""
    ways: dict[int, tuple[_Part, ...]] = {0: ()}  # by the corner at which they enter the next part
    for index, place in enumerate(tour):
        origin = tuple(cut[axis][0] if place >> axis & 1 else 0 for axis in _AXES)
        dims = tuple(cut[axis][place >> axis & 1] for axis in _AXES)
        wide = sum(1 << axis for axis in _AXES if dims[axis] > 1)
        if index + 1 < len(tour):
            shared = place ^ tour[index + 1]
            target, fixed = tour[index + 1], shared & wide
        else:
            shared, target, fixed = 0, move, wide
        onward: dict[int, tuple[_Part, ...]] = {}
        for (entry, way), crossing in itertools.product(ways.items(), _moves(dims)):
            corner = entry ^ crossing
            if (corner ^ target) & fixed == 0:
                # The next part is entered through the shared face, so at its corner on the other side.
                after = (corner & ~shared) | (~target & shared)
                onward.setdefault(after, (*way, _Part(origin, dims, entry, crossing)))
        ways = onward
    return next(iter(ways.values()), None)


@lru_cache(maxsize=4096)
def _moves(dims: _Dims) -> tuple[int, ...]:
    """The moves from a corner of a box that a path without a jump can make through all of it."""
    wide = sum(1 << axis for axis in _AXES if dims[axis] > 1)
    even = sum(1 << axis for axis in _AXES if dims[axis] % 2 == 0)
    moves = (move for move in range(8) if move & ~wide == 0)
    if even:
        return tuple(move for move in moves if (move & even).bit_count() % 2)
    return tuple(move for move in moves if (move != 0) == (wide != 0))
