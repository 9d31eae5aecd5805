"""`psa tune`: which policy and token order spend a density best on prompts of one's own, written as a preset."""

import argparse
import json
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from psa_config import Preset, PyramidSparseAttention, load_presets
from psa_integrations.attention import sparse_attention
from psa_integrations.build import mask_policy, sparse_attention_of, token_order
from psa_integrations.cli.load import load_model
from psa_integrations.cli.models import MODELS, RunDefaults
from psa_integrations.cli.output import print_json, set_up_logging
from psa_integrations.cli.prompts import read_prompts
from psa_integrations.cli.sample import add_sampling_options, check_calls, check_steps, chosen, positive, sample
from psa_integrations.cli.video import SMALLEST_SIDE, psnr_and_ssim
from psa_masks import VideoGrid

_POLICIES: tuple[dict[str, Any], ...] = (
    {"skip": "mean", "importance_reduction": "error"},
    {"skip": "mean", "importance_reduction": "error", "budget_per": "layer"},
    {"skip": "mean", "importance_reduction": "max"},
    {"skip": "drop", "importance_reduction": "mean"},
)
_ORDERS: tuple[dict[str, Any], ...] = (
    {"rearrange_method": "Gilbert"},
    {"rearrange_method": "Cube", "tile_size": (4, 4, 4), "cubes_along": "Gilbert"},
)


@dataclass
class _Reference:
    """A video by dense attention, and what its self-attention saw: pairs of ((query, key, value), output)."""

    prompt: str
    video: np.ndarray
    calls: list[tuple[tuple[Tensor, Tensor, Tensor], Tensor]] = field(default_factory=list)


def add_parser(commands: Any) -> None:
    """Adds the subcommand to what `add_subparsers` returned."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "tune",
        help="find a preset that spends a density well",
        description="Makes a video for each prompt with dense attention, measures what each of a few policies and "
        "token orders gets wrong in its attention at one density, makes videos with the best few, and writes the one "
        "closest to dense as a preset file for `psa generate --presets`.",
    )
    parser.add_argument("--model", choices=("tiny-wan",), default="tiny-wan")
    parser.add_argument("--target-density", type=float, required=True, help="executed over dense work, below 1")
    parser.add_argument("--prompts", type=Path, required=True, metavar="FILE", help="a prompt a line")
    parser.add_argument("--out", type=Path, default=Path("preset.yaml"), metavar="FILE", help="default: preset.yaml")
    parser.add_argument("--videos", type=positive, default=2, help="candidates to make videos with (default 2)")
    parser.add_argument("--weights", type=Path, metavar="FOLDER", help="other weights for the model")
    add_sampling_options(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Measures, compares and writes the preset."""
    set_up_logging(verbose=options.verbose, quiet=options.quiet)
    say = _nothing if options.json else partial(print, flush=True)
    spec = MODELS[options.model]
    base = load_presets().get(spec.presets, "psa_quality")
    attention = sparse_attention_of(base)
    assert attention is not None
    density = options.target_density
    least = 1 / attention.block_size.n
    if not least < density < 1:
        raise ValueError(
            f"--target-density must be above {least:g}, what reading every block as its mean costs, and below 1, "
            f"got {density:g}"
        )
    prompts = read_prompts(options.prompts, "--prompts")
    if options.out.suffix != ".yaml" or not options.out.parent.is_dir() or options.out.is_dir():
        raise ValueError(f"--out must be a .yaml file in a folder that exists, got {options.out}")
    settings = chosen(options, spec.defaults)
    if min(settings.width, settings.height) < SMALLEST_SIDE:
        raise ValueError(f"--width and --height must be at least {SMALLEST_SIDE} to compare videos")
    check_steps(base, settings.steps)

    pipeline = load_model(spec, weights=options.weights, device=options.device, dtype=options.dtype)
    check_calls(pipeline, [base], prompts, options, settings)
    scale = base.video_scale
    grid = VideoGrid(
        frames=(settings.frames - 1) // scale.depth_divisor + 1,
        height=settings.height // scale.height_divisor,
        width=settings.width // scale.width_divisor,
    )
    references = []
    for prompt in prompts:
        say(f"dense: {prompt!r}")
        references.append(_dense(pipeline, prompt, options, settings, grid.seq_len, attention.warmup_steps))

    found: list[tuple[float, float, Preset]] = []
    for candidate in _candidates(base, attention, density):
        error, executed = _attention_error(candidate, grid, references)
        say(f"{_name(candidate)}: attention error {error:.4f}, density {executed:.4f}")
        found.append((error, executed, candidate))
    found.sort(key=lambda entry: entry[0])

    best: tuple[float, str, Preset] | None = None
    for error, executed, candidate in found[: options.videos]:
        psnr = _mean_psnr(pipeline, candidate, references, options, settings)
        say(f"{_name(candidate)}: PSNR {psnr:.2f} dB")
        if best is None or psnr > best[0]:
            text = (
                f"Tuned, prompts: {len(prompts)}, {settings.frames} frames of {settings.width}x{settings.height}, "
                f"{settings.steps} steps: density {executed:.4f}, attention error {error:.4f}, PSNR {psnr:.2f} dB."
            )
            best = psnr, text, candidate
    assert best is not None, "there are candidates, and at least one video is asked for"
    _write(options.out, best[2], best[1])
    if options.json:
        print_json({"out": str(options.out), "policy": _name(best[2]), "description": best[1]})
    say(f"{options.out}: {_name(best[2])}. {best[1]}")


