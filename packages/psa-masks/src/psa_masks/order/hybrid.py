"""Queries along the curve of the video, keys and values by cluster."""

from torch import Tensor

from psa_kernels import checks as kernel_checks
from psa_masks.grid import VideoGrid, check_grid, video_range_of
from psa_masks.order.gilbert import gilbert_order
from psa_masks.order.head_order import AttentionOrder
from psa_masks.order.semantic import semantic_order


def hybrid_order(
    grid: VideoGrid,
    key: Tensor,
    num_clusters: int,
    *,
    centroids: Tensor | None = None,
    num_iterations: int = 4,
    seed: int = 0,
    impl: str | None = None,
) -> AttentionOrder:
    """Order queries by :func:`gilbert_order`, keys with their values by :func:`semantic_order`.

    Queries that stand together ask for much the same; what they ask for may stand anywhere. Within a cluster keys come
    along the curve too. Text tokens stay where they are. torch.compile cannot trace this, for the making of the
    curve: make that outside, and inside the :func:`semantic_order` with it for a ``base``.

    Args:
        grid: the sequence of the queries and of the keys.
        key: ``[B, H_kv, grid.seq_len, D]``.
        num_clusters, centroids, num_iterations, seed, impl: as :func:`semantic_order` takes them. The ``.key`` of the
            result has the centroids to start from next time.

    Raises:
        TypeError, ValueError: an argument breaks a rule above.

    The hybrid of Pyramid Sparse Attention (arXiv 2512.04025).
    """
    kernel_checks.sequence("key", key)
    check_grid(grid)
    video_range_of(grid, key.shape[2], "key")  # checks that they go together
    curve = gilbert_order(grid)
    keys = semantic_order(
        key,
        num_clusters,
        grid=grid,
        base=curve,
        centroids=centroids,
        num_iterations=num_iterations,
        seed=seed,
        impl=impl,
    )
    return AttentionOrder(query=curve, key=keys)
