"""A pass over each head's tokens an iteration: a product finds the clusters, a second one adds up their tokens."""

import torch
from torch import Tensor

_MAX_SCORES = 1 << 22  # held at a time


def _iterate(x: Tensor, centroids: Tensor, nearest: Tensor) -> tuple[Tensor, Tensor]:
    """New centroids ``[K, D]`` and counts ``[K]`` of one head's tokens ``[L, D]``; fills ``nearest`` ``[L]``."""
    num_clusters = len(centroids)
    # The nearest centroid has the largest x.c - |c|^2 / 2.
    half_norms = centroids.square().sum(-1) / 2
    sums = torch.zeros_like(centroids)
    counts = torch.zeros(num_clusters, dtype=torch.int64, device=x.device)
    chunk = max(1, _MAX_SCORES // num_clusters)
    for first in range(0, len(x), chunk):
        tokens = x[first : first + chunk].to(centroids.dtype)
        chosen = (tokens @ centroids.T - half_norms).argmax(-1)  # the first of equals
        nearest[first : first + chunk] = chosen
        # A product, because an indexed sum on a GPU adds in whatever order its threads come.
        member = torch.nn.functional.one_hot(chosen, num_clusters)
        counts += member.sum(0)
        sums += member.T.to(tokens.dtype) @ tokens
    means = sums / counts.clamp(min=1).unsqueeze(-1)
    return means.where(counts.unsqueeze(-1) > 0, centroids), counts


def forward(x: Tensor, centroids: Tensor, num_iterations: int) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, length, _ = x.shape
    centroids = centroids.clone(memory_format=torch.contiguous_format)
    nearest = torch.empty((batch, heads, length), dtype=torch.int32, device=x.device)
    counts = torch.empty(centroids.shape[:3], dtype=torch.int32, device=x.device)
    for _ in range(num_iterations):
        for b in range(batch):
            for h in range(heads):
                centroids[b, h], counts[b, h] = _iterate(x[b, h], centroids[b, h], nearest[b, h])
    return nearest, centroids, counts
