"""Validated attention presets for video models, read from YAML. Needs neither torch nor a sibling package."""

from .__about__ import __version__
from .errors import PresetError, Problem
from .load import PresetBook, load_presets
from .models import (
    BlockSize,
    DenseAttention,
    MaskRatios,
    Preset,
    PyramidSparseAttention,
    Samples,
    SimThresholds,
    VideoScale,
)

__all__ = [
    "BlockSize",
    "DenseAttention",
    "MaskRatios",
    "Preset",
    "PresetBook",
    "PresetError",
    "Problem",
    "PyramidSparseAttention",
    "Samples",
    "SimThresholds",
    "VideoScale",
    "__version__",
    "load_presets",
]
