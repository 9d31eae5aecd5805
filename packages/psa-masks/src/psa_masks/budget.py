"""Importance to levels under an exact budget of work."""

import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from psa_kernels import BlockLayout, rank_levels
from psa_kernels import checks as kernel_checks
from psa_kernels.layout import existing_keys, max_levels
from psa_masks import checks
from psa_masks.constraints import coarsest_level
from psa_masks.density import UNIFORM_BLOCK
from psa_masks.levels import shares_of

# Error of a block read at level 2, 3, .. over that of its mean: the root mean square over blocks of 64 in the attention
# of the tiny video model (README). Pooling by 2 already makes half of it, as neighbouring keys differ.
_ERRORS = (0.5, 0.7, 0.8, 0.9, 0.97, 0.98, 0.99, 0.995)
# Error of a block's mean over that of leaving it out. Block by block it is little less; but what is left out is always
# missing from the sum of weights, so that such errors add up where others cancel.
_MEAN_OVER_DROPPED = 0.4

_INFINITY_BITS = 0x7F800000  # a float32 that is not negative orders as its bits do


class _Step(NamedTuple):
    """Refining a block from one level to the next finer one that is worth its work."""

    level: int  # after the step
    coarser: int  # before it, 0 where the block was skipped
    threshold: float  # least score for the step, over that for the last step to level 1


