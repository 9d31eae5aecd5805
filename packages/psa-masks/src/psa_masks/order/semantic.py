"""Tokens in the order of their clusters, head by head: like by like, wherever they stand in the video."""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from psa_kernels import checks as kernel_checks
from psa_kernels import kmeans
from psa_masks.grid import VideoGrid, video_range_of
from psa_masks.order.head_order import HeadOrder
from psa_masks.order.token_order import TokenOrder

_POWER_STEPS = 8


class SemanticOrder(HeadOrder):
    """A :class:`HeadOrder` by clusters.

    Attributes:
        centroids: float32 ``[B, H, num_clusters, D]``, the means of the clusters (float64 for float64 tokens), to start
            from where the tokens have changed a little.
    """

    def __init__(self, order: Tensor, centroids: Tensor) -> None:
        super().__init__(order)
        kernel_checks.floating("centroids", centroids)
        self.centroids = centroids


def semantic_order(
    x: Tensor,
    num_clusters: int,
    *,
    grid: VideoGrid | None = None,
    base: TokenOrder | None = None,
    centroids: Tensor | None = None,
    num_iterations: int = 4,
    seed: int = 0,
    impl: str | None = None,
) -> SemanticOrder:
    """Order the tokens of each head by cluster (``psa_kernels.kmeans``).

    Clusters follow one another along the direction in which their centroids differ most, so that a block which holds
    the end of one and the start of the next holds tokens that are less unlike. The tokens of a cluster come in the
    order of ``base``. Same arguments, same order; nothing waits for the device.

    Args:
        x: queries or keys ``[B, H, L, D]``, as ``psa_kernels.kmeans`` takes them. Keys of grouped-query attention have
            an order for each of their own heads.
        num_clusters: 1 to the number of tokens that are ordered.
        grid: the sequence, ``grid.seq_len == L``: its text tokens stay where they are, and only video tokens are
            grouped. None groups all.
        base: the order of tokens within a cluster, which keeps text where it is; None is the order of ``x``.
        centroids: of an earlier order, to start from; None starts from tokens of ``x``.
        num_iterations, seed, impl: as ``psa_kernels.kmeans`` takes them.

    Returns:
        The order, with the centroids to start from next time.

    Raises:
        TypeError, ValueError: an argument breaks a rule above.

    The semantic-aware permutation is that of Sparse VideoGen2 (arXiv 2505.18875); Pyramid Sparse Attention
    (arXiv 2512.04025) offers it too. The sequence of the clusters is ours.
    """
    kernel_checks.sequence("x", x)
    length = x.shape[2]
    start, stop = video_range_of(grid, length, "x")
    if base is not None:
        check_base(base, start, stop, length, "x")
    clusters = kmeans(
        x[:, :, start:stop],
        num_clusters,
        centroids=centroids,
        num_iterations=num_iterations,
        seed=seed,
        impl=impl,
    )
    place = path_through(clusters.centroids)
    places = place.gather(2, clusters.assignments.long())  # of each video token's cluster
    if base is None:
        video = _stable_argsort(places, num_clusters)
    else:
        tokens = base.index(x.device)[start:stop] - start
        video = tokens[_stable_argsort(places.index_select(2, tokens), num_clusters)]
    token = torch.arange(length, device=x.device)
    before, after = (part.expand(*x.shape[:2], -1) for part in (token[:start], token[stop:]))
    return SemanticOrder(torch.cat([before, video + start, after], dim=2), clusters.centroids)


def path_through(centroids: Tensor) -> Tensor:
    """The places of the clusters on a path along the direction in which they differ most.

    The direction is the first principal one, by a few steps of power iteration from the centroid that is furthest from
    the mean: a start that no sign or random number decides.

    Args:
        centroids: ``[B, H, K, D]``.

    Returns:
        int64 ``[B, H, K]``: the place of each cluster, 0..K-1.
    """
    centred = centroids - centroids.mean(2, keepdim=True)
    furthest = centred.square().sum(-1).argmax(-1)[..., None, None]  # [B, H, 1, 1]
    direction = centred.gather(2, furthest.expand(-1, -1, 1, centroids.shape[3]))  # [B, H, 1, D]
    # Sums instead of products of matrices, which autocast would round.
    along = (centred * direction).sum(-1, keepdim=True)
    for _ in range(_POWER_STEPS):
        direction = normalize((centred * along).sum(2, keepdim=True), dim=-1)
        along = (centred * direction).sum(-1, keepdim=True)  # [B, H, K, 1]
    return along.squeeze(-1).argsort(dim=-1, stable=True).argsort(dim=-1)


def check_base(base: object, start: int, stop: int, length: int, name: str) -> None:
    """``base`` orders the video tokens start..stop-1 of the argument ``name`` among themselves.

    That text stays is not looked at where torch.compile traces, which shows no values.
    """
    if not isinstance(base, TokenOrder):
        raise TypeError(f"base must be a psa_masks.TokenOrder, got {type(base).__name__}")
    if len(base) != length:
        raise ValueError(f"base must have the {length} tokens of {name}, got {len(base)}")
    if not kernel_checks.has_values(base.order):
        return
    stays = torch.arange(length, device="cpu")
    if not (torch.equal(base.order[:start], stays[:start]) and torch.equal(base.order[stop:], stays[stop:])):
        raise ValueError(f"base must keep the text tokens, all outside of {start}..{stop}, where they are")


def _stable_argsort(labels: Tensor, num_labels: int) -> Tensor:
    """The stable argsort of each head of ``labels`` ``[B, H, n]`` in 0..num_labels-1, by one sort of all."""
    batch, heads, length = labels.shape
    head = torch.arange(batch * heads, device=labels.device).view(batch, heads, 1)
    # Small keys take fewer passes of a radix sort.
    keys = labels + head * num_labels
    small = keys.to(torch.int32) if batch * heads * num_labels < 2**31 else keys
    return small.flatten().argsort(stable=True).view(batch, heads, length) - head * length
