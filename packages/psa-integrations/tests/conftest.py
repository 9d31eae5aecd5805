"""Tiny random diffusers pipelines, built offline, and presets small enough for them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    AutoencoderKLWan,
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)

from psa_config import BlockSize, MaskRatios, Preset, PyramidSparseAttention, VideoScale

TEXT_TOKENS = 16


def wan_transformer(**changes: Any) -> WanTransformer3DModel:
    config = {
        "patch_size": (1, 2, 2),
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "in_channels": 16,
        "out_channels": 16,
        "text_dim": 32,
        "freq_dim": 256,
        "ffn_dim": 32,
        "num_layers": 2,
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
        "rope_max_seq_len": 32,
    }
    return WanTransformer3DModel(**config | changes).eval()


def wan_vae(**changes: Any) -> AutoencoderKLWan:
    config = {
        "base_dim": 3,
        "z_dim": 16,
        "dim_mult": [1, 1, 1, 1],
        "num_res_blocks": 1,
        "temperal_downsample": [False, True, True],
    }
    return AutoencoderKLWan(**config | changes)


def wan21() -> WanPipeline:
    return WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=wan_vae(),
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        transformer=wan_transformer(),
    )


def wan22_a14b() -> WanPipeline:
    return WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=wan_vae(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        transformer=wan_transformer(),
        transformer_2=wan_transformer(),
        boundary_ratio=0.875,
    )


def wan22_5b(pipeline_class: type = WanPipeline) -> Any:
    vae = wan_vae(
        z_dim=48,
        in_channels=12,
        out_channels=12,
        is_residual=True,
        patch_size=2,
        latents_mean=[0.0] * 48,
        latents_std=[1.0] * 48,
        scale_factor_spatial=16,
        scale_factor_temporal=4,
    )
    return pipeline_class(
        tokenizer=None,
        text_encoder=None,
        vae=vae,
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        transformer=wan_transformer(in_channels=48, out_channels=48),
        expand_timesteps=True,
    )


def wan22_5b_i2v() -> WanImageToVideoPipeline:
    return wan22_5b(WanImageToVideoPipeline)


def cogvideox_transformer(**changes: Any) -> CogVideoXTransformer3DModel:
    config = {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "in_channels": 4,
        "out_channels": 4,
        "time_embed_dim": 2,
        "text_embed_dim": 32,
        "num_layers": 2,
        "sample_width": 24,
        "sample_height": 16,
        "sample_frames": 9,
        "patch_size": 2,
        "temporal_compression_ratio": 4,
        "max_text_seq_length": TEXT_TOKENS,
        "use_rotary_positional_embeddings": True,
    }
    return CogVideoXTransformer3DModel(**config | changes).eval()


def cogvideox(**changes: Any) -> CogVideoXPipeline:
    vae = AutoencoderKLCogVideoX(
        in_channels=3,
        out_channels=3,
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=4,
    )
    return CogVideoXPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=vae,
        transformer=cogvideox_transformer(**changes),
        scheduler=CogVideoXDDIMScheduler(),
    )


BUILDERS: dict[str, Callable[[], Any]] = {
    "wan21": wan21,
    "wan22_a14b": wan22_a14b,
    "wan22_5b": wan22_5b,
    "wan22_5b_i2v": wan22_5b_i2v,
    "cogvideox_5b": cogvideox,
    "cogvideox_2b": lambda: cogvideox(use_rotary_positional_embeddings=False),
    "cogvideox_1.5": lambda: cogvideox(patch_size_t=2, sample_frames=17),
}


@pytest.fixture
def build() -> Callable[[str], Any]:
    """Builds the pipeline of a name, with the same random weights each time."""

    def build(name: str) -> Any:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            pipeline = BUILDERS[name]()
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    return build


@pytest.fixture
def build_transformer() -> Callable[..., Any]:
    """Builds a "wan" or "cogvideox" transformer with changes to its configuration."""

    def build_transformer(name: str, **changes: Any) -> Any:
        return {"wan": wan_transformer, "cogvideox": cogvideox_transformer}[name](**changes)

    return build_transformer


@pytest.fixture
def wan_call() -> dict[str, torch.Tensor]:
    """Arguments for the forward of a Wan transformer: 128 tokens."""
    generator = torch.Generator().manual_seed(3)
    return {
        "hidden_states": torch.randn(1, 16, 2, 16, 16, generator=generator),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, TEXT_TOKENS, 32, generator=generator),
    }


@pytest.fixture
def run() -> Callable[..., torch.Tensor]:
    """Runs a pipeline for a few steps and returns its latents."""

    def run(
        pipeline: Any,
        *,
        height: int = 128,
        width: int = 192,
        num_frames: int = 9,
        steps: int = 3,
        guidance: float = 4.0,
        **more: Any,
    ) -> torch.Tensor:
        generator = torch.Generator().manual_seed(1)
        text = torch.randn(2, 1, TEXT_TOKENS, 32, generator=generator)
        if isinstance(pipeline, WanImageToVideoPipeline):
            more["image"] = torch.rand(1, 3, height, width, generator=generator)
        if isinstance(pipeline, CogVideoXPipeline):
            more["max_sequence_length"] = TEXT_TOKENS
        latents: torch.Tensor = pipeline(
            prompt_embeds=text[0],
            negative_prompt_embeds=text[1],
            height=height,
            width=width,
            num_frames=num_frames,
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=generator,
            output_type="latent",
            **more,
        ).frames
        return latents

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
