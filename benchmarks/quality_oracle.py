"""What no choice of levels could beat by much: levels chosen by the error that they make, with dense attention known.

Say dense attention puts out O. Block j, read at level h, gives a query the mass m_jh (in units of dense attention's sum
of weights) and the weighted sum of values n_jh. The output of a map is exactly

    O + sum_j e_j / sum_j m_j,    e_jh = (n_jh - n_j1) - O (m_jh - m_j1)

of the levels h that the map names. So with the products of all e_jh of a query with each other at hand, what one more
change does to the error of a query block is known for all changes at once. All blocks start at level 1; with a rising
price of work, the change that saves most beyond the error that it makes is made until none does, and the path ends
where the budget is kept. That is no proof of the best map, which is a hard problem, but changes may be taken back on
the way. (From means alone towards level 1 it goes wrong: means have so little of the true mass, a fifteenth in one
layer of the tiny model, that the first block read in full outweighs all others.)
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from psa_kernels import BlockLayout

POOLED = (2, 3, 4)
"""Levels chosen from, beside level 1 and that of a whole block."""
PRICES_AN_OCTAVE = 2
MOST_TURNS = 1 << 16
"""At one price: far more than there are."""
SLACK = 1e-6
"""Of the squared errors of a query block's means: a change that gains less may be rounding, and go on for ever."""
FURTHEST = 0.25
"""A head's path ends where it spends this part of its share, beyond what means cost."""
HALVINGS = 60
"""Of an interval of prices: enough for the last bit of a float64."""