def levels_by_budget(
    importance: Tensor,
    density: float,
    *,
    num_levels: int = 4,
    skip: str = "drop",
    errors: Sequence[float] | None = None,
    share: str = "head",
    min_full: float = 0.0,
    full: Tensor | None = None,
    layout: BlockLayout | None = None,
    kv_lengths: Tensor | None = None,
    impl: str | None = None,
) -> Tensor:
    """Give every block pair a level so that a head's work is ``density`` of dense attention's, where it helps most.

    A block of score I is taken to add an error of ``I * c_h`` to the output when it is read at level h, with c = 0 at
    level 1 and 1 where it is skipped. Errors of different blocks have nothing to do with each other, so their squares
    add, and the map to find minimises ``sum (I * c_h)^2`` over all that cost no more than the budget. By Lagrange, with
    a price ``m`` on work, each block takes the level that minimises ``(I * c_h)^2 + m * cost_h``: from the coarsest
    level on it is refined from level g to the next h for as long as ``I^2 * (c_g^2 - c_h^2) / (cost_h - cost_g) >= m``.
    Levels above the lower convex hull of (cost, c^2) are never best, and on the hull this gain falls from step to step.
    So with ``t = sqrt(m)`` each level has one threshold of the score, a fixed multiple of t, and t is as low as the
    budget allows. It is found by searching the bits of a float, with the scores sorted once. Steps that tie at t are
    taken coarse before fine, then by position, as far as the budget goes.

    Of blocks of one size no other map of the same work has a smaller sum of squared errors.

    Guarantee, for each head (or layer): let the *least* be what every map must cost, the means of skipped blocks and
    level 1 for ``full``, ``min_full`` and the largest block of each row. The executed density, the number of
    ``psa_masks.density``, is at most the larger of ``density`` and the least. Unless all is level 1, or the least is
    more, what is left of the budget is less than the work of one block pair. Up to the rounding of a float (2^-50).

    Args:
        importance: floating point ``[B, H, num_q_blocks, num_kv_blocks]``, not negative (not checked: that would wait
            for the device), read in float32. NaN and infinity count as its largest number. A score for each key of the
            block, as ``block_importance`` gives: a short block is ranked as a whole one of its score, and costs what it
            costs.
        density: executed over dense work, in (0, 1]; with ``skip="mean"`` at least what the means cost.
        num_levels: levels 1..num_levels are chosen from, 1 to 9.
        skip: what becomes of the other blocks: ``"drop"`` leaves them out, ``"mean"`` reads each as one row, at level
            ``log2(block_kv) + 1``, which is paid for out of the budget and needs a layout.
        errors: c_h of levels 2..num_levels, in (0, 1], not decreasing; None is 0.5, 0.7, 0.8, .. with
            ``skip="mean"`` and 0.4 of these with ``"drop"``, from a trained model (README).
        share: ``"head"``, each head spends ``density``, or ``"layer"``, the heads of a sample share one budget.
        min_full: at least ``ceil(num_kv_blocks * min_full)`` blocks of each row are level 1, at least one anyway; with
            ``kv_lengths`` the share is of the blocks that exist.
        full: bool, broadcast to the map: pairs at level 1 whatever their score, paid for first.
        layout: the lengths and block sizes behind the map, for the work of short blocks. A causal one costs what
            ``layout.executed_levels`` leaves, and pairs at the diagonal are level 1.
        kv_lengths: int32 or int64 ``[B]``, how many keys of each sample exist; the budget is then a share of the work
            that exists. Blocks past it are 0. Needs a layout.
        impl: of ``psa_kernels.rank_levels``; None picks by device.

    Returns:
        int8, shaped like ``importance``, on its device: 0 skipped, h in 1..num_levels level h, or
        ``log2(block_kv) + 1`` in place of 0.

    Raises:
        TypeError, ValueError: an argument breaks a rule above.

    Nothing waits for the device. Beside the scores about 30 bytes a block pair are held for a while.
    """
    scores = _scores(importance, layout)
    batch, heads = scores.shape[:2]
    rate = checks.share("density", density)
    kernel_checks.choice("skip", skip, ("drop", "mean"))
    kernel_checks.choice("share", share, ("head", "layer"))
    row_full = checks.real("min_full", min_full, 0.0, 1.0)
    if layout is None and (skip == "mean" or kv_lengths is not None):
        what = "skip='mean'" if skip == "mean" else "kv_lengths"
        raise ValueError(f"layout must be given with {what}, as the work depends on its block_kv, got None")
    kernel_checks.lengths(kv_lengths, batch, scores.device)
    _check_full(full, scores)
    block_kv = UNIFORM_BLOCK if layout is None else layout.block_kv
    rest = coarsest_level(block_kv) if skip == "mean" else 0
    steps = _steps(block_kv, num_levels, rest, errors)
    if layout is not None and skip == "mean":
        check_pays_for_means(rate, layout)

    queries, keys, seen, crossing = _sizes(scores, layout, kv_lengths)
    ranked = scores.masked_fill(~seen, -1.0)
    counts: list[int] | Tensor = [max(1, checks.share_of(scores.shape[-1], row_full))]
    if kv_lengths is not None:
        counts = shares_of((keys > 0).sum(-1).flatten(), [row_full])
    forced = rank_levels(ranked, counts, impl=impl) == 1
    forced = (forced | crossing if full is None else forced | crossing | full) & seen
    free = seen & ~forced

    dense = (queries * keys * seen).sum((-2, -1))  # [1 or B, 1]
    least = (queries * torch.where(forced, keys, _rows(keys, rest) * seen)).sum((-2, -1))  # [B, H]
    if share == "layer":
        dense, least = dense * heads, least.sum(-1, keepdim=True)
    budget = ((dense.double() * (rate * (1 + 2**-50))).floor().long() - least).clamp(min=0)
    # Heads of all samples, or samples; the pairs of either.
    sizes = (budget.numel(), scores.shape[1:].numel() if share == "layer" else scores.shape[2:].numel())

    is_short = keys < block_kv
    work = [_Work(torch.where(free & ~is_short, queries, 0).view(sizes), torch.full_like(budget, block_kv))]
    if kv_lengths is not None or (layout is not None and layout.kv_len % block_kv):
        short_keys = torch.where(is_short, keys, 0).amax((-2, -1)).expand_as(budget)
        work.append(_Work(torch.where(free & is_short, queries, 0).view(sizes), short_keys))
    levels = _spend(ranked.view(sizes), work, steps, rest, budget.view(-1, 1))
    return levels.view_as(scores).masked_fill(forced, 1).masked_fill(~seen, 0)


class _Work(NamedTuple):
    """Pairs whose KV blocks have the same number of keys."""

    queries: Tensor  # int64 [rows, pairs], 0 for other pairs
    keys: Tensor  # int64, one number for each row


