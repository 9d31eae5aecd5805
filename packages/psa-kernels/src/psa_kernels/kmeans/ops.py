"""The registered operator behind ``kmeans``."""

import torch
from torch import Tensor

from psa_kernels.registry import register


def centroid_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _fake(x: Tensor, centroids: Tensor, num_iterations: int) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, num_clusters = centroids.shape[:3]
    return (
        x.new_empty((batch, heads, x.shape[2]), dtype=torch.int32),
        torch.empty_like(centroids, memory_format=torch.contiguous_format),
        x.new_empty((batch, heads, num_clusters), dtype=torch.int32),
    )


kmeans_op = register(
    "psa_kernels.kmeans",
    "kmeans(Tensor x, Tensor centroids, int num_iterations) -> (Tensor, Tensor, Tensor)",
    _fake,
)
