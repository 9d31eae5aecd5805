"""``rank_levels``: the highest scores of a row get the finest levels."""

from collections.abc import Sequence

import torch
from torch import Tensor

from psa_kernels import checks
from psa_kernels.rank_levels.ops import MAX_COUNTS, rank_levels_op

_MAX_COUNT = 2**62


def rank_levels(scores: Tensor, counts: Sequence[int] | Tensor, *, impl: str | None = None) -> Tensor:
    """Give the highest scores of each row level 1, the next level 2, and so on.

    In every row the ``counts[0]`` highest scores get level 1, the following ones up to ``counts[1]`` in all level 2,
    up to ``counts[-1]`` the last level, and the rest 0. Of equal scores the earlier ranks higher; -0.0 equals 0.0, and
    NaN is above everything, as in a stable ``torch.sort``. Every implementation gives the same levels.
    Source: the quantile rule of Pyramid Sparse Attention (arXiv 2512.04025).

    Args:
        scores: ``[..., n]`` with n at least 1, float16, bfloat16, float32 or float64, any strides.
        counts: 1 to 9 integers of at least 0 that do not decrease; one above n counts as n. A level whose count equals
            the one before it gets nothing. Or int32 ``[scores.shape[0], H]``, counts for each index of the first of at
            least two axes, such as the samples of a batch; nobody waits for a GPU to check their values.
        impl: ``"triton"`` (not for float64), ``"torch"`` or ``"reference"``; None is Triton on a GPU for what it
            takes, else torch.

    Returns:
        int8, shaped like ``scores``: 0, or 1 to ``len(counts)``. No gradient flows through it.

    Raises:
        TypeError, ValueError: an argument breaks a rule above.
    """
    checks.floating("scores", scores)
    if scores.dim() == 0 or scores.shape[-1] == 0:
        raise ValueError(f"scores must have shape [..., n] with n at least 1, got {list(scores.shape)}")
    of_all: list[int] = []
    sample_counts = None
    if isinstance(counts, Tensor):
        _check_sample_counts(counts, scores)
        sample_counts = counts
    else:
        of_all = _checked_counts(counts)
    if impl is None and scores.dtype == torch.float64:
        impl = "torch"
    levels: Tensor = rank_levels_op(scores.detach(), of_all, sample_counts, checks.resolve_impl(impl, scores))
    return levels


def _checked_counts(counts: object) -> list[int]:
    if isinstance(counts, str | bytes) or not isinstance(counts, Sequence):
        raise TypeError(f"counts must be a sequence of integers, got {type(counts).__name__}")
    if not 1 <= len(counts) <= MAX_COUNTS:
        raise ValueError(f"counts must hold 1 to {MAX_COUNTS} integers, got {len(counts)}")
    before = 0
    for i, count in enumerate(counts):
        checks.integer(f"counts[{i}]", count)
        if count < before:
            raise ValueError(f"counts must not decrease from 0 on, got {count} after {before}")
        before = count
    # An operator's integers have 64 bits, and no row is as long as that.
    return [count if count <= _MAX_COUNT else _MAX_COUNT for count in counts]


def _check_sample_counts(counts: Tensor, scores: Tensor) -> None:
    checks.strided("counts", counts)
    if counts.dtype != torch.int32:
        raise TypeError(f"counts must be int32 where they are a tensor, got {counts.dtype}")
    samples = scores.shape[0]
    if scores.dim() < 2 or counts.dim() != 2 or counts.shape[0] != samples or not 1 <= counts.shape[1] <= MAX_COUNTS:
        raise ValueError(
            f"counts must have shape [{samples}, 1 to {MAX_COUNTS}], a list for each index of scores' first axis of at "
            f"least two, got {list(counts.shape)} with scores {list(scores.shape)}"
        )
    if counts.device != scores.device:
        raise ValueError(f"counts must be on scores' device {scores.device}, got {counts.device}")
    if checks.has_values(counts) and (counts.diff(dim=1, prepend=torch.zeros_like(counts[:, :1])) < 0).any():
        raise ValueError(f"counts must not decrease from 0 on, got {counts.tolist()[:4]}")
