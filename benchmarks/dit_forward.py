"""One denoising forward of video transformers, sparse against dense: `python benchmarks/dit_forward.py` on a GPU.

Wan2.1 1.3B and 14B (1280x720, 69 frames) and CogVideoX-5B (720x480, 49 frames) at their real sizes, with random weights
in bfloat16. Presets go on by `apply_pyramid_sparse_attention`, and a pipeline's scheduler tells the step, so that token
order, importance, masks and hooks are all in the time. Random weights spread attention almost evenly: quotas keep their
density, thresholds would not, so the presets here have quotas.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import diffusers
import torch
import triton
from diffusers import (
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from gpu_prefill import milliseconds
from torch.nn.attention import SDPBackend, sdpa_kernel

import psa_integrations
from psa_config import MaskRatios, Preset, Samples, load_presets
from psa_integrations import apply_pyramid_sparse_attention

STEPS = 50
PAPER = 327 / 176  # seconds a video, dense and sparse, of Wan2.1-1.3B on an H200 (arXiv 2512.04025)
QUOTAS = {
    "quotas .10/.05/0/.20": (0.10, 0.15, 0.15, 0.35),
    "quotas .10/.05/0/.20, 16 samples a block": (0.10, 0.15, 0.15, 0.35),
    "quotas .09/.05/0/.20, rest as means, 16 samples a block": (0.09, 0.14, 0.14, 0.34),
}


@dataclass(frozen=True, kw_only=True)
class Model:
    """What is run: a transformer's class and configuration, its latents and text, and the preset to start from."""

    transformer: type
    config: dict[str, Any]
    latents: tuple[int, ...]
    text: tuple[int, int]
    preset: str
    repeats: int = 3

    @property
    def is_wan(self) -> bool:
        return self.transformer is WanTransformer3DModel


WAN = {
    "num_attention_heads": 12,
    "attention_head_dim": 128,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 4096,
    "freq_dim": 256,
    "ffn_dim": 8960,
    "num_layers": 30,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
}
COGVIDEOX = {
    "num_attention_heads": 48,
    "attention_head_dim": 64,
    "num_layers": 42,
    "use_rotary_positional_embeddings": True,
}
MODELS = {
    "Wan2.1-1.3B": Model(
        transformer=WanTransformer3DModel,
        config=WAN,
        latents=(1, 16, 18, 90, 160),
        text=(512, 4096),
        preset="Wan2.1_1.3b/psa_balanced",
    ),
    "CogVideoX-5B": Model(
        transformer=CogVideoXTransformer3DModel,
        config=COGVIDEOX,
        latents=(1, 13, 16, 60, 90),
        text=(226, 4096),
        preset="CogVideo_5b/psa_balanced",
    ),
    "Wan2.1-14B": Model(
        transformer=WanTransformer3DModel,
        config=WAN | {"num_attention_heads": 40, "ffn_dim": 13824, "num_layers": 40},
        latents=(1, 16, 18, 90, 160),
        text=(512, 4096),
        preset="Wan2.1_14b/psa_balanced",
        repeats=1,
    ),
}
TINY = {
    "Wan2.1-1.3B": replace(
        MODELS["Wan2.1-1.3B"],
        config=WAN
        | {"num_attention_heads": 2, "attention_head_dim": 24, "num_layers": 2}
        | {"text_dim": 32, "ffn_dim": 64},
        latents=(1, 16, 3, 40, 48),
        text=(16, 32),
    ),
    "CogVideoX-5B": replace(
        MODELS["CogVideoX-5B"],
        config=COGVIDEOX
        | {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2, "text_embed_dim": 32}
        | {"max_text_seq_length": 16, "sample_width": 48, "sample_height": 40, "sample_frames": 9},
        latents=(1, 3, 16, 40, 48),
        text=(16, 32),
    ),
}


