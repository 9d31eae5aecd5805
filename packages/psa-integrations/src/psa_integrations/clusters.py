"""Token orders by cluster, made anew in every call from where the step before left off."""

from typing import NamedTuple

import torch
from torch import Tensor

from psa_masks import AttentionOrder, SemanticOrder, TokenOrder, VideoGrid, semantic_order


class _Left(NamedTuple):
    """The centroids that a step leaves, of queries (None where these follow the curve) and of keys."""

    step: int
    query: Tensor | None
    key: Tensor


class ClusterOrders:
    """Orders the tokens of each attention by k-means.

    What a call starts from depends on its step, never on how many calls there were: it is the centroids that its layer
    had in an earlier step of the same run. All calls of one step, such as those with and without the prompt, start
    from the same. A step that is lower than the last one starts a new run, and without a step every call starts anew.

    Args:
        num_clusters, num_iterations, seed: as psa_masks.semantic_order takes them.
        queries: whether queries are ordered by cluster too; otherwise they are in the order of `base`.
        grid: the sequence; its text stays where it is.
        base: the order of tokens within a cluster, None where the tokens come in it already.
    """

    keeps_blocks = False

    def __init__(
        self,
        *,
        num_clusters: int,
        num_iterations: int,
        seed: int,
        queries: bool,
        grid: VideoGrid,
        base: TokenOrder | None = None,
    ) -> None:
        self._num_clusters = num_clusters
        self._num_iterations = num_iterations
        self._seed = seed
        self._queries = queries
        self._grid = grid
        self._base = base
        self._last: dict[int, _Left] = {}
        self._earlier: dict[int, _Left] = {}

    def __call__(
        self, query: Tensor, key: Tensor, *, step: int | None, layer: int = 0, impl: str | None = None
    ) -> AttentionOrder:
        """The orders of one attention.

        Args:
            query: [B, H, L, D].
            key: [B, H_kv, L, D].
            step: the denoising step, None where it is unknown.
            layer: whose clusters these are.
            impl: of k-means, see psa_kernels.kmeans.
        """
        start = self._start(layer, step)
        queries = None
        if self._queries:
            queries = self._order(query, None if start is None else start.query, impl)
        keys = self._order(key, None if start is None else start.key, impl)
        if step is not None:
            self._last[layer] = _Left(step, None if queries is None else queries.centroids, keys.centroids)
        return AttentionOrder(query=self._base if queries is None else queries, key=keys)

    def reset(self) -> None:
        """Forgets all centroids."""
        self._last.clear()
        self._earlier.clear()

    def _start(self, layer: int, step: int | None) -> _Left | None:
        if step is None:
            return None
        last = self._last.get(layer)
        if last is not None and last.step < step:
            self._earlier[layer] = last
        elif last is not None and last.step > step:
            self._earlier.pop(layer, None)
        return self._earlier.get(layer)

    def _order(self, x: Tensor, centroids: Tensor | None, impl: str | None) -> SemanticOrder:
        shape = (*x.shape[:2], self._num_clusters, x.shape[3])
        dtype = torch.promote_types(x.dtype, torch.float32)
        if centroids is not None and (centroids.shape, centroids.dtype, centroids.device) != (shape, dtype, x.device):
            centroids = None  # another batch, or the model has been moved
        return semantic_order(
            x,
            self._num_clusters,
            grid=self._grid,
            base=self._base,
            centroids=centroids,
            num_iterations=self._num_iterations,
            seed=self._seed,
            impl=impl,
        )
