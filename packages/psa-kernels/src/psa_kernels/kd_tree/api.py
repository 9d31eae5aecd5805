"""``kd_tree``: neighbours of a block next to one another."""

import torch
from torch import Tensor

from psa_kernels import checks
from psa_kernels.kd_tree.ops import MAX_HELD, held, kd_tree_op


def kd_tree(points: Tensor, *, impl: str | None = None) -> Tensor:
    """Order the tokens of each block as the leaves of a balanced k-d tree, so that its nodes are runs of near tokens.

    The root is the whole block. A node of more than two tokens is sorted along the coordinate of largest variance, the
    first of equals, and its halves are the next nodes. Of tokens with the same value the earlier comes first.

    All that is compared are whole numbers: the coordinates of a block, rounded down to a grid that has 2**21 to 2**22
    steps in the widest of them. So every implementation gives the same order. NaN counts as 0, and numbers past
    +-2**126 as that.
    Source: Friedman, Bentley and Finkel, An algorithm for finding best matches in logarithmic expected time (1977).

    Args:
        points: ``[..., n, m]``: m coordinates, at least 1, of the n tokens of each block; n a power of two up to 256.
            float16, bfloat16, float32 or float64, which is rounded to float32; any strides.
        impl: ``"triton"`` (not for more than 16,384 coordinates a block), ``"torch"`` or ``"reference"``; None is
            Triton on a GPU for what it takes, else torch.

    Returns:
        int32 ``[..., n]``, a permutation of 0..n-1 in each block: the tokens in their order. No gradient flows through
        it.

    Raises:
        TypeError, ValueError: an argument breaks a rule above.
    """
    checks.floating("points", points)
    if points.dim() < 2 or points.shape[-1] == 0:
        raise ValueError(f"points must have shape [..., n, m] with m at least 1, got {list(points.shape)}")
    size, num_coordinates = points.shape[-2:]
    checks.power_of_two("n of points [..., n, m]", size)
    points = points.detach()
    if points.dtype == torch.float64:
        points = points.float()
    if impl is None and held(size, num_coordinates) > MAX_HELD:
        impl = "torch"
    order: Tensor = kd_tree_op(points, checks.resolve_impl(impl, points))
    return order