def _spend(scores: Tensor, work: list[_Work], steps: list[_Step], rest: int, budget: Tensor) -> Tensor:
    """int8 levels ``[rows, pairs]``: in each row the steps of highest gain that its budget pays.

    Args:
        scores: float32 ``[rows, pairs]``.
        work: pairs by the keys of their KV block; a pair in none of them costs nothing.
        steps: from coarse to fine.
        rest: the level before any step.
        budget: int64 ``[rows, 1]``, in products of a query and a key.
    """
    negative, order = (-scores).sort(dim=-1, stable=True)
    # Of the pairs sorted by falling score: the queries before each, once for each number of keys.
    before = [torch.nn.functional.pad(part.queries.gather(-1, order).cumsum(-1), (1, 0)) for part in work]
    prices = [
        [(_rows(part.keys, step.level) - _rows(part.keys, step.coarser)).view(-1, 1) for part in work] for step in steps
    ]

    def taken(bits: Tensor) -> list[Tensor]:
        """How many pairs take each step when the last step's threshold has these bits."""
        threshold = bits.to(torch.int32).view(torch.float32)
        return [torch.searchsorted(negative, -threshold * step.threshold, right=True) for step in steps]

    def cost(counts: list[Tensor]) -> Tensor:
        total = torch.zeros_like(counts[0])
        for count, price in zip(counts, prices, strict=True):
            for queries, rows in zip(before, price, strict=True):
                total += rows * queries.gather(-1, count)
        return total

    # The highest threshold that costs too much, as far as is known; 0 stands in where none does.
    bits = torch.zeros_like(budget)
    for shift, parts in ((20, 2048), (10, 1024), (0, 1024)):
        tried = bits + (torch.arange(1, parts, device=bits.device) << shift)
        too_much = (cost(taken(tried.clamp(max=_INFINITY_BITS))) > budget) & (tried < _INFINITY_BITS)
        bits += too_much.sum(-1, keepdim=True) << shift

    certain, tied = taken(bits + 1), taken(bits)
    budget = budget - cost(certain)
    rank = torch.arange(scores.shape[-1], device=scores.device)
    by_rank = torch.full(scores.shape, rest, dtype=torch.int8, device=scores.device)
    stopped = torch.zeros_like(budget, dtype=torch.bool)
    for step, first, last, price in zip(steps, certain, tied, prices, strict=True):
        spent = before[0] * price[0]
        for queries, rows in zip(before[1:], price[1:], strict=True):
            spent = spent + queries * rows
        paid = spent.gather(-1, first)
        affordable = torch.searchsorted(spent, paid + budget, right=True) - 1
        count = torch.where(stopped, first, torch.minimum(affordable, last))
        budget = budget - (spent.gather(-1, count) - paid)
        stopped |= count < last
        by_rank = torch.where(rank < count, step.level, by_rank)
    return torch.empty_like(by_rank).scatter_(-1, order, by_rank)


def _steps(block_kv: int, num_levels: int, rest: int, errors: Sequence[float] | None) -> list[_Step]:
    """From the coarsest level to level 1, over the lower convex hull of work and squared error."""
    checks.integer("num_levels", num_levels, 1)
    coarsest = min(max_levels(block_kv), checks.MAX_BOUNDS)
    if num_levels > coarsest:
        of_blocks = "" if block_kv == UNIFORM_BLOCK else f", as a block of block_kv {block_kv} has {coarsest}"
        raise ValueError(f"num_levels must be at most {coarsest}{of_blocks}, got {num_levels}")
    if errors is None:
        scale = 1.0 if rest else _MEAN_OVER_DROPPED
        relative = tuple(error * scale for error in _ERRORS[: num_levels - 1])
    else:
        relative = checks.errors(errors)
    if len(relative) != num_levels - 1:
        raise ValueError(f"errors must be of levels 2..num_levels, {num_levels - 1} numbers, got {len(relative)}")
    # Level, work, squared error: from the most work to the least. Where a block of `rest` is the coarsest of the
    # chosen ones, it is that.
    ends = [
        (level, 2.0 ** (1 - level), error * error) for level, error in enumerate((0.0, *relative), 1) if level != rest
    ]
    ends.append((rest, 2.0 ** (1 - rest) if rest else 0.0, 1.0))
    hull: list[tuple[int, float, float]] = []
    for end in ends:
        while len(hull) > 1 and _gain(hull[-1], end) <= _gain(hull[-2], hull[-1]):
            hull.pop()
        hull.append(end)
    last = _gain(hull[0], hull[1]) if len(hull) > 1 else 1.0
    return [
        _Step(finer[0], coarser[0], math.sqrt(last / _gain(finer, coarser)))
        for finer, coarser in reversed(list(pairwise(hull)))
    ]


def _gain(finer: tuple[int, float, float], coarser: tuple[int, float, float]) -> float:
    """Squared error saved for each unit of work."""
    return (coarser[2] - finer[2]) / (finer[1] - coarser[1])


