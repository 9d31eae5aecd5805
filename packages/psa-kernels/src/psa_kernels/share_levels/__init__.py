"""Levels from the share of its row's sum that the scores above each score make up."""

from psa_kernels.share_levels.api import share_levels

__all__ = ["share_levels"]
