"""Importance to levels: which resolution each query block reads each KV block at."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from psa_kernels import rank_levels, share_levels
from psa_masks import checks


def levels_by_threshold(
    importance: Tensor,
    bounds: Sequence[float],
    *,
    min_full: float = 0.0,
    num_blocks: Tensor | None = None,
    impl: str | None = None,
) -> Tensor:
    """Give the most important blocks of a row the finest levels, up to shares of the row's importance.

    The blocks of a row are taken in order of falling score (equal scores: the earlier block first) and their
    share of the row's sum is accumulated. A block gets the finest level t whose bound is not yet used up: the
    shares before it add up to less than ``bounds[t - 1]``. The block that crosses a bound therefore belongs to
    the finer side, and the kept blocks of a row hold at least ``bounds[-1]`` of its importance, to 2**-30 of the
    largest block for each block of the row. Blocks past the last bound are skipped.

    The largest block of a row is level 1 whatever the bounds. A bound of 1 keeps all that is left, blocks
    of score 0 too. A row of zeros says nothing about its blocks, so all of them are level 1.

    Args:
        importance: floating point ``[..., num_kv_blocks]``, finite and not negative (not checked: that
            would wait for the device). It is read in float32 and added up in whole multiples of a unit, of which the
            largest block of a row has 2**30 or more; what a block has beyond a whole multiple is dropped.
        bounds: cumulative upper ends tau_1 .. tau_H of levels 1..H, 1 to 9 numbers in [0, 1] that do not
            decrease. A level whose bound equals the one before it has an empty range.
        min_full: at least ``ceil(num_kv_blocks * min_full)`` blocks of each row are level 1, in [0, 1].
        num_blocks: int32 or int64 ``[B]``, where importance is ``[B, ..., num_kv_blocks]``: how many KV blocks of each
            sample exist, at most all; it gets the levels that it would get alone, and blocks past them are 0. None is
            all.
        impl: of ``psa_kernels.share_levels``; None picks by device. All give the same levels.

    Returns:
        int8, shaped like ``importance``, on its device: 0 skipped, h in 1..H level h.

    Raises:
        TypeError, ValueError: an argument breaks a rule above.

    The rule is that of Pyramid Sparse Attention (arXiv 2512.04025), except that there the block that crosses
    a bound goes to the coarser side, which can skip the most important block of all.
    """
    scores = checks.importance(importance)
    ends = checks.bounds(bounds)
    least = checks.real("min_full", min_full, 0.0, 1.0)
    num_blocks = checks.num_blocks(num_blocks, scores)
    return share_levels(scores, ends, min_first=least, lengths=num_blocks, impl=impl)


def levels_by_quota(
    importance: Tensor, bounds: Sequence[float], *, num_blocks: Tensor | None = None, impl: str | None = None
) -> Tensor:
    """Give the most important blocks of a row the finest levels, up to shares of the number of blocks.

    In every row the ``ceil(num_kv_blocks * tau_1)`` blocks of highest score (equal scores: the earlier
    block first) are level 1, those up to ``ceil(num_kv_blocks * tau_2)`` level 2, and so on; the rest is
    skipped. At least one block is level 1. The density of the map is known before a score is.

    Args:
        importance: floating point ``[..., num_kv_blocks]``; only its order within a row matters.
        bounds: cumulative shares tau_1 .. tau_H of the KV blocks, 1 to 9 numbers in [0, 1] that do not
            decrease. A level whose bound equals the one before it gets no block.
        num_blocks: int32 or int64 ``[B]``, where importance is ``[B, ..., num_kv_blocks]``: how many KV blocks of each
            sample exist, at most all; it gets the levels that it would get alone, and blocks past them are 0. None is
            all.
        impl: of ``psa_kernels.rank_levels``; None picks by device.

    Returns:
        int8, shaped like ``importance``, on its device: 0 skipped, h in 1..H level h.

    Raises:
        TypeError, ValueError: an argument breaks a rule above.

    The quantile rule of Pyramid Sparse Attention (arXiv 2512.04025), with counts rounded up.
    """
    scores = checks.importance(importance)
    ends = checks.bounds(bounds)
    num_blocks = checks.num_blocks(num_blocks, scores)
    if num_blocks is None:
        return rank_levels(scores, [max(1, checks.share_of(scores.shape[-1], end)) for end in ends], impl=impl)
    exists = existing(num_blocks, scores)
    ranked = scores.masked_fill(~exists, -math.inf)
    return rank_levels(ranked, shares_of(num_blocks, ends), impl=impl).masked_fill(~exists, 0)


def existing(num_blocks: Tensor, importance: Tensor) -> Tensor:
    """bool ``[B, 1, .., num_kv_blocks]``: which KV blocks exist, of ``num_blocks`` ``[B]`` in each sample."""
    position = torch.arange(importance.shape[-1], device=importance.device)
    return position < num_blocks.view(-1, *[1] * (importance.ndim - 1))


def shares_of(num_blocks: Tensor, shares: Sequence[float]) -> Tensor:
    """int32 ``[B, len(shares)]``: :func:`checks.share_of` of each sample's blocks, and at least 1."""
    counts = [(num_blocks.double() * share * (1 - checks.ROUNDING)).ceil() for share in shares]
    return torch.stack(counts, dim=1).clamp(min=1).int()
