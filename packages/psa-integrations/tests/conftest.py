"""Fixtures around the tiny random pipelines of `lib`, and presets small enough for them."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from psa_config import BlockSize, MaskRatios, Preset, PyramidSparseAttention, VideoScale

sys.path.insert(0, str(Path(__file__).parent / "lib"))

import tiny_pipelines


@pytest.fixture
def build() -> Callable[[str], Any]:
    """Builds the pipeline of a name, with the same random weights each time."""
    return tiny_pipelines.build


@pytest.fixture
def build_transformer() -> Callable[..., Any]:
    """Builds a "wan" or "cogvideox" transformer with changes to its configuration."""

    def build_transformer(name: str, **changes: Any) -> Any:
        return getattr(tiny_pipelines, f"{name}_transformer")(**changes)

    return build_transformer


@pytest.fixture
def wan_call() -> dict[str, torch.Tensor]:
    """Arguments for the forward of a Wan transformer: 128 tokens."""
    generator = torch.Generator().manual_seed(3)
    return {
        "hidden_states": torch.randn(1, 16, 2, 16, 16, generator=generator),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, tiny_pipelines.TEXT_TOKENS, 32, generator=generator),
    }


@pytest.fixture
def run() -> Callable[..., torch.Tensor]:
    """Runs a pipeline for a few steps and returns its latents."""

    def run(pipeline: Any, *, height: int = 128, width: int = 192, num_frames: int = 9, **more: Any) -> torch.Tensor:
        return tiny_pipelines.sample(pipeline, height=height, width=width, num_frames=num_frames, **more)

    return run


@pytest.fixture
def make_preset() -> Callable[..., Preset]:
    """A preset with blocks of 32 tokens and the given upper bounds of levels 1 to 4."""

    def make_preset(bounds: tuple[float, float, float, float], **changes: Any) -> Preset:
        edges = (0.0, *bounds)
        ratios = {str(pool): (edges[i], edges[i + 1]) for i, pool in enumerate((1, 2, 4, 8))}
        settings = {
            "use_rearrange": True,
            "block_size": BlockSize(m=32, n=32),
            "mask_ratios": MaskRatios(**ratios),
            "mask_mode": "topk",
        }
        return Preset(
            model="test",
            name="test",
            text_length=0,
            video_scale=VideoScale(width_divisor=16, height_divisor=16, depth_divisor=4),
            attention=PyramidSparseAttention(type="psa", **settings | changes),
        )

    return make_preset


@pytest.fixture
def full(make_preset: Callable[..., Preset]) -> Preset:
    """Every block at level 1, in the token order of the curve."""
    return make_preset((1.0, 1.0, 1.0, 1.0))


@pytest.fixture
def sparse(make_preset: Callable[..., Preset]) -> Preset:
    """A quarter of the blocks at level 1, half of them at levels 2 to 4, a quarter skipped."""
    return make_preset((0.25, 0.4, 0.6, 0.75))
