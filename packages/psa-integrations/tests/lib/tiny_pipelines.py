"""Tiny random diffusers pipelines, built offline: one for each form of each model. Weights are the same each time."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    AutoencoderKLHunyuanVideo,
    AutoencoderKLLTXVideo,
    AutoencoderKLWan,
    CogVideoXDDIMScheduler,
    CogVideoXImageToVideoPipeline,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoImageToVideoPipeline,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
    LTXImageToVideoPipeline,
    LTXPipeline,
    LTXVideoTransformer3DModel,
    MochiPipeline,
    MochiTransformer3DModel,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from torch import Tensor

TEXT_TOKENS, TEXT_DIM = 16, 32
NO_TEXT_MODEL = {"tokenizer": None, "text_encoder": None}


def wan_transformer(**changes: Any) -> WanTransformer3DModel:
    config = {
        "patch_size": (1, 2, 2),
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "in_channels": 16,
        "out_channels": 16,
        "text_dim": TEXT_DIM,
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


def unipc() -> UniPCMultistepScheduler:
    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)


def wan21() -> WanPipeline:
    return WanPipeline(**NO_TEXT_MODEL, vae=wan_vae(), scheduler=unipc(), transformer=wan_transformer())


def wan21_i2v() -> WanImageToVideoPipeline:
    # Imported here because most forms have no image encoder.
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

    vision = CLIPVisionConfig(
        hidden_size=4,
        intermediate_size=8,
        projection_dim=4,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=16,
    )
    return WanImageToVideoPipeline(
        **NO_TEXT_MODEL,
        vae=wan_vae(),
        scheduler=unipc(),
        transformer=wan_transformer(in_channels=36, image_dim=4, added_kv_proj_dim=24),
        image_encoder=CLIPVisionModel(vision).eval(),
        image_processor=CLIPImageProcessor(crop_size=32, size=32),
    )


def wan22_a14b() -> WanPipeline:
    return WanPipeline(
        **NO_TEXT_MODEL,
        vae=wan_vae(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        transformer=wan_transformer(),
        transformer_2=wan_transformer(),
        boundary_ratio=0.875,
    )


def wan22_a14b_i2v() -> WanImageToVideoPipeline:
    return WanImageToVideoPipeline(
        **NO_TEXT_MODEL,
        vae=wan_vae(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        transformer=wan_transformer(in_channels=36),
        transformer_2=wan_transformer(in_channels=36),
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
        **NO_TEXT_MODEL,
        vae=vae,
        scheduler=unipc(),
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
        "text_embed_dim": TEXT_DIM,
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


def cogvideox(pipeline_class: type = CogVideoXPipeline, **changes: Any) -> Any:
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
    return pipeline_class(
        **NO_TEXT_MODEL,
        vae=vae,
        transformer=cogvideox_transformer(**changes),
        scheduler=CogVideoXDDIMScheduler(),
    )


def cogvideox_2b() -> CogVideoXPipeline:
    return cogvideox(use_rotary_positional_embeddings=False)


def cogvideox_15() -> CogVideoXPipeline:
    return cogvideox(patch_size_t=2, sample_frames=17, sample_height=32, sample_width=32)


def cogvideox_5b_i2v() -> CogVideoXImageToVideoPipeline:
    return cogvideox(CogVideoXImageToVideoPipeline, in_channels=8, use_learned_positional_embeddings=False)


def cogvideox_15_i2v() -> CogVideoXImageToVideoPipeline:
    return cogvideox(
        CogVideoXImageToVideoPipeline,
        in_channels=8,
        patch_size_t=2,
        sample_frames=17,
        sample_height=32,
        sample_width=32,
        ofs_embed_dim=2,
    )


def hunyuan_transformer(**changes: Any) -> HunyuanVideoTransformer3DModel:
    config = {
        "in_channels": 4,
        "out_channels": 4,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "num_layers": 1,
        "num_single_layers": 1,
        "num_refiner_layers": 1,
        "patch_size": 2,
        "patch_size_t": 1,
        "guidance_embeds": True,
        "text_embed_dim": TEXT_DIM,
        "pooled_projection_dim": 8,
        "rope_axes_dim": (4, 6, 6),
    }
    return HunyuanVideoTransformer3DModel(**config | changes).eval()


def hunyuan_vae() -> AutoencoderKLHunyuanVideo:
    return AutoencoderKLHunyuanVideo(
        latent_channels=4,
        down_block_types=("HunyuanVideoDownBlock3D",) * 4,
        up_block_types=("HunyuanVideoUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
    )


def hunyuan() -> HunyuanVideoPipeline:
    return HunyuanVideoPipeline(
        **NO_TEXT_MODEL,
        text_encoder_2=None,
        tokenizer_2=None,
        vae=hunyuan_vae(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        transformer=hunyuan_transformer(),
    )


def hunyuan_i2v(condition: str, **changes: Any) -> HunyuanVideoImageToVideoPipeline:
    return HunyuanVideoImageToVideoPipeline(
        **NO_TEXT_MODEL,
        text_encoder_2=None,
        tokenizer_2=None,
        image_processor=None,
        vae=hunyuan_vae(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        transformer=hunyuan_transformer(image_condition_type=condition, **changes),
    )


def ltx(pipeline_class: type = LTXPipeline) -> Any:
    vae = AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
    )
    transformer = LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=16,
        cross_attention_dim=32,
        num_layers=2,
        caption_channels=TEXT_DIM,
    )
    return pipeline_class(
        **NO_TEXT_MODEL,
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        transformer=transformer.eval(),
    )


def mochi() -> MochiPipeline:
    transformer = MochiTransformer3DModel(
        patch_size=2,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        pooled_projection_dim=16,
        in_channels=12,
        text_embed_dim=TEXT_DIM,
        time_embed_dim=4,
        max_sequence_length=TEXT_TOKENS,
    )
    torch.nn.init.normal_(transformer.pos_frequencies)  # zeros before training, when no token would know its place
    return MochiPipeline(
        **NO_TEXT_MODEL,
        vae=None,
        scheduler=FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
        transformer=transformer.eval(),
    )


@dataclass(frozen=True, kw_only=True)
class Form:
    """One way to run one model.

    Args:
        model: the model's name.
        title: what this form is called beside the model.
        build: makes the pipeline.
        pixels: the side of a token in pixels.
        frames_per_token: video frames a token stands for; the first token stands for one.
        image: whether it starts from an image.
        guidance: how the pipeline makes its guided predictions: in two calls or in one batch.
        masked_text: whether the transformer is told which text tokens are padding.
        text_in_attention: whether text tokens take part in the self-attention.
    """

    model: str
    title: str
    build: Callable[[], Any]
    pixels: int = 16
    frames_per_token: int = 4
    image: bool = False
    guidance: str = "two calls"
    masked_text: bool = False
    text_in_attention: bool = False

    def size(self, frames: int, height: int, width: int) -> dict[str, int]:
        """Arguments of the pipeline for a video of so many tokens."""
        return {
            "num_frames": (frames - 1) * self.frames_per_token + 1,
            "height": height * self.pixels,
            "width": width * self.pixels,
        }


def hunyuan_token_replace() -> HunyuanVideoImageToVideoPipeline:
    return hunyuan_i2v("token_replace")


def hunyuan_latent_concat() -> HunyuanVideoImageToVideoPipeline:
    return hunyuan_i2v("latent_concat", in_channels=9, guidance_embeds=False)


_COG = {"guidance": "one batch", "text_in_attention": True}
_HUNYUAN = {"model": "HunyuanVideo", "masked_text": True, "text_in_attention": True}
_LTX = {"model": "LTX-Video", "pixels": 32, "frames_per_token": 8, "guidance": "one batch", "masked_text": True}

FORMS: dict[str, Form] = {
    "wan21": Form(model="Wan 2.1", title="T2V", build=wan21),
    "wan21_i2v": Form(model="Wan 2.1", title="I2V", build=wan21_i2v, image=True),
    "wan22_a14b": Form(model="Wan 2.2 A14B", title="T2V", build=wan22_a14b),
    "wan22_a14b_i2v": Form(model="Wan 2.2 A14B", title="I2V", build=wan22_a14b_i2v, image=True),
    "wan22_5b": Form(model="Wan 2.2 TI2V-5B", title="T2V", build=wan22_5b, pixels=32),
    "wan22_5b_i2v": Form(model="Wan 2.2 TI2V-5B", title="I2V", build=wan22_5b_i2v, pixels=32, image=True),
    "cogvideox_2b": Form(model="CogVideoX 2B", title="T2V", build=cogvideox_2b, **_COG),
    "cogvideox_5b": Form(model="CogVideoX 5B", title="T2V", build=cogvideox, **_COG),
    "cogvideox_5b_i2v": Form(model="CogVideoX 5B", title="I2V", build=cogvideox_5b_i2v, image=True, **_COG),
    "cogvideox_1.5": Form(model="CogVideoX 1.5 5B", title="T2V", build=cogvideox_15, frames_per_token=8, **_COG),
    "cogvideox_1.5_i2v": Form(
        model="CogVideoX 1.5 5B", title="I2V", build=cogvideox_15_i2v, frames_per_token=8, image=True, **_COG
    ),
    "hunyuan": Form(title="T2V", build=hunyuan, **_HUNYUAN),
    "hunyuan_token_replace": Form(title="I2V, token replace", build=hunyuan_token_replace, image=True, **_HUNYUAN),
    "hunyuan_latent_concat": Form(title="I2V, latent concat", build=hunyuan_latent_concat, image=True, **_HUNYUAN),
    "ltx": Form(title="T2V", build=ltx, **_LTX),
    "ltx_i2v": Form(title="I2V", build=lambda: ltx(LTXImageToVideoPipeline), image=True, **_LTX),
    "mochi": Form(model="Mochi", title="T2V", build=mochi, frames_per_token=6, masked_text=True, **_COG),
}


def build(name: str) -> Any:
    """The pipeline of a form."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipeline = FORMS[name].build()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def text_masks(batch: int) -> tuple[Tensor, Tensor]:
    """Which text tokens exist, of prompts and of negative prompts: no two have one length, none is full."""
    lengths = torch.arange(batch) + 9
    places = torch.arange(TEXT_TOKENS)
    return places < lengths[:, None], places < lengths[:, None] - 5