def build(model: Model, device: torch.device, dtype: torch.dtype) -> Any:
    """A pipeline of the transformer and its scheduler alone, set up for a run."""
    before = torch.get_default_dtype()
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            transformer = model.transformer(**model.config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)
    keep = tuple(transformer._keep_in_fp32_modules or ())
    for name, parameter in transformer.named_parameters():  # those that diffusers loads in float32
        if any(part in keep for part in name.split(".")):
            parameter.data = parameter.data.float()
    if model.is_wan:
        scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0)
        pipeline = WanPipeline(
            tokenizer=None, text_encoder=None, vae=None, transformer=transformer, scheduler=scheduler
        )
    else:
        pipeline = CogVideoXPipeline(
            tokenizer=None, text_encoder=None, vae=None, transformer=transformer, scheduler=CogVideoXDDIMScheduler()
        )
    pipeline.scheduler.set_timesteps(STEPS, device=device)
    return pipeline


def forward(model: Model, pipeline: Any, device: torch.device, dtype: torch.dtype) -> Callable[[int], torch.Tensor]:
    """One call of the transformer as the pipeline makes it, at a step."""
    generator = torch.Generator(device).manual_seed(1)
    latents = torch.randn(model.latents, generator=generator, device=device).to(dtype)
    text = torch.randn(1, *model.text, generator=generator, device=device).to(dtype)
    more = {}
    if not model.is_wan:
        frames, _, height, width = model.latents[1:]
        more["image_rotary_emb"] = pipeline._prepare_rotary_positional_embeddings(8 * height, 8 * width, frames, device)

    def run(step: int) -> torch.Tensor:
        timestep = pipeline.scheduler.timesteps[step].expand(1)
        out: torch.Tensor = pipeline.transformer(
            hidden_states=latents, timestep=timestep, encoder_hidden_states=text, return_dict=False, **more
        )[0]
        return out

    return run


def presets(model: Model) -> dict[str, Preset]:
    """The model's balanced preset with quotas; warm-up steps are its own, and samples unless named: 32 a block."""
    named, name = model.preset.split("/")
    base = load_presets().get(named, name)
    found = {}
    for label, (one, two, four, eight) in QUOTAS.items():
        ratios = MaskRatios(**{"1": (0.0, one), "2": (one, two), "4": (two, four), "8": (four, eight)})
        changes = {"mask_mode": "topk", "mask_ratios": ratios, "use_sim_mask": False}
        changes["skip"] = "mean" if "means" in label else "drop"
        if "16 samples" in label:
            changes["samples"] = Samples(q=16, kv=16)
        found[label] = base.model_copy(update={"attention": base.attention.model_copy(update=changes)})
    return found


def backends(device: torch.device) -> dict[str, Any]:
    """The dense back-ends of SDPA, each a context to run in."""
    if device.type != "cuda":
        return {"SDPA": nullcontext}
    return {
        "cuDNN": lambda: sdpa_kernel(SDPBackend.CUDNN_ATTENTION),
        "FlashAttention-2": lambda: sdpa_kernel(SDPBackend.FLASH_ATTENTION),
    }


@contextmanager
def built(
    model: Model, device: torch.device, dtype: torch.dtype
) -> Iterator[tuple[Any, Callable[[int], torch.Tensor]]]:
    """The pipeline and its forward; their memory is free again after."""
    pipeline = build(model, device, dtype)
    try:
        yield pipeline, forward(model, pipeline, device, dtype)
    finally:
        pipeline.transformer.to("meta")
        if device.type == "cuda":
            torch.cuda.empty_cache()


