"""Pyramid sparse attention for diffusers and transformers models, and as a module of its own."""

import logging

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
from psa_integrations.transformers import RegisteredAttention, register_pyramid_attention

__all__ = [
    "AppliedAttention",
    "AttentionStats",
    "LayerStats",
    "LevelMap",
    "LevelRecorder",
    "PyramidAttention",
    "RegisteredAttention",
    "StepError",
    "UnsupportedError",
    "__version__",
    "apply_pyramid_sparse_attention",
    "register_pyramid_attention",
]

# A library leaves it to the program whether and where its log is shown.
logging.getLogger(__name__).addHandler(logging.NullHandler())