def _nothing(text: str) -> None:
    """In place of a line that a program does not want."""


def _candidates(base: Preset, attention: PyramidSparseAttention, density: float) -> Iterator[Preset]:
    for policy, order in product(_POLICIES, _ORDERS):
        changes = {"mask_mode": "budget", "mask_ratios": None, "density": density, **policy, **order}
        yield base.model_copy(update={"name": "tuned", "attention": attention.model_copy(update=changes)})


def _name(preset: Preset) -> str:
    attention = sparse_attention_of(preset)
    assert attention is not None
    order: str = attention.rearrange_method
    if order == "Cube":
        order += " " + "x".join(map(str, attention.tile_size))
    return f"{order}, skip {attention.skip}, {attention.importance_reduction}, per {attention.budget_per}"


class _SelfAttentions(TorchFunctionMode):
    """Keeps self-attentions over `length` tokens while it is `on`."""

    def __init__(self, length: int) -> None:
        self.calls: list[tuple[tuple[Tensor, Tensor, Tensor], Tensor]] = []
        self.on = False
        self._length = length

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if self.on and func is scaled_dot_product_attention:
            named = dict(zip(("query", "key", "value"), args, strict=False)) | (kwargs or {})
            query, key, value = named["query"], named["key"], named["value"]
            if query.shape[2] == key.shape[2] == self._length:
                self.calls.append(((query.clone(), key.clone(), value.clone()), out.clone()))
        return out


def _dense(
    pipeline: Any, prompt: str, options: argparse.Namespace, settings: RunDefaults, length: int, warmup: int
) -> _Reference:
    """One dense video, with the self-attentions of a step a third and one two thirds into the sparse steps."""
    sparse = settings.steps - warmup
    wanted = {warmup + sparse // 3, warmup + 2 * sparse // 3}
    calls = _SelfAttentions(length)
    calls.on = 0 in wanted

    def after_step(_: Any, step: int, __: Any, values: dict[str, Any]) -> dict[str, Any]:
        calls.on = step + 1 in wanted
        return values

    pipeline.set_progress_bar_config(desc="dense", disable=options.quiet)
    with calls:
        frames = pipeline(
            prompt=prompt,
            negative_prompt=options.negative_prompt,
            width=settings.width,
            height=settings.height,
            num_frames=settings.frames,
            num_inference_steps=settings.steps,
            guidance_scale=settings.guidance,
            generator=torch.Generator().manual_seed(options.seed),
            output_type="np",
            callback_on_step_end=after_step,
        ).frames[0]
    if not calls.calls:
        raise RuntimeError(f"the model attended to no {length} tokens at once, so nothing can be measured")
    return _Reference(prompt, np.asarray(frames), calls.calls)


def _attention_error(preset: Preset, grid: VideoGrid, references: list[_Reference]) -> tuple[float, float]:
    """Error of attention relative to dense, as the geometric mean over the calls, and the executed density."""
    attention = sparse_attention_of(preset)
    assert attention is not None
    policy, order = mask_policy(attention, grid), token_order(attention, grid)
    logs, densities = [], []
    with torch.no_grad():
        for qkv, dense in (call for reference in references for call in reference.calls):
            query, key, value = qkv if order is None else (order.apply(tensor, dim=2) for tensor in qkv)
            out, density = sparse_attention(query, key, value, policy)
            if order is not None:
                out = order.undo(out, dim=2)
            error = (out - dense).float().norm() / dense.float().norm()
            logs.append(math.log(max(float(error), 1e-30)))
            densities.append(float(density.mean()))
    return math.exp(sum(logs) / len(logs)), sum(densities) / len(densities)


def _mean_psnr(
    pipeline: Any, preset: Preset, references: list[_Reference], options: argparse.Namespace, settings: RunDefaults
) -> float:
    total = 0.0
    for reference in references:
        with_prompt = argparse.Namespace(**vars(options) | {"prompt": reference.prompt})
        result = sample(pipeline, preset, with_prompt, settings)
        total += psnr_and_ssim(result.video, reference.video)[0]
    return total / len(references)


def _write(path: Path, preset: Preset, description: str) -> None:
    """Writes a preset file that was read back, under its name only when it is complete."""
    attention = sparse_attention_of(preset)
    assert attention is not None
    described = attention.model_copy(update={"description": description})
    settings = described.model_dump(mode="json", exclude_defaults=True, by_alias=True) | {"type": "psa"}
    lines = [f"{preset.model}:", "  default_attention: tuned", "  attention_configs:", "    tuned:"]
    lines += [f"      {key}: {json.dumps(value)}" for key, value in settings.items()]  # JSON is YAML
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.stem}-") as folder:
        partial = Path(folder) / path.name
        partial.write_text("\n".join(lines) + "\n", encoding="utf-8")
        assert load_presets(partial).get(preset.model, "tuned").attention == described
        partial.replace(path)
