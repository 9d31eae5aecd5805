"""A text-to-video pipeline over pixels, in the manner of diffusers' WanPipeline."""

# diffusers ships no type information, so its base classes are Any to the type checker.
# mypy: disallow-subclassing-any=False

import contextlib
import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, WanTransformer3DModel
from diffusers.loaders import WanLoraLoaderMixin
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image

from psa_integrations.tiny_wan.captions import encode_captions
from psa_integrations.tiny_wan.model import PATCH, CaptionEncoder, build_transformer, with_motion

# A shape's path is settled above a noise level of 0.95: a shift of 6 spends a quarter of the steps there.
FLOW_SHIFT = 6.0

StepCallback = Callable[[Any, int, torch.Tensor, dict[str, Any]], dict[str, Any]]


@dataclass
class TinyWanOutput(BaseOutput):
    """`frames`: the videos, in the form that `output_type` named."""

    frames: Any


class TinyWanPipeline(DiffusionPipeline, WanLoraLoaderMixin):
    """Generates small videos of one moving shape.

    The transformer works on pixels in [-1, 1], so there is no VAE. Rectified flow: at noise level s a video x
    is seen as (1 - s) x + s noise, and the transformer predicts noise - x (Liu et al., arXiv 2209.03003).
    """

    model_cpu_offload_seq = "text_encoder->transformer"

    def __init__(
        self,
        transformer: WanTransformer3DModel,
        text_encoder: CaptionEncoder,
        scheduler: FlowMatchEulerDiscreteScheduler,
    ) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, text_encoder=text_encoder, scheduler=scheduler)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        negative_prompt: str | list[str] | None = None,
        num_frames: int = 16,
        height: int = 64,
        width: int = 64,
        num_inference_steps: int = 25,
        guidance_scale: float = 3.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "np",
        callback_on_step_end: StepCallback | None = None,
    ) -> TinyWanOutput:
        """Generates one video a prompt.

        Args:
            prompt: captions as `parse_caption` reads them.
            negative_prompt: what guidance leads away from; None is the empty caption.
            num_frames, height, width: the model was trained on 16 to 24 frames of 64 to 96 pixels a side.
            num_inference_steps: Euler steps.
            guidance_scale: strength of classifier-free guidance; at most 1 turns it off and halves the work.
            generator: source of the initial noise; a list gives each video its own.
            latents: initial noise [B, 3, num_frames, height, width] instead.
            output_type: "np" float32 [B, F, H, W, 3], "pt" [B, F, 3, H, W], both in [0, 1], "pil" a list of
                images a video, "latent" [B, 3, F, H, W] in about [-1, 1].
            callback_on_step_end: called with (pipeline, step, timestep, {"latents": ...}) after each step; it
                returns a dict whose "latents", if any, replace the current ones.

        Raises:
            ValueError: a size that is not a positive multiple of the patch or beyond the rotary table, fewer than one
                step, an unknown word or `output_type`, numbers of prompts that differ.
        """
        guided = guidance_scale > 1
        self.check_inputs(prompt, negative_prompt if guided else None, height, width, num_frames)
        if num_inference_steps < 1:
            raise ValueError(f"num_inference_steps must be at least 1, got {num_inference_steps}")
        if output_type not in ("np", "pt", "pil", "latent"):
            raise ValueError(f"output_type must be 'np', 'pt', 'pil' or 'latent', got {output_type!r}")

        device, dtype = self._execution_device, self.transformer.dtype
        prompts, negatives = _captions(prompt, negative_prompt)
        positive = encode_captions(prompts).to(device)
        negative = encode_captions(negatives).to(device) if guided else None

        shape = (len(prompts), 3, num_frames, height, width)
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        elif latents.shape != shape:
            raise ValueError(f"latents must have shape {shape}, got {tuple(latents.shape)}")
        latents = latents.to(device, torch.float32)

        self.scheduler.set_timesteps(num_inference_steps, device=device)
        self.scheduler.set_begin_index(0)
        with self.progress_bar(total=num_inference_steps) as bar:
            for step, timestep in enumerate(self.scheduler.timesteps):
                where = {
                    "step_index": step,
                    "num_inference_steps": num_inference_steps,
                    "timestep": timestep,
                    "sigma": float(self.scheduler.sigmas[step]),
                }
                seen = latents.to(dtype)
                flow = self._flow("cond", where, seen, timestep, positive)
                if negative is not None:
                    away = self._flow("uncond", where, seen, timestep, negative)
                    flow = away + guidance_scale * (flow - away)
                latents = self.scheduler.step(flow, timestep, latents, return_dict=False)[0]
                if callback_on_step_end is not None:
                    latents = callback_on_step_end(self, step, timestep, {"latents": latents}).pop("latents", latents)
                bar.update()
        self.maybe_free_model_hooks()
        return TinyWanOutput(frames=_to_frames(latents, output_type))

    def check_inputs(
        self,
        prompt: str | list[str],
        negative_prompt: str | list[str] | None,
        height: int,
        width: int,
        num_frames: int = 16,
    ) -> None:
        """Refuses what a call would, without any work.

        Raises:
            TypeError: a prompt is no string.
            ValueError: see `__call__`.
        """
        prompts, negatives = _captions(prompt, negative_prompt)
        if not prompts:
            raise ValueError("prompt must hold at least one caption, got none")
        if len(negatives) != len(prompts):
            raise ValueError(f"negative_prompt must hold one caption a prompt ({len(prompts)}), got {len(negatives)}")
        longest = self.transformer.config.rope_max_seq_len
        for name, value, multiple in (
            ("num_frames", num_frames, 1),
            ("height", height, PATCH),
            ("width", width, PATCH),
        ):
            if value < multiple or value % multiple:
                raise ValueError(f"{name} must be a positive multiple of {multiple}, got {value}")
            if value > longest * multiple:
                raise ValueError(f"{name} must be at most {longest * multiple}, got {value}")
        encode_captions(prompts)
        encode_captions(negatives, "negative_prompt")

    def _flow(
        self,
        name: str,
        where: dict[str, Any],
        video: torch.Tensor,
        timestep: torch.Tensor,
        ids: torch.Tensor,
    ) -> torch.Tensor:
        with _cache_context(self.transformer, name, where):
            flow: torch.Tensor = self.transformer(
                hidden_states=with_motion(video, ids),
                timestep=timestep.expand(len(video)),
                encoder_hidden_states=self.text_encoder(ids).to(video.dtype),
                return_dict=False,
            )[0]
        return flow.float()


