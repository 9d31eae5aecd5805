"""Pyramid sparse attention for diffusers models, and as a module of its own."""

from psa_integrations.__about__ import __version__
from psa_integrations.attention import PyramidAttention
from psa_integrations.diffusers import (
    AppliedAttention,
    UnsupportedError,
    apply_pyramid_sparse_attention,
)
from psa_integrations.recording import LevelMap, LevelRecorder
from psa_integrations.stats import AttentionStats, LayerStats
from psa_integrations.steps import StepError

__all__ = [
    "AppliedAttention",
    "AttentionStats",
    "LayerStats",
    "LevelMap",
    "LevelRecorder",
    "PyramidAttention",
    "StepError",
    "UnsupportedError",
    "__version__",
    "apply_pyramid_sparse_attention",
]
