"""`psa tune`: which policy and token order spend a density best on prompts of one's own, written as a preset."""

import argparse
import json
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from psa_config import MaskRatios, Preset, PyramidSparseAttention, load_presets
from psa_config.files import check_new_file, write_new
from psa_integrations.attention import sparse_attention
from psa_integrations.build import content_orders, mask_policy, sparse_attention_of, token_order
from psa_integrations.cli.arguments import finite, positive
from psa_integrations.cli.estimate import estimate_density
from psa_integrations.cli.load import load_model
from psa_integrations.cli.models import MODELS, RunDefaults, command_name
from psa_integrations.cli.output import counted, print_json, set_up_logging, versions
from psa_integrations.cli.progress import Progress
from psa_integrations.cli.prompts import read_prompts
from psa_integrations.cli.sample import (
    add_sampling_options,
    check_calls,
    check_run,
    chosen,
    run_pipeline,
    sample,
)
from psa_integrations.cli.shapes import grid_of
from psa_integrations.cli.video import SMALLEST_SIDE, psnr_and_ssim
from psa_masks import AttentionOrder, MaskPolicy, VideoGrid

# Whose self-attention reads the tokens of the video alone, in one transformer.
_MODELS = ("tiny-wan", "wan2.1-1.3b", "wan2.1-14b", "wan2.2-5b")
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
class _Candidate:
    """A preset, and how it fared in the self-attentions of dense videos."""

    preset: Preset
    policy: MaskPolicy
    order: Callable[[Tensor, Tensor], AttentionOrder]
    logs: list[float] = field(default_factory=list)
    densities: list[float] = field(default_factory=list)
    psnr: float | None = None
    """Of its videos beside the dense ones, the mean; None where none was made."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, dense: Tensor) -> None:
        """One self-attention ``[B, H, L, D]`` more, beside what dense attention gave."""
        out, density = sparse_attention(query, key, value, self.policy, order=self.order)
        error = (out - dense).float().norm() / dense.float().norm()
        self.logs.append(math.log(max(float(error), 1e-30)))
        self.densities.append(float(density.mean()))

    @property
    def error(self) -> float:
        """Of attention relative to dense, the geometric mean."""
        return math.exp(sum(self.logs) / len(self.logs))

    @property
    def density(self) -> float:
        """Executed, the mean."""
        return sum(self.densities) / len(self.densities)

    def report(self) -> dict[str, object]:
        """For JSON; a PSNR is there where videos were made."""
        figures = {"policy": _name(self.preset), "density": self.density, "attention_error": self.error}
        return figures if self.psnr is None else figures | {"psnr": self.psnr}


def add_parser(commands: Any) -> None:
    """Adds the subcommand to what `add_subparsers` returned."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "tune",
        help="find a preset that spends a density well",
        description="Makes a video for each prompt with dense attention, measures what each of a few policies and "
        "token orders gets wrong in its attention at one density, makes videos with the best few, and writes the one "
        "closest to dense as a preset file for `psa generate --presets`.",
    )
    parser.add_argument("--model", type=command_name, choices=_MODELS, default="tiny-wan")
    parser.add_argument("--target-density", type=finite, required=True, help="executed over dense work, below 1")
    parser.add_argument("--prompts", type=Path, required=True, metavar="FILE", help="a prompt a line")
    parser.add_argument("--out", type=Path, default=Path("preset.yaml"), metavar="FILE", help="default: preset.yaml")
    parser.add_argument("--videos", type=positive, default=2, help="candidates to make videos with (default 2)")
    parser.add_argument("--weights", type=Path, metavar="FOLDER", help="other weights for the model")
    add_sampling_options(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Measures, compares and writes the preset."""
    set_up_logging(verbose=options.verbose, quiet=options.quiet)
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
    if options.out.suffix != ".yaml":
        raise ValueError(f"--out must end in .yaml, got {options.out}")
    check_new_file(options.out, "--out")
    settings = chosen(options, spec.defaults)
    if min(settings.width, settings.height) < SMALLEST_SIDE:
        raise ValueError(f"--width and --height must be at least {SMALLEST_SIDE} to compare videos")
    check_run(base, settings, called="the presets that are tried")

    pipeline = load_model(spec, weights=options.weights, device=options.device, dtype=options.dtype)
    check_calls(pipeline, [base], prompts, options, settings)
    grid = grid_of(base, width=settings.width, height=settings.height, frames=settings.frames)
    candidates = list(_candidates(base, attention, density, grid))
    tries = min(options.videos, len(candidates))
    with Progress(len(prompts) * (1 + tries) * settings.steps, quiet=options.quiet) as progress:

        def say(text: str) -> None:
            if not options.json:
                with progress.aside():
                    print(text, flush=True)

        videos = []
        for prompt in prompts:
            say(f"dense: {prompt!r}")
            dense = _dense(
                pipeline, prompt, options, settings, progress, grid.seq_len, attention.warmup_steps, candidates
            )
            videos.append(dense)
        for candidate in candidates:
            say(f"{_name(candidate.preset)}: attention error {candidate.error:.4f}, density {candidate.density:.4f}")
        candidates.sort(key=lambda candidate: candidate.error)

        tried = candidates[:tries]
        for candidate in tried:
            candidate.psnr = _mean_psnr(pipeline, candidate.preset, prompts, videos, options, settings, progress)
            say(f"{_name(candidate.preset)}: PSNR {candidate.psnr:.2f} dB")
    best = max(tried, key=lambda candidate: candidate.psnr or 0.0)
    text = (
        f"Tuned, prompts: {len(prompts)}, {counted(settings.frames, 'frame')} of {settings.width}x{settings.height}, "
        f"{counted(settings.steps, 'step')}: density {best.density:.4f}, attention error {best.error:.4f}, "
        f"PSNR {best.psnr:.2f} dB."
    )
    _write(options.out, best.preset, text)
    if not options.json:
        print(f"{options.out}: {_name(best.preset)}. {text}")
    else:
        report = {
            "out": str(options.out),
            "model": spec.name,
            "preset": f"{best.preset.model}/{best.preset.name}",
            **best.report(),
            "description": text,
            "target_density": density,
            "prompts": prompts,
            "negative_prompt": options.negative_prompt,
            "seed": options.seed,
            **asdict(settings),
            "candidates": [candidate.report() for candidate in candidates],
            "device": str(pipeline.device),
            "versions": versions(),
        }
        print_json(report)


def _candidates(
    base: Preset, attention: PyramidSparseAttention, density: float, grid: VideoGrid
) -> Iterator[_Candidate]:
    by_budget = {"mask_mode": "budget", "mask_ratios": None, "density": density}
    choices: list[dict[str, Any]] = [{**by_budget, **policy, **order} for policy, order in product(_POLICIES, _ORDERS)]
    choices.append({"mask_ratios": _scaled_quotas(attention, density, grid)})
    for changes in choices:
        changed = attention.model_copy(update=changes)
        preset = base.model_copy(update={"name": "tuned", "attention": changed})
        yield _Candidate(preset, mask_policy(changed, grid), _orders(changed, grid))


def _scaled_quotas(attention: PyramidSparseAttention, density: float, grid: VideoGrid) -> MaskRatios:
    """The quotas of `attention` times what makes the most of `density`, or the least that there is if that is more."""
    assert attention.mask_ratios is not None
    bounds = attention.mask_ratios.bounds

    def times(factor: float) -> MaskRatios:
        ends = [0.0, *(round(min(1.0, factor * bound), 4) for bound in bounds)]
        return MaskRatios(**dict(zip("1248", pairwise(ends), strict=True)))

    low, high = 2**-10, 1 / bounds[0]  # from next to nothing to every block whole
    for _ in range(20):
        middle = (low + high) / 2
        scaled = attention.model_copy(update={"mask_ratios": times(middle)})
        if estimate_density(scaled, grid).expected <= density:
            low = middle
        else:
            high = middle
    return times(low)


def _orders(attention: PyramidSparseAttention, grid: VideoGrid) -> Callable[[Tensor, Tensor], AttentionOrder]:
    order = token_order(attention, grid)
    contents = content_orders(attention, grid, base=order)
    if contents is not None:
        return partial(contents, step=None)
    of_all = AttentionOrder(query=order, key=order)
    return lambda query, key: of_all


def _name(preset: Preset) -> str:
    attention = sparse_attention_of(preset)
    assert attention is not None
    order: str = attention.rearrange_method
    if order == "Cube":
        order += " " + "x".join(map(str, attention.tile_size))
    if attention.mask_ratios is None:
        shares = f"per {attention.budget_per}"
    else:
        shares = "quotas " + " ".join(f"{bound:g}" for bound in attention.mask_ratios.bounds)
    return f"{order}, skip {attention.skip}, {attention.importance_reduction}, {shares}"


class _Measure(TorchFunctionMode):
    """Gives the candidates each self-attention over `length` tokens while it is `on`; nothing is kept of it."""

    def __init__(self, length: int, candidates: Sequence[_Candidate]) -> None:
        self.on = False
        self.calls = 0
        self._length = length
        self._candidates = candidates

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if self.on and func is scaled_dot_product_attention:
            named = dict(zip(("query", "key", "value"), args, strict=False)) | (kwargs or {})
            query, key, value = named["query"], named["key"], named["value"]
            if query.shape[2] == key.shape[2] == self._length:
                self.calls += 1
                with torch.no_grad():
                    for candidate in self._candidates:
                        candidate.attend(query, key, value, out)
        return out


def _dense(
    pipeline: Any,
    prompt: str,
    options: argparse.Namespace,
    settings: RunDefaults,
    progress: Progress,
    length: int,
    warmup: int,
    candidates: Sequence[_Candidate],
) -> np.ndarray:
    """One dense video. The candidates get the self-attentions of a step a third and one two thirds into the sparse
    steps."""
    sparse = settings.steps - warmup
    wanted = {warmup + sparse // 3, warmup + 2 * sparse // 3}
    measure = _Measure(length, candidates)
    measure.on = 0 in wanted

    counted_step = progress.run("dense", None)

    def after_step(pipeline: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        measure.on = step + 1 in wanted
        return counted_step(pipeline, step, timestep, values)

    pipeline.set_progress_bar_config(disable=True)  # ours stands in for it
    with measure:
        video = run_pipeline(pipeline, prompt, options, settings, after_step)
    if not measure.calls:
        raise RuntimeError(f"the model attended to no {counted(length, 'token')} at once, so nothing can be measured")
    return video


def _mean_psnr(
    pipeline: Any,
    preset: Preset,
    prompts: Sequence[str],
    videos: Sequence[np.ndarray],
    options: argparse.Namespace,
    settings: RunDefaults,
    progress: Progress,
) -> float:
    total = 0.0
    for prompt, video in zip(prompts, videos, strict=True):
        told = argparse.Namespace(**vars(options) | {"prompt": prompt})
        result = sample(pipeline, preset, told, settings, progress)
        total += psnr_and_ssim(result.video, video)[0]
    return total / len(prompts)


def _write(path: Path, preset: Preset, description: str) -> None:
    """Makes the preset file, of a text that was read back."""
    attention = sparse_attention_of(preset)
    assert attention is not None
    described = attention.model_copy(update={"description": description})
    settings = described.model_dump(mode="json", exclude_defaults=True, by_alias=True) | {"type": "psa"}
    lines = [f"{preset.model}:", "  default_attention: tuned", "  attention_configs:", "    tuned:"]
    lines += [f"      {key}: {json.dumps(value)}" for key, value in settings.items()]  # JSON is YAML
    text = "\n".join(lines) + "\n"
    with tempfile.TemporaryDirectory() as folder:
        read = Path(folder) / path.name
        read.write_text(text, encoding="utf-8")
        assert load_presets(read).get(preset.model, "tuned").attention == described
    write_new(text, path, "--out")
