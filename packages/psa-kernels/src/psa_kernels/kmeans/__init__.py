"""Tokens grouped by k-means, head by head."""

from psa_kernels.kmeans.api import KMeans, kmeans

__all__ = ["KMeans", "kmeans"]
