"""`psa generate`: a video of each prompt."""

import argparse
from pathlib import Path
from typing import Any

import torch

from psa_config import Preset, load_presets
from psa_config.errors import printable
from psa_integrations.cli.arguments import text
from psa_integrations.cli.load import load_model
from psa_integrations.cli.models import MODELS, RunDefaults, command_name
from psa_integrations.cli.output import counted, print_json, set_up_logging, versions
from psa_integrations.cli.progress import Progress
from psa_integrations.cli.prompts import Share, numbered, read_prompts
from psa_integrations.cli.sample import (
    Result,
    add_sampling_options,
    check_calls,
    check_run,
    chosen,
    sample,
    settings_report,
)
from psa_integrations.cli.video import check_output, write_video


def add_parser(commands: Any) -> None:
    """Adds the subcommand to what `add_subparsers` returned."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "generate",
        help="generate a video from a prompt, or one of each line of a file",
        description="Generates a video. Size, frames, steps and guidance default to what suits the model.",
    )
    parser.add_argument("--model", type=command_name, choices=tuple(MODELS), default="tiny-wan")
    prompts = parser.add_mutually_exclusive_group(required=True)
    prompts.add_argument("--prompt", type=text)
    prompts.add_argument(
        "--prompt-file",
        type=Path,
        metavar="FILE",
        help="a prompt a line; --out fox.mp4 writes fox-0000.mp4, ...; under `accelerate launch` processes share them",
    )
    parser.add_argument("--preset", help="attention preset of the model (default: the one its presets name)")
    parser.add_argument(
        "--presets", type=Path, metavar="FILE", help="YAML file of presets, instead of the shipped ones"
    )
    parser.add_argument("--out", type=Path, default=Path("video.mp4"), help="the .mp4 to write (default: %(default)s)")
    parser.add_argument("--weights", type=Path, metavar="FOLDER", help="local weights in diffusers' layout")
    parser.add_argument("--lora", type=Path, metavar="PATH", help="a LoRA's .safetensors file or its folder")
    add_sampling_options(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Generates and writes the videos."""
    set_up_logging(verbose=options.verbose, quiet=options.quiet)
    spec = MODELS[options.model]
    preset = load_presets(options.presets).get(spec.presets, options.preset)
    check_output(options.out if options.prompt_file is None else numbered(options.out, 0))
    share = Share.of()
    prompts = [options.prompt] if options.prompt_file is None else read_prompts(options.prompt_file)
    settings = chosen(options, spec.defaults_of(preset.name))
    check_run(preset, settings)

    own = share.indices(len(prompts))
    if not own:
        return
    device = options.device
    if device is None and share.size > 1 and torch.cuda.is_available():
        device = f"cuda:{share.local_rank}"
    pipeline = load_model(spec, weights=options.weights, lora=options.lora, device=device, dtype=options.dtype)
    # All of them in each process, so that no other one works on while this one says what is wrong.
    check_calls(pipeline, [preset], prompts, options, settings)
    with Progress(len(own) * settings.steps, quiet=options.quiet) as progress:
        for number, index in enumerate(own):
            out = options.out if options.prompt_file is None else numbered(options.out, index)
            one = argparse.Namespace(**vars(options) | {"prompt": prompts[index]})
            try:
                result = sample(pipeline, preset, one, settings, progress)
                write_video(result.video, out, settings.fps)
            except BaseException as error:  # an interrupt too: it goes on, with a remark
                if number:
                    error.add_note(f"{number} of {len(own)} videos were finished before and are in {out.parent}")
                raise
            with progress.aside():
                _print(out, preset, one, settings, result, device=str(pipeline.device))


def _print(
    out: Path, preset: Preset, options: argparse.Namespace, settings: RunDefaults, result: Result, *, device: str
) -> None:
    """Says what became of one prompt."""
    frames, height, width = result.video.shape[:3]
    if options.json:
        report = {
            "out": str(out),
            "model": options.model,
            "preset": f"{preset.model}/{preset.name}",
            **settings_report(options, settings),
            "width": width,
            "height": height,
            "frames": frames,
            "seconds": result.seconds,
            "density": result.density,
            "density_per_step": result.density_per_step,
            "device": device,
            "versions": versions(),
        }
        print_json(report)
    else:
        print(
            f"{out}: {counted(frames, 'frame')} of {width}x{height}, {preset.model}/{printable(preset.name)}, "
            f"{result.seconds:.1f} s, density {result.density:.3f}",
            flush=True,
        )
