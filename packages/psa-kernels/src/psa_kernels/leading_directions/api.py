"""``leading_directions``: in which few projections keys differ for their queries."""

import torch
from torch import Tensor

from psa_kernels import checks
from psa_kernels.leading_directions.ops import MAX_DIRECTIONS, leading_directions_op


def leading_directions(seen: Tensor, spread: Tensor, num_directions: int, *, impl: str | None = None) -> Tensor:
    """Projections of keys that keep most of what their logits vary by.

    With ``seen`` the second moments S of a head's queries and ``spread`` the covariance C of its keys, the logits of
    two keys apart by x differ by ``x.T @ S @ x`` in the mean square. The projections of most variance in that measure
    are the leading eigenvectors of ``S @ C``, each scaled so that its variance is its eigenvalue. They are approached
    by power iteration, a fixed 7 steps from the first unit vectors, and all scaled alike: the longest has length 1. The
    scales of ``seen`` and ``spread`` do not matter. Same input, same bits; nothing waits for the device.
    Source: orthogonal iteration, Golub and Van Loan, Matrix Computations, section 8.2.

    Args:
        seen, spread: ``[..., D, D]``, symmetric and positive semidefinite, float32 or float64, any strides.
        num_directions: 1 to D.
        impl: ``"triton"`` (float32, D at most 256, at most 32 directions), ``"torch"`` or ``"reference"``; None is
            Triton on a GPU for what it takes, else torch.

    Returns:
        ``[..., D, num_directions]`` of their dtype. No gradient flows through it.

    Raises:
        TypeError, ValueError: an argument breaks a rule above.
    """
    for name, x in (("seen", seen), ("spread", spread)):
        checks.floating(name, x)
        if x.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"{name} must be float32 or float64, got {x.dtype}")
        if x.dim() < 2 or x.shape[-1] != x.shape[-2] or x.shape[-1] == 0:
            raise ValueError(f"{name} must have shape [..., D, D] with D at least 1, got {list(x.shape)}")
    checks.same("spread", spread, "seen", seen)
    if spread.shape != seen.shape:
        raise ValueError(f"spread must have seen's shape {list(seen.shape)}, got {list(spread.shape)}")
    checks.integer("num_directions", num_directions)
    if not 1 <= num_directions <= seen.shape[-1]:
        raise ValueError(f"num_directions must be 1 to the {seen.shape[-1]} features of seen, got {num_directions}")
    is_large = seen.shape[-1] > checks.MAX_HEAD_DIM or num_directions > MAX_DIRECTIONS
    if impl is None and (is_large or seen.dtype == torch.float64):
        impl = "torch"
    directions: Tensor = leading_directions_op(
        seen.detach(), spread.detach(), num_directions, checks.resolve_impl(impl, seen)
    )
    return directions