def contributions(
    query: Tensor, key: Tensor, value: Tensor, layout: BlockLayout, levels: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Errors and masses of one head's blocks.

    Args:
        query, key, value: ``[L, D]``, a whole number of blocks.

    Returns:
        ``e_jh`` as ``[L, num_kv_blocks, len(levels), D]`` and ``m_jh`` as ``[L, num_kv_blocks, len(levels)]``.
    """
    scale = query.shape[1] ** -0.5
    normaliser = (query @ key.mT * scale).logsumexp(dim=-1, keepdim=True)
    dense = scaled_dot_product_attention(query[None], key[None], value[None])[0]

    def read(level: int) -> tuple[Tensor, Tensor]:
        """Mass ``[num_kv_blocks, L]`` and sum of values ``[num_kv_blocks, L, D]``."""
        pool = 2 ** (level - 1)
        rows, means = (x.unflatten(0, (-1, pool)).mean(dim=1) for x in (key, value))
        weights = pool * (query @ rows.mT * scale - normaliser).exp()
        weights = weights.unflatten(1, (layout.num_kv_blocks, -1)).transpose(0, 1)
        return weights.sum(dim=-1), weights @ means.unflatten(0, (layout.num_kv_blocks, -1))

    finest_mass, finest = read(1)
    errors, masses = [], []
    for level in levels:
        mass, total = read(level)
        errors.append((total - finest) - dense * (mass - finest_mass)[..., None])
        masses.append(mass)
    return torch.stack(errors, dim=2).transpose(0, 1), torch.stack(masses, dim=2).transpose(0, 1)


@dataclass(frozen=True)
class Moves:
    """Changes of level in the order they were made, ``[N]`` each."""

    step: Tensor
    """By what the moves of several heads are put in one order."""
    q_block: Tensor
    kv_block: Tensor
    choice: Tensor
    cost: Tensor
    """What the change adds to the sum of ``2**(1 - level)`` over all pairs of blocks."""


class Coarsening:
    """One head's changes from level 1 everywhere towards block means alone, at rising prices of work.

    Args:
        errors, masses: of levels 1, 2, .. the coarsest, as `contributions` gives them.
        costs: work of each level over that of level 1, float64.
    """

    def __init__(self, errors: Tensor, masses: Tensor, layout: BlockLayout, costs: Tensor) -> None:
        num_q, num_kv, levels = layout.num_q_blocks, layout.num_kv_blocks, len(costs)
        self._costs = costs
        self._masses = masses.reshape(num_q, layout.block_q, num_kv, levels)
        flat = errors.reshape(num_q, layout.block_q, num_kv * levels, -1)
        self._products = flat @ flat.mT  # [q blocks, queries, P, P], P pairs of block and level
        pairs = self._products.view(num_q, layout.block_q, num_kv, levels, num_kv, levels)
        self._own = pairs.diagonal(dim1=2, dim2=4).permute(0, 1, 4, 2, 3)  # of a block's levels with each other
        # What changes is in float64, so that rounding does not add up with the moves.
        self._squares = self._own.diagonal(dim1=3, dim2=4).double()
        self._masses = self._masses.double()
        self.choice = torch.zeros((num_q, num_kv), dtype=torch.int64, device=errors.device)
        self._slope = torch.zeros_like(self._squares)  # of the sum of errors with each e_jh
        self._square = torch.zeros_like(self._slope[:, :, 0, 0])  # of the sum of errors
        self._mass = self._masses[..., 0].sum(dim=-1)

    def errors(self) -> Tensor:
        """Squared error of each query block, ``[num_q_blocks]``."""
        return (self._square / self._mass.square()).sum(dim=-1)

    def spent(self) -> float:
        return float(self._costs[self.choice].mean())

    def _changes(self) -> Tensor:
        """By how much each change of one block changes the squared error, ``[num_q_blocks, num_kv_blocks, levels]``."""
        now = self.choice[:, None, :, None].expand(-1, self._slope.shape[1], -1, -1)
        levels = self._slope.shape[3]
        with_now = self._own.gather(4, now[..., None].expand(-1, -1, -1, levels, -1)).squeeze(4)
        square = self._squares + self._squares.gather(3, now) - 2 * with_now
        square = self._square[:, :, None, None] + 2 * (self._slope - self._slope.gather(3, now)) + square
        mass = self._mass[:, :, None, None] + self._masses - self._masses.gather(3, now)
        return (square / mass.square()).sum(dim=1) - self.errors()[:, None, None]

    def _move(self, q_block: Tensor, kv_block: Tensor, to: Tensor) -> None:
        now = self.choice[q_block, kv_block]
        levels = self._slope.shape[3]
        slope = self._slope[q_block]
        rows = self._products[q_block, :, kv_block * levels + to] - self._products[q_block, :, kv_block * levels + now]
        at = torch.arange(len(q_block), device=to.device)
        change = self._squares[q_block, :, kv_block, to] + self._squares[q_block, :, kv_block, now]
        change = change - 2 * self._own[q_block, :, kv_block, to, now]
        self._square[q_block] += 2 * (slope[at, :, kv_block, to] - slope[at, :, kv_block, now]) + change
        self._slope[q_block] = slope + rows.view_as(slope)
        self._mass[q_block] += self._masses[q_block, :, kv_block, to] - self._masses[q_block, :, kv_block, now]
        self.choice[q_block, kv_block] = to

    def walk(self, furthest: float) -> Moves:
        """All moves until no more than ``furthest`` of dense attention's work is spent."""
        found: list[tuple[Tensor, ...]] = []
        levels = len(self._costs)
        slack = SLACK * self._squares[..., -1].sum(dim=(1, 2))
        # Prices are powers of one number, so that the steps of several heads have one order.
        octave = int(torch.log2(slack.max()).floor()) * PRICES_AN_OCTAVE
        while self.spent() > furthest:
            price, turn = 2.0 ** (octave / PRICES_AN_OCTAVE), 0
            while True:
                work = self._costs - self._costs[self.choice][..., None]
                gain, place = (self._changes() + price * work).flatten(1).min(dim=1)
                q_block = (gain < -slack).nonzero()[:, 0]
                if not len(q_block):
                    break
                kv_block, to = place[q_block] // levels, place[q_block] % levels
                step = torch.full_like(to, octave * MOST_TURNS + turn)
                found.append((step, q_block, kv_block, to, work[q_block, kv_block, to]))
                self._move(q_block, kv_block, to)
                turn += 1
            octave += 1
        return Moves(*(torch.cat(column) for column in zip(*found, strict=True)))


def _levels_within(budget: float, heads: Sequence[Moves], layout: BlockLayout, names: Tensor) -> Tensor:
    """int8 ``[heads, num_q_blocks, num_kv_blocks]``: the moves of all heads in their order, up to the budget."""
    num_pairs = layout.num_q_blocks * layout.num_kv_blocks
    step = torch.cat([moves.step for moves in heads])
    pair = torch.cat([h * num_pairs + m.q_block * layout.num_kv_blocks + m.kv_block for h, m in enumerate(heads)])
    order = step.argsort(stable=True)
    cost = torch.cat([moves.cost for moves in heads])[order].cumsum(0)
    saved = (1.0 - budget) * num_pairs * len(heads)
    # Up to the first move with which the budget is kept: no block's moves are taken out of turn.
    count = min(len(cost), int((-cost < saved * (1 - 1e-9)).cumprod(0).sum()) + 1)
    taken = order[:count]
    last = torch.full((len(heads) * num_pairs,), -1, device=step.device)
    last.scatter_reduce_(0, pair[taken], torch.arange(count, device=step.device), "amax")
    choice = torch.cat([moves.choice for moves in heads])[taken]
    choice = pad(choice, (0, 1))[last]  # -1 is the padding: a block that never moved is at level 1
    return names[choice].view(len(heads), layout.num_q_blocks, layout.num_kv_blocks)


def _choices(query: Tensor, key: Tensor, layout: BlockLayout) -> tuple[list[int], Tensor, Tensor]:
    """Levels to choose from, finest first, the same as int8, and their work over that of level 1 in float64."""
    for name, length, block in (("query", query.shape[2], layout.block_q), ("key", key.shape[2], layout.block_kv)):
        if length % block:
            raise ValueError(f"{name} must have a multiple of {block} tokens, got {length}")
    coarsest = layout.block_kv.bit_length()
    levels = [1, *(level for level in POOLED if level < coarsest), coarsest]
    names = torch.tensor(levels, dtype=torch.int8, device=query.device)
    return levels, names, 2.0 ** (1 - names.double())


def levels_by_true_error(query: Tensor, key: Tensor, value: Tensor, layout: BlockLayout, density: float) -> Tensor:
    """The map of least error to dense attention that a search finds, skipped blocks read as their mean.

    Args:
        query, key, value: ``[B, H, L, D]``, L a multiple of both blocks.
        density: executed over dense work, shared by the heads of a sample; more than ``1 / block_kv``.

    Returns:
        int8 ``[B, H, num_q_blocks, num_kv_blocks]`` of levels 1 to 4 and that of a whole block.

    Raises:
        ValueError: L is no multiple of a block.
    """
    levels, names, costs = _choices(query, key, layout)
    furthest = float(costs[-1]) + FURTHEST * (density - float(costs[-1]))
    found = []
    for b in range(query.shape[0]):
        paths = []
        for h in range(query.shape[1]):
            errors, masses = contributions(*(x[b, h].float() for x in (query, key, value)), layout, levels)
            paths.append(Coarsening(errors, masses, layout, costs).walk(furthest))
        found.append(_levels_within(density, paths, layout, names))
    return torch.stack(found)


def levels_by_block_error(query: Tensor, key: Tensor, value: Tensor, layout: BlockLayout, density: float) -> Tensor:
    """The best map by scores of each block alone: its own squared error at each level, as if errors did not meet.

    Arguments and result are those of `levels_by_true_error`, but each head spends ``density``.
    """
    levels, names, costs = _choices(query, key, layout)
    found = []
    for b in range(query.shape[0]):
        for h in range(query.shape[1]):
            errors, _ = contributions(*(x[b, h].float() for x in (query, key, value)), layout, levels)
            squares = errors.square().sum(dim=-1).unflatten(0, (layout.num_q_blocks, -1)).sum(dim=1)
            low, high = 0.0, float(squares.max()) * layout.block_kv
            for _ in range(HALVINGS):
                price = (low + high) / 2
                if float(costs[(squares + price * costs).argmin(dim=-1)].mean()) <= density:
                    high = price
                else:
                    low = price
            found.append(names[(squares + high * costs).argmin(dim=-1)])
    return torch.stack(found).view(*query.shape[:2], layout.num_q_blocks, layout.num_kv_blocks)