def _captions(prompt: str | list[str], negative_prompt: str | list[str] | None) -> tuple[list[str], list[str]]:
    """Prompts and negative prompts as lists; one negative prompt is that of all."""
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    negatives = negative_prompt if isinstance(negative_prompt, list) else [negative_prompt or ""]
    return prompts, negatives * len(prompts) if len(negatives) == 1 else negatives


def _cache_context(transformer: Any, name: str, where: dict[str, Any]) -> AbstractContextManager[None]:
    enter: Callable[..., AbstractContextManager[None]] | None = getattr(transformer, "cache_context", None)
    if enter is None:
        return contextlib.nullcontext()
    # diffusers before 0.41 takes the name alone.
    takes_step = any(p.kind is p.VAR_KEYWORD for p in inspect.signature(enter).parameters.values())
    return enter(name, **where) if takes_step else enter(name)


def _to_frames(latents: torch.Tensor, output_type: str) -> Any:
    if output_type == "latent":
        return latents
    video = (latents.float() / 2 + 0.5).clamp(0, 1)
    if output_type == "pt":
        return video.transpose(1, 2)
    array = video.permute(0, 2, 3, 4, 1).cpu().numpy()
    if output_type == "np":
        return array
    return [[Image.fromarray(frame) for frame in clip] for clip in (array * 255).round().astype(np.uint8)]


def build_random_pipeline(*, seed: int = 0, **overrides: Any) -> TinyWanPipeline:
    """An untrained pipeline; keyword arguments replace fields of the transformer's config.

    The caller's random state is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = build_transformer(**overrides)
        encoder = CaptionEncoder(dim=transformer.config.text_dim)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=FLOW_SHIFT)
    return TinyWanPipeline(transformer.eval(), encoder.eval(), scheduler)


def load_pipeline(
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    folder: str | Path | None = None,
) -> TinyWanPipeline:
    """Loads trained weights: those shipped with the package, or those in `folder`.

    Raises:
        FileNotFoundError: there are no weights at that place.
    """
    with contextlib.ExitStack() as stack:
        root = Path(folder) if folder is not None else stack.enter_context(as_file(files(__package__) / "weights"))
        for part in ("transformer", "text_encoder"):
            if not (root / part / "diffusion_pytorch_model.safetensors").is_file():
                raise FileNotFoundError(f"no tiny-wan weights: {root / part} holds no safetensors file")
        local = {"torch_dtype": dtype, "use_safetensors": True, "local_files_only": True}
        pipeline = TinyWanPipeline(
            WanTransformer3DModel.from_pretrained(root / "transformer", **local).eval(),
            CaptionEncoder.from_pretrained(root / "text_encoder", **local).eval(),
            FlowMatchEulerDiscreteScheduler.from_pretrained(root / "scheduler", local_files_only=True),
        )
    pipeline.to(device)
    return pipeline
