"""One video from one preset: what the commands that make videos share."""

import argparse
import inspect
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from psa_config import Preset
from psa_integrations.build import check_clusters, sparse_attention_of
from psa_integrations.cli.arguments import finite, frames_per_second, positive, seed, text
from psa_integrations.cli.load import DTYPES
from psa_integrations.cli.models import RunDefaults
from psa_integrations.cli.progress import Progress
from psa_integrations.cli.shapes import grid_of
from psa_integrations.diffusers import apply_pyramid_sparse_attention
from psa_integrations.recording import LevelRecorder
from psa_integrations.stats import AttentionStats

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Result:
    """A video [F, H, W, 3] in [0, 1], the seconds it took, and what its self-attention executed."""

    video: np.ndarray
    seconds: float
    stats: AttentionStats

    @property
    def density(self) -> float:
        """The mean over all calls."""
        return self.stats.density

    @property
    def density_per_step(self) -> list[float]:
        """Of each step, whichever of two transformers made it."""
        names = {entry.transformer for entry in self.stats.layers}
        every = [self.stats.density_per_step(name) for name in names]
        found = {step: value for steps in every for step, value in steps.items() if step is not None}
        return [found[step] for step in sorted(found)]


class StepClock:
    """Times the denoising steps of a run, from the first call of a transformer on; waits for the device each step."""

    def __init__(self) -> None:
        self._times: list[float] = []

    def start(self, *_: Any) -> None:
        """A forward pre-hook of the transformers: the first call of a run starts the clock."""
        if not self._times:
            self._times.append(time.perf_counter())

    def step_ended(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._times.append(time.perf_counter())

    @property
    def seconds(self) -> tuple[float, ...]:
        """Of each step so far."""
        return tuple(end - begin for begin, end in pairwise(self._times))


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """The options that say what to sample and where; those left out are None."""
    parser.add_argument("--seed", type=seed, default=0, help="of the initial noise (default 0)")
    parser.add_argument("--width", type=positive, help="in pixels")
    parser.add_argument("--height", type=positive, help="in pixels")
    parser.add_argument("--frames", type=positive, help="of the video")
    parser.add_argument("--steps", type=positive, help="denoising steps")
    parser.add_argument("--guidance", type=finite, help="scale of classifier-free guidance")
    parser.add_argument("--negative-prompt", type=text, help="what to lead away from")
    parser.add_argument("--fps", type=frames_per_second, help="frames a second of the file")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: a GPU where there is one)")
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="default: bfloat16 on a GPU, float32 on a CPU")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.add_argument("--verbose", action="store_true", help="say on stderr what is being done")
    parser.add_argument("--json", action="store_true", help="print the result as one line of JSON")


def chosen(options: argparse.Namespace, defaults: RunDefaults) -> RunDefaults:
    """The options of `add_sampling_options`, with `defaults` where one was left out."""

    def pick(name: str) -> Any:
        given = getattr(options, name)
        return getattr(defaults, name) if given is None else given

    names = ("width", "height", "frames", "steps", "guidance", "fps")
    return RunDefaults(**{name: pick(name) for name in names})


def check_run(preset: Preset, run: RunDefaults, *, called: str | None = None) -> None:
    """What can be refused of a run before its model is loaded.

    Args:
        preset: of its model.
        run: see `chosen`.
        called: what errors call the preset; None is its model's name and its own.

    Raises:
        ValueError: a side of the videos is no multiple of the pixels of a token of the preset's model; a sparse preset
            would leave none of the steps sparse, or makes more clusters than the videos have tokens.
    """
    grid = grid_of(preset, width=run.width, height=run.height, frames=run.frames)
    sparse = sparse_attention_of(preset)
    if sparse is None:
        return
    called = called or f"{preset.model}/{preset.name}"
    if sparse.warmup_steps + sparse.cooldown_steps >= run.steps:
        raise ValueError(
            f"--steps must be above the dense steps of {called}, warmup_steps "
            f"{sparse.warmup_steps} and cooldown_steps {sparse.cooldown_steps}, got {run.steps}"
        )
    try:
        check_clusters(sparse, grid)
    except ValueError as error:
        raise ValueError(f"{called}: {error}") from error


