"""Video transformers at their published sizes with random weights, for the benchmarks of whole forwards."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    HunyuanVideoTransformer3DModel,
    LTXVideoTransformer3DModel,
    MochiTransformer3DModel,
    WanTransformer3DModel,
)
from torch import Tensor

from psa_integrations.cli.models import MODELS as SPECS
from psa_masks import VideoGrid

TINY_TOKENS = (4, 12, 16)  # frames, rows and columns of latents, in patches of the frame


@dataclass(frozen=True, kw_only=True)
class Model:
    """What is run, at the size that `psa generate` takes for it.

    Args:
        transformer: its class in diffusers.
        config: where its configuration differs from the defaults of the class.
        compression: of the VAE, in time and in space.
        text: tokens and channels of the text.
        masked: whether its self-attention gets a mask, as HunyuanVideo's does, which keeps text that is padding out.
        tiny: further differences for a model that a CPU runs in a second.
        repeats: forwards timed.
    """

    transformer: type
    config: dict[str, Any] = field(default_factory=dict)
    compression: tuple[int, int] = (4, 8)
    text: tuple[int, int] = (512, 4096)
    masked: bool = False
    tiny: dict[str, Any]
    repeats: int = 3


WAN = {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}
WAN_14B = {"num_attention_heads": 40, "ffn_dim": 13824, "num_layers": 40}
WAN_5B = {"num_attention_heads": 24, "ffn_dim": 14336, "num_layers": 30, "in_channels": 48, "out_channels": 48}
COGVIDEOX = {"num_attention_heads": 48, "num_layers": 42, "use_rotary_positional_embeddings": True}
SMALL = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2}
TINY_WAN = SMALL | {"attention_head_dim": 24, "text_dim": 32, "ffn_dim": 64}
TINY_COGVIDEOX = SMALL | {"text_embed_dim": 32, "max_text_seq_length": 16, "sample_width": 48, "sample_height": 40}

# Configurations: of Wan those of its repositories' wan/configs (github.com/Wan-Video), of CogVideoX those that
# diffusers' scripts/convert_cogvideox_to_diffusers.py sets. HunyuanVideo, LTX-Video (2B) and Mochi are the defaults of
# diffusers' classes. One of the two transformers of Wan2.2-A14B, which are alike, is run.
MODELS = {
    "wan2.1-1.3b": Model(transformer=WanTransformer3DModel, config=WAN, tiny=TINY_WAN),
    "cogvideox-5b": Model(
        transformer=CogVideoXTransformer3DModel, config=COGVIDEOX, text=(226, 4096), tiny=TINY_COGVIDEOX
    ),
    "wan2.1-14b": Model(transformer=WanTransformer3DModel, config=WAN_14B, tiny=TINY_WAN, repeats=1),
    "wan2.2-a14b": Model(transformer=WanTransformer3DModel, config=WAN_14B, tiny=TINY_WAN, repeats=1),
    "wan2.2-5b": Model(transformer=WanTransformer3DModel, config=WAN_5B, compression=(4, 16), tiny=TINY_WAN),
    "cogvideox1.5-5b": Model(
        transformer=CogVideoXTransformer3DModel,
        config=COGVIDEOX
        | {"patch_size_t": 2, "patch_bias": False, "sample_width": 300, "sample_height": 300, "sample_frames": 81},
        text=(226, 4096),
        tiny=TINY_COGVIDEOX,
    ),
    "hunyuanvideo": Model(
        transformer=HunyuanVideoTransformer3DModel,
        text=(256, 4096),
        masked=True,
        tiny=SMALL
        | {"num_layers": 1, "num_single_layers": 1, "num_refiner_layers": 1, "rope_axes_dim": (4, 6, 6)}
        | {"text_embed_dim": 32, "pooled_projection_dim": 8},
        repeats=1,
    ),
    "ltx-video": Model(
        transformer=LTXVideoTransformer3DModel,
        compression=(8, 32),
        text=(128, 4096),
        tiny=SMALL | {"in_channels": 8, "out_channels": 8, "cross_attention_dim": 32, "caption_channels": 32},
    ),
    "mochi": Model(
        transformer=MochiTransformer3DModel,
        compression=(6, 8),
        text=(256, 4096),
        tiny=SMALL
        | {"pooled_projection_dim": 16, "text_embed_dim": 32, "time_embed_dim": 4, "max_sequence_length": 16},
    ),
}


@dataclass(frozen=True)
class Forward:
    """A transformer, the arguments of its forward, and the tokens of its self-attention."""

    transformer: Any
    call: dict[str, Any]
    grid: VideoGrid

    def __call__(self) -> Tensor:
        out: Tensor = self.transformer(**self.call, return_dict=False)[0]
        return out


@contextmanager
def built(name: str, device: torch.device, dtype: torch.dtype, *, tiny: bool = False) -> Iterator[Forward]:
    """The model of that name with the same random weights each time; their memory is free again after."""
    transformer = build(name, device, dtype, tiny=tiny)
    try:
        yield Forward(transformer, *arguments(name, transformer, device, dtype, tiny=tiny))
    finally:
        transformer.to("meta")
        if device.type == "cuda":
            torch.cuda.empty_cache()


def build(name: str, device: torch.device, dtype: torch.dtype, *, tiny: bool = False) -> Any:
    """The transformer, made where it will run."""
    model, before = MODELS[name], torch.get_default_dtype()
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            transformer = model.transformer(**model.config | (model.tiny if tiny else {})).eval()
    finally:
        torch.set_default_dtype(before)
    keep = tuple(transformer._keep_in_fp32_modules or ())
    for path, parameter in transformer.requires_grad_(False).named_parameters():  # those diffusers loads in float32
        if any(part in keep for part in path.split(".")):
            parameter.data = parameter.data.float()
    return transformer


def arguments(
    name: str, transformer: Any, device: torch.device, dtype: torch.dtype, *, tiny: bool
) -> tuple[dict[str, Any], VideoGrid]:
    """What the model's pipeline gives to its forward, for one prompt without padding."""
    model = MODELS[name]
    text, text_dim = (16, 32) if tiny else model.text
    generator = torch.Generator(device).manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    call = {
        "encoder_hidden_states": draw(1, text, text_dim),
        "timestep": torch.full((1,), 500, device=device),
    }
    more, grid = CALLS[model.transformer](transformer, latent_size(name, transformer, tiny=tiny), text, draw)
    return call | more, grid


