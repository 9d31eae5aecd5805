"""Every distance of every token, and each cluster's mean on its own."""

import torch
from torch import Tensor

from psa_kernels.kmeans.ops import centroid_dtype


def distances(x: Tensor, centroids: Tensor) -> Tensor:
    """Squared Euclidean distances ``[.., L, K]`` of ``x`` ``[.., L, D]`` to ``centroids`` ``[.., K, D]``."""
    return (x.to(centroid_dtype(x)).unsqueeze(-2) - centroids.unsqueeze(-3)).square().sum(-1)


def forward(x: Tensor, centroids: Tensor, num_iterations: int) -> tuple[Tensor, Tensor, Tensor]:
    num_clusters = centroids.shape[2]
    centroids = centroids.clone(memory_format=torch.contiguous_format)
    for _ in range(num_iterations):
        nearest = distances(x, centroids).argmin(-1)  # the first of equals
        for cluster in range(num_clusters):
            inside = (nearest == cluster).unsqueeze(-1)  # [B, H, L, 1]
            count = inside.sum(2)
            mean = x.to(centroids.dtype).where(inside, 0).sum(2) / count.clamp(min=1)
            centroids[:, :, cluster] = mean.where(count > 0, centroids[:, :, cluster])
    counts = torch.nn.functional.one_hot(nearest, num_clusters).sum(2)
    return nearest.int(), centroids, counts.int()
