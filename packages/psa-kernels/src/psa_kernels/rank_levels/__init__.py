"""Levels from the rank of each score in its row."""

from psa_kernels.rank_levels.api import rank_levels

__all__ = ["rank_levels"]