def latent_size(name: str, transformer: Any, *, tiny: bool) -> tuple[int, int, int]:
    """Frames, rows and columns of the latents."""
    patch = transformer.config.patch_size
    patch = patch if isinstance(patch, int) else patch[-1]
    if tiny:
        frames, height, width = TINY_TOKENS
        return frames, height * patch, width * patch
    time, space = MODELS[name].compression
    size = SPECS[name].defaults
    frames = (size.frames - 1) // time + 1
    frames += -frames % (transformer.config.get("patch_size_t") or 1)  # CogVideoX 1.5 takes pairs of frames
    return frames, size.height // space, size.width // space


Size = tuple[int, int, int]
Call = Callable[[Any, Size, int, Callable[..., Tensor]], tuple[dict[str, Any], VideoGrid]]


def call_wan(transformer: Any, size: Size, text: int, draw: Callable[..., Tensor]) -> tuple[dict[str, Any], VideoGrid]:
    frames, height, width = size
    latents = draw(1, transformer.config.in_channels, *size)
    return {"hidden_states": latents}, VideoGrid(frames=frames, height=height // 2, width=width // 2)


def call_cogvideox(
    transformer: Any, size: Size, text: int, draw: Callable[..., Tensor]
) -> tuple[dict[str, Any], VideoGrid]:
    frames, height, width = size
    latents = draw(1, frames, transformer.config.in_channels, height, width)
    pipeline = CogVideoXPipeline(
        tokenizer=None, text_encoder=None, vae=None, transformer=transformer, scheduler=CogVideoXDDIMScheduler()
    )
    rotary = pipeline._prepare_rotary_positional_embeddings(8 * height, 8 * width, frames, latents.device)
    grid = VideoGrid(
        frames=frames // (transformer.config.patch_size_t or 1),
        height=height // 2,
        width=width // 2,
        text=text,
        text_first=True,
    )
    return {"hidden_states": latents, "image_rotary_emb": rotary}, grid


def call_hunyuan_video(
    transformer: Any, size: Size, text: int, draw: Callable[..., Tensor]
) -> tuple[dict[str, Any], VideoGrid]:
    frames, height, width = size
    latents = draw(1, transformer.config.in_channels, *size)
    call = {
        "hidden_states": latents,
        "encoder_attention_mask": torch.ones(1, text, dtype=torch.int64, device=latents.device),
        "pooled_projections": draw(1, transformer.config.pooled_projection_dim),
        "guidance": latents.new_full((1,), 6000.0),
    }
    return call, VideoGrid(frames=frames, height=height // 2, width=width // 2, text=text)


def call_ltx(transformer: Any, size: Size, text: int, draw: Callable[..., Tensor]) -> tuple[dict[str, Any], VideoGrid]:
    frames, height, width = size
    tokens = draw(1, frames * height * width, transformer.config.in_channels)
    call = {
        "hidden_states": tokens,
        "encoder_attention_mask": torch.ones(1, text, dtype=torch.int64, device=tokens.device),
        "num_frames": frames,
        "height": height,
        "width": width,
        "rope_interpolation_scale": (8 / 25, 32, 32),  # seconds and pixels a latent stands for
    }
    return call, VideoGrid(frames=frames, height=height, width=width)


def call_mochi(
    transformer: Any, size: Size, text: int, draw: Callable[..., Tensor]
) -> tuple[dict[str, Any], VideoGrid]:
    frames, height, width = size
    latents = draw(1, transformer.config.in_channels, *size)
    mask = torch.ones(1, text, dtype=torch.bool, device=latents.device)
    grid = VideoGrid(frames=frames, height=height // 2, width=width // 2, text=text)
    return {"hidden_states": latents, "encoder_attention_mask": mask}, grid


CALLS: dict[type, Call] = {
    WanTransformer3DModel: call_wan,
    CogVideoXTransformer3DModel: call_cogvideox,
    HunyuanVideoTransformer3DModel: call_hunyuan_video,
    LTXVideoTransformer3DModel: call_ltx,
    MochiTransformer3DModel: call_mochi,
}
