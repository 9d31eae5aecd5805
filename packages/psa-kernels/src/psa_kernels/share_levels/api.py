"""``share_levels``: the scores that make up a share of their row get the finest levels."""

from collections.abc import Sequence
from itertools import pairwise
from numbers import Real

import torch
from torch import Tensor

from psa_kernels import checks
from psa_kernels.share_levels.ops import MAX_SCORES, MAX_SHARES, share_levels_op


def share_levels(
    scores: Tensor,
    shares: Sequence[float],
    *,
    min_first: float = 0,
    lengths: Tensor | None = None,
    impl: str | None = None,
) -> Tensor:
    """Give the highest scores of each row that make up a share of its sum level 1, the next level 2, and so on.

    The scores of a row are taken from the highest to the lowest, of equal ones the earlier first. A score gets the
    first level t for which the scores before it add up to less than ``shares[t - 1]`` of the row's sum, and 0 where
    there is none. So the one that crosses a share is on its finer side. The highest score is level 1 whatever the
    shares, a share of 1 takes all that is left, scores of 0 too, and in a row of zeros all are level 1.

    Scores are added up as integers: with 2**e the largest power of two not above the row's highest score (at least
    2**-126), each counts as ``floor(score * 2**(30 - e))``. These sums do not depend on an order, so every
    implementation gives the same levels, and a sum is off by less than 2**-30 of the highest score for each score in
    it. The product of a share and a sum, in float64, is taken for 2**-50 less, so that binary rounding in a share adds
    nothing; one that is the whole sum takes all.
    Source: the threshold rule of Pyramid Sparse Attention (arXiv 2512.04025), which has the score that crosses a share
    on the coarser side.

    Args:
        scores: ``[..., n]`` with n from 1 to 2**22, float16, bfloat16, float32 or float64, any strides, finite and not
            negative (not checked: that would wait for the device). They are read in float32, one past
            its range as its largest number.
        shares: 1 to 9 numbers in [0, 1] that do not decrease. A level whose share equals the one before it gets
            nothing.
        min_first: at least ``ceil(n * min_first)`` scores of each row, the highest, are level 1, in [0, 1].
        lengths: int32 or int64 ``[scores.shape[0]]``, how many scores a row has, for each index of the first of at
            least two axes, such as the samples of a batch; it gets the levels that it would get alone, and what comes
            past it is 0. None is all n, and so is more than n.
        impl: ``"triton"``, ``"torch"`` or ``"reference"``; None is Triton on a GPU, else torch.

    Returns:
        int8, shaped like ``scores``: 0, or 1 to ``len(shares)``. No gradient flows through it.

    Raises:
        TypeError, ValueError: an argument breaks a rule above.
    """
    checks.floating("scores", scores)
    if scores.dim() == 0 or not 1 <= scores.shape[-1] <= MAX_SCORES:
        raise ValueError(f"scores must have shape [..., n] with n from 1 to {MAX_SCORES}, got {list(scores.shape)}")
    ends = _checked_shares(shares)
    least = _share("min_first", min_first)
    _check_lengths(lengths, scores)
    scores = scores.detach()
    if scores.dtype == torch.float64:
        scores = scores.clamp(max=torch.finfo(torch.float32).max).float()
    levels: Tensor = share_levels_op(scores, ends, least, lengths, checks.resolve_impl(impl, scores))
    return levels


def _share(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {type(value).__name__} {value!r}")
    number = float(value)
    if not 0 <= number <= 1:
        raise ValueError(f"{name} must be in [0, 1], got {value}")
    return number


def _checked_shares(shares: object) -> list[float]:
    if isinstance(shares, str | bytes) or not isinstance(shares, Sequence):
        raise TypeError(f"shares must be a sequence of numbers, got {type(shares).__name__}")
    if not 1 <= len(shares) <= MAX_SHARES:
        raise ValueError(f"shares must hold 1 to {MAX_SHARES} numbers, got {len(shares)}")
    ends = [_share(f"shares[{i}]", share) for i, share in enumerate(shares)]
    for before, share in pairwise(ends):
        if share < before:
            raise ValueError(f"shares must not decrease, got {share} after {before}")
    return ends


def _check_lengths(lengths: Tensor | None, scores: Tensor) -> None:
    if lengths is None:
        return
    if not isinstance(lengths, Tensor):
        raise TypeError(f"lengths must be an integer tensor or None, got {type(lengths).__name__}")
    checks.strided("lengths", lengths)
    if lengths.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"lengths must be int32 or int64, got {lengths.dtype}")
    if scores.dim() < 2 or tuple(lengths.shape) != (scores.shape[0],):
        raise ValueError(
            "lengths must have shape [scores.shape[0]], one for each index of scores' first axis of at least two, "
            f"got {list(lengths.shape)} with scores {list(scores.shape)}"
        )
    if lengths.device != scores.device:
        raise ValueError(f"lengths must be on scores' device {scores.device}, got {lengths.device}")