def sample(
    pipeline: Any,
    *,
    height: int,
    width: int,
    num_frames: int,
    steps: int = 3,
    guidance: float = 4.0,
    batch: int = 1,
    dtype: torch.dtype = torch.float32,
    noise_in_padding: bool = False,
    noise_in_text: bool = False,
    **more: Any,
) -> Tensor:
    """The latents of a run of `steps` on random prompts, and a random image where the pipeline takes one.

    `noise_in_padding` and `noise_in_text` change the text tokens that are padding, and those that are not.
    """
    generator = torch.Generator().manual_seed(1)
    text_tokens = 512 if getattr(pipeline, "image_encoder", None) is not None else TEXT_TOKENS
    text = torch.randn(2, batch, text_tokens, TEXT_DIM, generator=generator)
    exists = torch.stack(text_masks(batch))
    if noise_in_padding:
        text[~exists] += 1.0
    if noise_in_text:
        text[exists] += 1.0
    text = text.to(dtype)
    given: dict[str, Any] = {"prompt_embeds": text[0], "negative_prompt_embeds": text[1]}
    family = type(pipeline).__name__
    given["true_cfg_scale" if family.startswith("HunyuanVideo") else "guidance_scale"] = guidance
    if family.startswith(("HunyuanVideo", "LTX", "Mochi")):
        given["prompt_attention_mask"], given["negative_prompt_attention_mask"] = exists
    if family.startswith("HunyuanVideo"):
        pooled = torch.randn(2, batch, 8, generator=generator).to(dtype)
        given["pooled_prompt_embeds"], given["negative_pooled_prompt_embeds"] = pooled
    if family.startswith(("CogVideoX", "Mochi")):
        given["max_sequence_length"] = TEXT_TOKENS
    if family.endswith("ImageToVideoPipeline"):
        images = 1 if family.startswith("Wan") else batch
        given["image"] = torch.rand(images, 3, height, width, generator=generator)
    latents: Tensor = pipeline(
        height=height,
        width=width,
        num_frames=num_frames,
        num_inference_steps=steps,
        generator=generator,
        output_type="latent",
        **given | more,
    ).frames
    return latents