def measure(name: str, model: Model, device: torch.device, dtype: torch.dtype) -> list[str]:
    """The table of one model."""
    with built(model, device, dtype) as (pipeline, run):
        parameters = sum(parameter.numel() for parameter in pipeline.transformer.parameters())
        dense = {}
        for backend, context in backends(device).items():
            with context():
                assert run(0).isfinite().all(), f"{name} gives no finite numbers with {backend}"
                dense[backend] = milliseconds(lambda: run(0), device, model.repeats, warm=False)
        best = min(dense.values())
        rows = []
        for backend, time in dense.items():
            rows.append(f"| {backend} | 1.000 | {time:.0f} | {best / time:.2f}x | {best / time:.2f}x |")
        for label, preset in presets(model).items():
            with apply_pyramid_sparse_attention(pipeline, preset) as handle, next(iter(backends(device).values()))():
                warmup = preset.attention.warmup_steps
                assert run(warmup).isfinite().all(), f"{name} gives no finite numbers with {label}"
                handle.reset_stats()
                sparse = milliseconds(lambda first=warmup: run(first), device, model.repeats, warm=False)
                stats = handle.stats()
                assert stats.dense_steps() == [], "the step measured must be sparse"
                handle.reset_stats()
                if model.repeats > 1:
                    run(warmup - 1)
                    assert handle.stats().dense_steps() == [warmup - 1], "the step before it must be dense"
            whole = STEPS * best / (warmup * best + (STEPS - warmup) * sparse)
            rows.append(f"| {label} | {stats.density:.3f} | {sparse:.0f} | {best / sparse:.2f}x | {whole:.2f}x |")
        order = "in the preset's token order" if preset.attention.use_rearrange else "in the model's token order"
    fastest = min(dense, key=dense.__getitem__)
    return [
        f"## {name}: {parameters / 1e9:.2f} B parameters, {token_count(model):,} tokens, batch 1, {str(dtype)[6:]}",
        "",
        f"Sparse rows {order}; {warmup} of {STEPS} steps dense.",
        "",
        f"| self-attention | density | ms a forward | against {fastest} | {STEPS} steps against {fastest} |",
        "|---|---|---|---|---|",
        *rows,
        "",
    ]


def token_count(model: Model) -> int:
    """Tokens of the self-attention: of video, and in CogVideoX of text."""
    frames, height, width = (model.latents[i] for i in ((2, 3, 4) if model.is_wan else (1, 3, 4)))
    return frames * (height // 2) * (width // 2) + (0 if model.is_wan else model.text[0])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=MODELS, action="append", help="one of them, may be repeated")
    parser.add_argument("--tiny", action="store_true", help="small models, on the CPU, to see that it runs")
    parser.add_argument("--out", type=Path, help="also write the tables to this file")
    options = parser.parse_args(arguments)
    if not options.tiny and not torch.cuda.is_available():
        sys.exit("dit_forward needs an NVIDIA GPU, or --tiny")
    models = TINY if options.tiny else MODELS
    device = torch.device("cpu" if options.tiny else "cuda")
    dtype = torch.float32 if options.tiny else torch.bfloat16
    where = "a CPU" if options.tiny else f"{torch.cuda.get_device_name()}, cuDNN {torch.backends.cudnn.version()}"
    lines = [
        "# One denoising forward of video transformers",
        "",
        f"{where}, torch {torch.__version__}, Triton {triton.__version__}, diffusers {diffusers.__version__}, "
        f"psa-integrations {psa_integrations.__version__}. Random weights; medians of a few forwards.",
        "Command: `python benchmarks/dit_forward.py`. All is in the time: token order, importance, masks, hooks.",
        "Density is what was executed. The last column weighs dense and sparse steps as the preset mixes them, without",
        f"text encoder and VAE. The paper has {PAPER:.2f}x for whole videos of Wan2.1-1.3B at density 0.09 on an H200.",
        "",
    ]
    print("\n".join(lines), flush=True)
    with torch.no_grad():
        for name in options.model or models:
            if name not in models:
                parser.error(f"--tiny has no {name}")
            table = measure(name, models[name], device, dtype)
            print("\n".join(table), flush=True)
            lines += table
            if options.out:
                options.out.write_text("\n".join(lines))


if __name__ == "__main__":
    main()
