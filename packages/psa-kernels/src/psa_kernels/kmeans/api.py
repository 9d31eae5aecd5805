"""``kmeans``: which tokens of a head are alike."""

from typing import NamedTuple

import torch
from torch import Tensor

from psa_kernels import checks
from psa_kernels.block_importance.sampling import sample_positions
from psa_kernels.kmeans.ops import centroid_dtype, kmeans_op

_STREAM = 3  # of the draw; importance has 1 and 2


class KMeans(NamedTuple):
    """The clusters of every head.

    Attributes:
        assignments: int32 ``[B, H, L]``, the cluster of each token.
        centroids: float32 ``[B, H, K, D]`` (float64 for float64 tokens), the mean of each cluster; what an empty
            cluster had before.
        counts: int32 ``[B, H, K]``, the tokens of each cluster.
    """

    assignments: Tensor
    centroids: Tensor
    counts: Tensor


def kmeans(
    x: Tensor,
    num_clusters: int,
    *,
    centroids: Tensor | None = None,
    num_iterations: int = 4,
    seed: int = 0,
    impl: str | None = None,
) -> KMeans:
    """Group the tokens of each head by Lloyd's algorithm, a fixed number of iterations.

    An iteration puts each token into the cluster of the nearest centroid by Euclidean distance, the first of equally
    near ones, and then moves each centroid to the mean of its cluster. So the centroids returned are the means of the
    clusters returned, and the clusters are by the centroids before the last move. An empty cluster keeps its centroid.
    Same arguments, same bits: nothing is summed in an order that changes, and no random state is read or moved.
    Source: S. P. Lloyd, Least squares quantization in PCM (1982).

    Args:
        x: ``[B, H, L, D]``, float16, bfloat16, float32 or float64, any strides. Finite, and with squares that float32
            holds (not checked: that would wait for the device); else clusters differ between implementations.
        num_clusters: K, 1 to L.
        centroids: ``[B, H, K, D]`` to start from, of the dtype that is returned, such as those of an earlier call.
            None starts from K tokens of each head, one drawn from each of K equal stretches of the sequence.
        num_iterations: at least 1.
        seed: of that draw.
        impl: ``"triton"`` (not for float64, D at most 256), ``"torch"`` or ``"reference"``; None is Triton on a GPU,
            torch elsewhere.

    Returns:
        Assignments, centroids and counts. No gradient flows through them.

    Raises:
        TypeError, ValueError: an argument breaks a rule above.
    """
    checks.sequence("x", x)
    checks.positive_int("num_clusters", num_clusters)
    checks.positive_int("num_iterations", num_iterations)
    checks.integer("seed", seed)
    if num_clusters > x.shape[2]:
        raise ValueError(f"num_clusters must be at most the {x.shape[2]} tokens of x, got {num_clusters}")
    x = x.detach()
    if centroids is None:
        length = torch.full((1,), x.shape[2], device=x.device)
        drawn = sample_positions(length, 1, x.shape[2], num_clusters, seed, _STREAM).flatten()
        centroids = x.index_select(2, drawn).to(centroid_dtype(x))
    else:
        _check_centroids(centroids, x, num_clusters)
    return KMeans(*kmeans_op(x, centroids.detach(), num_iterations, checks.resolve_impl(impl, x)))


def _check_centroids(centroids: object, x: Tensor, num_clusters: int) -> None:
    if not isinstance(centroids, Tensor):
        raise TypeError(f"centroids must be a tensor or None, got {type(centroids).__name__}")
    checks.strided("centroids", centroids)
    if centroids.dtype != centroid_dtype(x):
        raise TypeError(f"centroids must be {centroid_dtype(x)} with x in {x.dtype}, got {centroids.dtype}")
    shape = [*x.shape[:2], num_clusters, x.shape[3]]
    if list(centroids.shape) != shape:
        raise ValueError(f"centroids must have shape [B, H, num_clusters, D] = {shape}, got {list(centroids.shape)}")
    if centroids.device != x.device:
        raise ValueError(f"centroids must be on x's device {x.device}, got {centroids.device}")
