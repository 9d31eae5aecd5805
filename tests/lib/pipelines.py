"""Small random diffusers models, built offline. Their latents are their output, so there is no VAE."""

from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from torch import Tensor

CHANNELS = 4
TEXT_LENGTH, TEXT_DIM = 8, 16


def wan_transformer() -> WanTransformer3DModel:
    """One layer with two heads of 16; a token is 1 x 2 x 2 latents."""
    return _seeded(
        lambda: WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=CHANNELS,
            out_channels=CHANNELS,
            text_dim=TEXT_DIM,
            freq_dim=32,
            ffn_dim=32,
            num_layers=1,
            rope_max_seq_len=32,
        )
    ).eval()


def wan() -> WanPipeline:
    """Names the step in its cache contexts."""
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    parts = {"tokenizer": None, "text_encoder": None, "vae": None, "scheduler": scheduler}
    return _quiet(WanPipeline(transformer=wan_transformer(), **parts))


def cogvideox() -> CogVideoXPipeline:
    """Leaves the step to its schedule; text stands in the same sequence."""
    transformer = _seeded(
        lambda: CogVideoXTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=CHANNELS,
            out_channels=CHANNELS,
            time_embed_dim=8,
            text_embed_dim=TEXT_DIM,
            num_layers=1,
            sample_width=12,
            sample_height=8,
            sample_frames=9,
            max_text_seq_length=TEXT_LENGTH,
            use_rotary_positional_embeddings=True,
        )
    )
    parts = {"tokenizer": None, "text_encoder": None, "vae": None, "scheduler": CogVideoXDDIMScheduler()}
    return _quiet(CogVideoXPipeline(transformer=transformer.eval(), **parts))


def sample(pipeline: Any, *, steps: int, guidance: float, **more: Any) -> Tensor:
    """Latents of a video of 9 frames of 96x64 pixels after ``steps`` denoising steps."""
    generator = torch.Generator().manual_seed(1)
    text = torch.randn(2, 1, TEXT_LENGTH, TEXT_DIM, generator=generator)
    latents: Tensor = pipeline(
        prompt_embeds=text[0],
        negative_prompt_embeds=text[1],
        max_sequence_length=TEXT_LENGTH,
        height=64,
        width=96,
        num_frames=9,
        num_inference_steps=steps,
        guidance_scale=guidance,
        generator=generator,
        output_type="latent",
        **more,
    ).frames
    return latents


def _seeded(build: Callable[[], Any]) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build()


def _quiet(pipeline: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
