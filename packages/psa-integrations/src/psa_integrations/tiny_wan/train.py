"""Trains the tiny model on clips that are drawn as they are needed.

Run as `python -m psa_integrations.tiny_wan.train --out runs/tiny-wan`. The schedule follows the clock: with
`--minutes` a run stops early and leaves a checkpoint, and `--resume` goes on exactly where that stopped.
"""

import argparse
import contextlib
import copy
import json
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanTransformer3DModel
from safetensors.torch import load_file
from torch.nn.attention import SDPBackend, sdpa_kernel

from psa_integrations.tiny_wan.captions import evaluation_captions
from psa_integrations.tiny_wan.clips import caption_ids, draw_attributes, draw_clips, drop_words
from psa_integrations.tiny_wan.evaluate import judge, totals
from psa_integrations.tiny_wan.model import CaptionEncoder, with_motion
from psa_integrations.tiny_wan.pipeline import FLOW_SHIFT, TinyWanPipeline, build_random_pipeline

Size = tuple[int, int, int]
CHECKPOINT = "checkpoint.pt"


@dataclass(frozen=True)
class Recipe:
    """All figures of a training run. Sizes are (frames, height, width)."""

    transformer: dict[str, Any] = field(default_factory=dict)
    sizes: tuple[Size, ...] = ((16, 64, 64), (24, 64, 64), (16, 96, 96), (24, 96, 96))
    # Small clips settle what a caption means at a third of the price; large ones teach the sizes.
    early_weights: tuple[float, ...] = (0.8, 0.12, 0.08, 0.0)
    late_weights: tuple[float, ...] = (0.35, 0.15, 0.28, 0.22)
    early_share: float = 0.4
    tokens: int = 36 * 4096
    peak_rate: float = 1e-3
    warmup_steps: int = 200
    weight_decay: float = 0.01
    ema_decay: float = 0.999
    drop_caption: float = 0.1
    drop_word: float = 0.06
    log_every: int = 50
    check_seconds: float = 110.0
    check_prompts: int = 16
    check_steps: int = 25

    def batch(self, size: Size) -> int:
        frames, height, width = size
        return max(1, self.tokens // (frames * height * width // 16))


SMOKE = Recipe(
    transformer={"num_attention_heads": 1, "num_layers": 1, "ffn_dim": 64},
    sizes=((4, 16, 16), (4, 24, 24)),
    early_weights=(1.0, 0.0),
    late_weights=(0.5, 0.5),
    tokens=256,
    warmup_steps=2,
    log_every=2,
    check_seconds=2.0,
    check_prompts=2,
    check_steps=2,
)


class Networks(torch.nn.Module):
    """What is trained: the transformer and the caption encoder."""

    def __init__(self, transformer: WanTransformer3DModel, text_encoder: CaptionEncoder) -> None:
        super().__init__()
        self.transformer, self.text_encoder = transformer, text_encoder

    def forward(self, seen: torch.Tensor, sigma: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Predicted flow of noisy clips [B, 3, F, H, W] at noise levels [B] under captions [B, 4]."""
        words = self.text_encoder(ids)
        flow: torch.Tensor = self.transformer(
            hidden_states=with_motion(seen, ids),
            timestep=sigma * 1000,
            encoder_hidden_states=words,
            return_dict=False,
        )[0]
        return flow


class Trainer:
    """The state of a run: networks, their moving average, optimizer, step count and random generators."""

    def __init__(self, recipe: Recipe, device: torch.device, seed: int = 0) -> None:
        self.recipe, self.device = recipe, device
        pipeline = build_random_pipeline(seed=seed, **recipe.transformer).to(device)
        self.networks = Networks(pipeline.transformer, pipeline.text_encoder).train()
        self.average = copy.deepcopy(self.networks).eval().requires_grad_(False)
        self.optimizer = torch.optim.AdamW(
            self.networks.parameters(),
            lr=recipe.peak_rate,
            betas=(0.9, 0.99),
            weight_decay=recipe.weight_decay,
            fused=device.type == "cuda",
        )
        self.draws = torch.Generator(device).manual_seed(seed)
        self.choices = torch.Generator().manual_seed(seed)
        self.steps = 0
        self.seconds = 0.0

    def autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.device.type == "cuda")

    def step(self, progress: float) -> torch.Tensor:
        """One optimizer step at `progress` in [0, 1] of the schedule; returns the loss, on the device."""
        recipe = self.recipe
        weights = recipe.early_weights if progress < recipe.early_share else recipe.late_weights
        choice = int(torch.multinomial(torch.tensor(weights), 1, generator=self.choices))
        # Every size comes once at the start, so that all compilation, and any failure, is over early.
        size = recipe.sizes[self.steps] if self.steps < len(recipe.sizes) else recipe.sizes[choice]
        for group in self.optimizer.param_groups:
            warmup = min(1.0, (self.steps + 1) / recipe.warmup_steps)
            group["lr"] = recipe.peak_rate * warmup * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))

        loss = self.loss(size)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(self.networks.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.steps += 1
        decay = min(recipe.ema_decay, (1 + self.steps) / (10 + self.steps))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.parameters()), list(self.networks.parameters()), weight=1 - decay)
        return loss.detach()

    def loss(self, size: Size) -> torch.Tensor:
        """The loss of one batch of clips of a size; a subclass may have another."""
        batch, draws = self.recipe.batch(size), self.draws
        clean, ids = draw_batch(batch, size, draws)
        ids = drop_words(ids, draws, caption=self.recipe.drop_caption, word=self.recipe.drop_word)
        # Stratified, and shifted as the sampler's own steps are, so that training dwells where sampling does.
        spread = torch.arange(batch, device=self.device) + torch.rand(batch, generator=draws, device=self.device)
        sigma = shifted(spread / batch)
        noise = torch.randn(clean.shape, generator=draws, device=self.device)
        return flow_loss(self.networks, clean, noise, sigma, ids, self.autocast())

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Flow loss of the moving average on fixed clips and noise, low and high noise levels apart."""
        generator = torch.Generator(self.device).manual_seed(1234)
        found: dict[str, float] = {}
        clean, ids = draw_batch(16, self.recipe.sizes[0], generator)
        noise = torch.randn(clean.shape, generator=generator, device=self.device)
        for name, levels in (("low", (0.2, 0.5, 0.8)), ("high", (0.92, 0.96, 0.985))):
            losses = [
                flow_loss(
                    self.average,
                    clean,
                    noise,
                    torch.full((16,), level, device=self.device),
                    ids,
                    self.autocast(),
                )
                for level in levels
            ]
            found[f"val_{name}"] = round(float(torch.stack(losses).mean()), 5)
        return found

    def pipeline(self) -> TinyWanPipeline:
        """A pipeline over the moving average, sharing its weights."""
        scheduler = FlowMatchEulerDiscreteScheduler(shift=FLOW_SHIFT)
        pipeline = TinyWanPipeline(self.average.transformer, self.average.text_encoder, scheduler)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def sample(self) -> dict[str, float]:
        """Shares of generated videos of the first size whose colour and direction are right."""
        frames, height, width = self.recipe.sizes[0]
        captions = evaluation_captions()[: self.recipe.check_prompts]
        steps = self.recipe.check_steps
        with self.autocast():
            samples, _ = judge(
                self.pipeline(), captions, frames=frames, height=height, width=width, steps=steps, batch=16
            )
        colour, direction, both = totals(samples)
        return {"colour": colour, "direction": direction, "both": both}

    def state_dict(self) -> dict[str, Any]:
        return {
            "networks": self.networks.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "draws": self.draws.get_state(),
            "choices": self.choices.get_state(),
            "steps": self.steps,
            "seconds": self.seconds,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.networks.load_state_dict(state["networks"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.draws.set_state(state["draws"].cpu())
        self.choices.set_state(state["choices"].cpu())
        self.steps, self.seconds = state["steps"], state["seconds"]

    def start_from(self, folder: Path) -> None:
        """Takes over weights that `export` wrote; input channels that they lack start at zero."""
        for networks in (self.networks, self.average):
            for name in ("transformer", "text_encoder"):
                found = load_file(folder / name / "diffusion_pytorch_model.safetensors")
                state = getattr(networks, name).state_dict()
                for key, value in found.items():
                    if key == "patch_embedding.weight":
                        state[key].zero_()[:, : value.shape[1]] = value
                    else:
                        state[key].copy_(value)

    def start_from_shipped(self) -> None:
        """Takes over the weights that ship with the package."""
        with as_file(files(__package__) / "weights") as folder:
            self.start_from(folder)

    def export(self, folder: Path) -> None:
        """Writes the moving average in float16, as `load_pipeline(folder=...)` reads it."""
        copied = copy.deepcopy(self.average).half()
        copied.transformer.save_pretrained(folder / "transformer")
        copied.text_encoder.save_pretrained(folder / "text_encoder")
        self.pipeline().scheduler.save_pretrained(folder / "scheduler")


def draw_batch(batch: int, size: Size, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Clips float32 [batch, 3, F, H, W] and their captions' vocabulary indices int64 [batch, 4]."""
    attributes = draw_attributes(batch, generator)
    frames, height, width = size
    clips = draw_clips(attributes, frames=frames, height=height, width=width, generator=generator)
    return clips, caption_ids(attributes)


def shifted(t: torch.Tensor) -> torch.Tensor:
    """Noise levels of uniform times in [0, 1], with the scheduler's shift."""
    return FLOW_SHIFT * t / (1 + (FLOW_SHIFT - 1) * t)


def flow_loss(
    networks: Networks,
    clean: torch.Tensor,
    noise: torch.Tensor,
    sigma: torch.Tensor,
    ids: torch.Tensor,
    autocast: AbstractContextManager[Any],
) -> torch.Tensor:
    """Mean squared error of the predicted flow noise - clean at noise levels sigma [B]."""
    seen = torch.lerp(clean, noise, sigma[:, None, None, None, None])
    with autocast:
        flow = networks(seen, sigma, ids)
    return torch.nn.functional.mse_loss(flow.float(), noise - clean)


def save_checkpoint(trainer: Trainer, path: Path) -> None:
    partial = path.with_suffix(".partial")
    torch.save(trainer.state_dict(), partial)
    os.replace(partial, path)


def train(trainer: Trainer, options: argparse.Namespace, check: Callable[[], dict[str, float]] | None = None) -> None:
    """Steps until this run has lasted its minutes, the whole schedule is over, or `--max-steps` are done.

    Args:
        trainer: goes on from the state that it is in.
        options: what `add_run_options` reads; log, checkpoint and weights come to `--out`.
        check: entries of the log, found now and then and at the end; None validates and judges samples.
    """
    out = options.out
    check = check or (lambda: trainer.validate() | trainer.sample())
    total_seconds, seconds = 60 * options.total_minutes, 60 * options.minutes
    recipe, began, before = trainer.recipe, time.monotonic(), trainer.seconds
    checked, logged, logged_at = began, trainer.steps, began
    with (out / "log.jsonl").open("a") as log:

        def report(**entry: float) -> None:
            line = json.dumps({"step": trainer.steps, "seconds": round(trainer.seconds, 1), **entry})
            print(line, flush=True)
            log.write(line + "\n")
            log.flush()

        loss = torch.zeros(())
        while trainer.steps != options.max_steps:
            now = time.monotonic()
            trainer.seconds = before + now - began
            if now - began >= seconds or trainer.seconds >= total_seconds:
                break
            loss = trainer.step(trainer.seconds / total_seconds)
            if trainer.steps - logged >= recipe.log_every:
                value = loss.item()
                now = time.monotonic()
                report(
                    loss=round(value, 5),
                    steps_a_second=round((trainer.steps - logged) / (now - logged_at), 2),
                )
                if not math.isfinite(value):
                    raise FloatingPointError(f"the loss is {value} at step {trainer.steps}")
                logged, logged_at = trainer.steps, now
            if time.monotonic() - checked > recipe.check_seconds:
                report(**check())
                save_checkpoint(trainer, out / CHECKPOINT)
                checked = time.monotonic()
        report(loss=round(loss.item(), 5), **check())
    save_checkpoint(trainer, out / CHECKPOINT)
    trainer.export(out / "weights")


def add_run_options(parser: argparse.ArgumentParser, *, total_minutes: float) -> None:
    """Adds the options that every kind of training run has."""
    parser.add_argument("--out", type=Path, required=True, help="folder of checkpoint, log and weights")
    parser.add_argument("--total-minutes", type=float, default=total_minutes, help="length of the whole schedule")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop this run after so long")
    parser.add_argument("--max-steps", type=int, help="stop at this step")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--smoke", action="store_true", help="a toy run that only shows that everything works")


def check_out(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Ends the command where `--out` and `--resume` do not fit; else the folder is there."""
    checkpoint = options.out / CHECKPOINT
    if options.resume and not checkpoint.exists():
        parser.error(f"--resume needs the checkpoint of an earlier run, but there is no {checkpoint}")
    if checkpoint.exists() and not options.resume:
        parser.error(f"{checkpoint} exists: pass --resume to go on from it, or another --out")
    options.out.mkdir(parents=True, exist_ok=True)


def load_checkpoint(trainer: Trainer, path: Path) -> None:
    trainer.load_state_dict(torch.load(path, map_location=trainer.device, weights_only=True))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m psa_integrations.tiny_wan.train", description=__doc__)
    add_run_options(parser, total_minutes=17.0)
    parser.add_argument("--weights", type=Path, help="start from the weights in this folder, not from random ones")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--attention", choices=("default", "cudnn"), default="default")
    parser.add_argument("--compile", action="store_true", help="compile the transformer's blocks")
    options = parser.parse_args(argv)
    check_out(parser, options)

    torch.set_float32_matmul_precision("high")
    trainer = Trainer(SMOKE if options.smoke else Recipe(), torch.device(options.device), options.seed)
    if options.weights:
        trainer.start_from(options.weights)
    if options.resume:
        load_checkpoint(trainer, options.out / CHECKPOINT)
    if options.compile:
        trainer.networks.transformer.compile_repeated_blocks(fullgraph=True, dynamic=False)
    kernels: AbstractContextManager[Any] = contextlib.nullcontext()
    if options.attention == "cudnn":
        order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
        kernels = sdpa_kernel(order, set_priority=True)
    with kernels:
        train(trainer, options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