def check_calls(
    pipeline: Any, presets: Sequence[Preset], prompts: Sequence[str], options: argparse.Namespace, run: RunDefaults
) -> None:
    """Raises, before any video is made, what the pipeline refuses of a prompt or the size, and of a preset.

    Args:
        pipeline: see `sample`; its `check_inputs` says what it takes, as that of every pipeline of diffusers does.
        presets: all that will be sampled.
        prompts: likewise.
        options: those of `add_sampling_options`.
        run: see `sample`.
    """
    for preset in presets:
        apply_pyramid_sparse_attention(pipeline, preset).remove()
    given: dict[str, object] = {
        "negative_prompt": options.negative_prompt if run.guidance > 1 else None,
        "width": run.width,
        "height": run.height,
        "num_frames": run.frames,
    }
    takes = inspect.signature(pipeline.check_inputs).parameters
    for number, prompt in enumerate(prompts, 1):
        given["prompt"] = prompt
        # What it insists on beside these, such as a second prompt, a run does not give either.
        named = {
            name: given.get(name) for name, taken in takes.items() if name in given or taken.default is taken.empty
        }
        try:
            pipeline.check_inputs(**named)
        except ValueError as error:
            if len(prompts) == 1:
                raise
            raise ValueError(f"prompt {number} of {len(prompts)}, {prompt!r}: {error}") from error


def sample(
    pipeline: Any,
    preset: Preset,
    options: argparse.Namespace,
    run: RunDefaults,
    progress: Progress,
    *,
    recorder: LevelRecorder | None = None,
    clock: StepClock | None = None,
) -> Result:
    """Generates one video with the preset's attention; the pipeline is left as it was.

    Args:
        pipeline: of diffusers, or the tiny model's.
        preset: of its model.
        options: those of `add_sampling_options`, and `prompt`.
        run: what they come to, see `chosen`.
        progress: counts the steps.
        recorder: gets the level maps.
        clock: times the steps.

    Raises:
        ValueError: see `check_run`; and what the pipeline refuses.
    """
    check_run(preset, run)
    pipeline.set_progress_bar_config(disable=True)  # ours stands in for it
    with ExitStack() as stack:
        applied = stack.enter_context(apply_pyramid_sparse_attention(pipeline, preset))
        applied.record_levels(recorder)
        counted = progress.run(preset.name, applied)
        if clock is not None:
            for name in ("transformer", "transformer_2"):
                if getattr(pipeline, name, None) is not None:
                    hook = getattr(pipeline, name).register_forward_pre_hook(clock.start)
                    stack.callback(hook.remove)

        def after_step(pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            if clock is not None:
                clock.step_ended()
            return counted(pipeline, step, timestep, tensors)

        began = time.perf_counter()
        video = run_pipeline(pipeline, options.prompt, options, run, after_step)
        seconds = time.perf_counter() - began
        stats = applied.stats()
    _log.info("%s/%s: %.1f s, density %.3f", preset.model, preset.name, seconds, stats.density)
    return Result(video, seconds, stats)


def run_pipeline(
    pipeline: Any, prompt: str, options: argparse.Namespace, run: RunDefaults, after_step: Callable[..., dict[str, Any]]
) -> np.ndarray:
    """One video [F, H, W, 3] in [0, 1]; `after_step` is the pipeline's `callback_on_step_end`.

    Raises:
        ValueError: the model came to values that are no finite numbers.
    """
    frames = pipeline(
        prompt=prompt,
        negative_prompt=options.negative_prompt,
        width=run.width,
        height=run.height,
        num_frames=run.frames,
        num_inference_steps=run.steps,
        guidance_scale=run.guidance,
        generator=torch.Generator().manual_seed(options.seed),
        output_type="np",
        callback_on_step_end=after_step,
    ).frames[0]
    video = np.asarray(frames)
    if not np.isfinite(video).all():
        raise ValueError(
            "the model came to values that are no finite numbers, which make no video; a --guidance nearer to 1 and "
            "--dtype bfloat16 or float32 keep it from them"
        )
    return video


def settings_report(options: argparse.Namespace, run: RunDefaults) -> dict[str, object]:
    """What was asked for, for JSON."""
    return {"prompt": options.prompt, "negative_prompt": options.negative_prompt, "seed": options.seed, **asdict(run)}
