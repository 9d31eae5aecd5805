"""`psa generate`: one prompt, one video."""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from psa_config import load_presets
from psa_integrations.cli.load import load_model
from psa_integrations.cli.models import MODELS
from psa_integrations.cli.output import print_json, set_up_logging, versions
from psa_integrations.cli.sample import add_sampling_options, check_steps, chosen, sample, settings_report
from psa_integrations.cli.video import check_output, write_video


def add_parser(commands: Any) -> None:
    """Adds the subcommand to what `add_subparsers` returned."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "generate",
        help="generate a video from a prompt",
        description="Generates a video. Size, frames, steps and guidance default to what suits the model.",
    )
    parser.add_argument("--model", choices=tuple(MODELS), default="tiny-wan")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--preset", help="attention preset of the model (default: the one its presets name)")
    parser.add_argument(
        "--presets", type=Path, metavar="FILE", help="YAML file of presets, instead of the shipped ones"
    )
    parser.add_argument("--out", type=Path, default=Path("video.mp4"), help="the .mp4 to write")
    parser.add_argument("--weights", type=Path, metavar="FOLDER", help="local weights in diffusers' layout")
    parser.add_argument("--lora", type=Path, metavar="PATH", help="a LoRA's .safetensors file or its folder")
    add_sampling_options(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Generates and writes the video."""
    set_up_logging(verbose=options.verbose, quiet=options.quiet)
    spec = MODELS[options.model]
    preset = load_presets(options.presets).get(spec.presets, options.preset)
    check_output(options.out)
    defaults = spec.defaults
    if preset.name in spec.few_steps:
        steps, guidance = spec.few_steps[preset.name]
        defaults = replace(defaults, steps=steps, guidance=guidance)
    settings = chosen(options, defaults)
    check_steps(preset, settings.steps)

    pipeline = load_model(spec, weights=options.weights, lora=options.lora, device=options.device, dtype=options.dtype)
    result = sample(pipeline, preset, options, settings)
    write_video(result.video, options.out, settings.fps)
    frames, height, width = result.video.shape[:3]
    if options.json:
        report = {
            "out": str(options.out),
            "model": spec.name,
            "preset": f"{preset.model}/{preset.name}",
            **settings_report(options, settings),
            "width": width,
            "height": height,
            "frames": frames,
            "seconds": result.seconds,
            "density": result.density,
            "density_per_step": result.density_per_step,
            "device": str(pipeline.device),
            "versions": versions(),
        }
        print_json(report)
        return
    print(
        f"{options.out}: {frames} frames of {width}x{height}, {preset.model}/{preset.name}, "
        f"{result.seconds:.1f} s, density {result.density:.3f}"
    )