def _sizes(
    scores: Tensor, layout: BlockLayout | None, kv_lengths: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries ``[num_q_blocks, 1]`` and keys ``[1 or B, 1, 1, num_kv_blocks]`` of the blocks; which pairs are seen, and
    which reach past a diagonal, both bool ``[1 or B, 1, num_q_blocks, num_kv_blocks]``."""
    device = scores.device
    num_q_blocks, num_kv_blocks = scores.shape[2:]
    if layout is None:
        queries = torch.ones(num_q_blocks, 1, dtype=torch.int64, device=device)
        keys = torch.full((1, 1, 1, num_kv_blocks), UNIFORM_BLOCK, device=device)
        seen = torch.ones(1, 1, num_q_blocks, num_kv_blocks, dtype=torch.bool, device=device)
        return queries, keys, seen, ~seen
    queries = layout.q_sizes(device)[:, None]
    first = torch.arange(num_kv_blocks, device=device) * layout.block_kv
    keys = existing_keys(layout.kv_len, kv_lengths, device)[:, None, None, None] - first
    keys = keys.clamp(0, layout.block_kv)
    pooled = layout.executed_levels(torch.full((num_q_blocks, num_kv_blocks), 2, dtype=torch.int8, device=device))
    return queries, keys, (pooled > 0) & (keys > 0), pooled == 1


def _rows(keys: Tensor, level: int) -> Tensor:
    """Rows that blocks of so many keys have at a level, 0 of them at level 0."""
    return -(-keys >> (level - 1)) if level else torch.zeros_like(keys)


def _scores(importance: object, layout: BlockLayout | None) -> Tensor:
    scores = checks.importance(importance)
    if scores.ndim != 4 or 0 in scores.shape[2:]:
        raise ValueError(f"importance must have shape [B, H, num_q_blocks, num_kv_blocks], got {list(scores.shape)}")
    if layout is not None:
        checks.block_layout(layout)
        if tuple(scores.shape[2:]) != (layout.num_q_blocks, layout.num_kv_blocks):
            raise ValueError(
                f"importance must have the layout's {layout.num_q_blocks} x {layout.num_kv_blocks} blocks, "
                f"got {list(scores.shape)}"
            )
    # A search among scores that are no numbers would end outside of them. Their place takes the largest number, as NaN
    # is the highest for rank_levels too.
    largest = torch.finfo(torch.float32).max
    return scores.detach().float().nan_to_num(nan=largest, posinf=largest).contiguous()


def _check_full(full: object, scores: Tensor) -> None:
    if full is None:
        return
    if not isinstance(full, Tensor) or full.dtype != torch.bool:
        kind = full.dtype if isinstance(full, Tensor) else type(full).__name__
        raise TypeError(f"full must be a bool tensor, got {kind}")
    kernel_checks.strided("full", full)
    if full.ndim > 4 or any(n not in (1, size) for n, size in zip(full.shape[::-1], scores.shape[::-1], strict=False)):
        raise ValueError(f"full must broadcast to importance's {list(scores.shape)}, got {list(full.shape)}")
    if full.device != scores.device:
        raise ValueError(f"full must be on importance's device {scores.device}, got {full.device}")


@lru_cache(maxsize=64)
def _causal_means(layout: BlockLayout) -> tuple[int, int]:
    """The work of a row for each block that is seen under a causal mask, and that of dense attention."""
    means = dense = 0
    for first in range(0, layout.q_len, layout.block_q):
        queries = min(layout.block_q, layout.q_len - first)
        num_blocks = -(-(first + queries + layout.kv_len - layout.q_len) // layout.block_kv)
        means += queries * num_blocks
        dense += queries * min(layout.kv_len, num_blocks * layout.block_kv)
    return means, dense


def check_pays_for_means(density: float, layout: BlockLayout) -> None:
    """One row for each block that is seen costs no more than the density.

    What torch.compile traces must not depend on each length: there all blocks under a causal mask are taken for whole.
    """
    if not layout.is_causal:
        means, dense = layout.num_kv_blocks, layout.kv_len
    elif torch.compiler.is_compiling():
        means, dense = 1, layout.block_kv
    else:
        means, dense = _causal_means(layout)
    if density * dense < means:
        raise ValueError(
            f"density must be at least {means / dense:.4g} with skip='mean', what a row for each block of "
            f"{layout.block_kv} keys costs, got {density:g}"
        )
