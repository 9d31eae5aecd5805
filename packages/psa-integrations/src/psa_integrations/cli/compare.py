"""`psa compare`: dense attention and any number of presets from one seed, as a page to look at."""

import argparse
import itertools
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from psa_config import DenseAttention, Preset, load_presets
from psa_config.errors import printable
from psa_config.files import check_folder_of, folder_beside
from psa_integrations.__about__ import __version__
from psa_integrations.build import sparse_attention_of
from psa_integrations.cli.arguments import Numbers, text
from psa_integrations.cli.load import load_model
from psa_integrations.cli.models import MODELS, RunDefaults, command_name
from psa_integrations.cli.output import print_json, set_up_logging
from psa_integrations.cli.progress import Progress
from psa_integrations.cli.prompts import read_prompts
from psa_integrations.cli.sample import StepClock, add_sampling_options, check_calls, check_run, chosen, sample
from psa_integrations.cli.video import SMALLEST_SIDE, write_video
from psa_integrations.recording import LevelRecorder
from psa_integrations.report import ReportRun, ReportWriter

DENSE = "dense"
_MAP_BYTES = 64 << 20
_LONGEST_NAME = 64  # of a preset, in the name of a file
_DEFAULT_MAPS = {"layers": 3, "steps": 2, "heads": 2}


def add_parser(commands: Any) -> None:
    """Adds the subcommand to what `add_subparsers` returned."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "compare",
        help="compare dense attention with presets, as a page with videos, curves and level maps",
        description="Generates each prompt's video with dense attention and with every preset, from one seed and "
        "with the same settings, and writes a folder: the videos, metrics.json, and report.html, which opens from "
        "disk and needs nothing else.",
    )
    parser.add_argument("--model", type=command_name, choices=tuple(MODELS), default="tiny-wan")
    parser.add_argument("--prompt", type=text, action="append", default=[], help="may be given more than once")
    parser.add_argument("--prompt-file", type=Path, metavar="FILE", help="UTF-8 text, a prompt a line")
    parser.add_argument(
        "--preset",
        action="append",
        default=[],
        help="sparse preset of the model; may be given more than once (default: the one its presets name)",
    )
    parser.add_argument(
        "--presets", type=Path, metavar="FILE", help="YAML file of presets, instead of the shipped ones"
    )
    parser.add_argument("--out", type=Path, default=Path("compare"), metavar="FOLDER", help="default: compare")
    parser.add_argument("--weights", type=Path, metavar="FOLDER", help="local weights in diffusers' layout")
    parser.add_argument("--lora", type=Path, metavar="PATH", help="a LoRA's .safetensors file or its folder")
    for name, count in _DEFAULT_MAPS.items():
        parser.add_argument(
            f"--map-{name}",
            action=Numbers,
            least=0,
            metavar="N",
            help=f"{name} whose level maps to keep, from 0 (default: {count}, from the first to the last)",
        )
    add_sampling_options(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Generates and compares the videos and writes the folder."""
    set_up_logging(verbose=options.verbose, quiet=options.quiet)
    spec = MODELS[options.model]
    book = load_presets(options.presets)
    sparse = [book.get(spec.presets, name) for name in options.preset or [None]]
    prompts = [*options.prompt, *(read_prompts(options.prompt_file) if options.prompt_file else ())]
    settings = chosen(options, spec.defaults)
    _check(prompts, sparse, settings)

    with _folder(options.out) as folder:
        pipeline = load_model(
            spec, weights=options.weights, lora=options.lora, device=options.device, dtype=options.dtype
        )
        check_calls(pipeline, sparse, prompts, options, settings)
        maps = _maps_to_keep(options, pipeline, sparse, settings.steps)
        dense = sparse[0].model_copy(
            update={"name": DENSE, "attention": DenseAttention(type="dense", description="Full attention.")}
        )
        presets = [dense, *sparse]
        about = {
            "program": f"psa-integrations {__version__}",
            "model": spec.name,
            "seed": options.seed,
            **{name: getattr(settings, name) for name in ("width", "height", "frames", "steps", "guidance", "fps")},
            "negative_prompt": options.negative_prompt,
            "device": str(pipeline.device),
            "dtype": str(pipeline.transformer.dtype).removeprefix("torch."),
            "maps": {name: list(kept) for name, kept in maps.items()},
        }
        writer = ReportWriter(about, num_videos=len(prompts) * len(presets))
        try:
            with Progress(len(prompts) * len(presets) * settings.steps, quiet=options.quiet) as progress:
                _make_videos(pipeline, prompts, presets, maps, options, settings, progress, writer, folder)
            writer.write(folder)
        except BaseException as error:  # an interrupt too: it goes on, with a remark
            kept = _keep_finished(writer, folder, options.out)
            if kept is not None:
                error.add_note(f"what was finished before is in {kept}")
            raise
    if options.json:
        print_json({"out": str(options.out), **json.loads((options.out / "metrics.json").read_text())})
        return
    print(f"{options.out / 'report.html'}: open it in a browser; the numbers are in {options.out / 'metrics.json'}")


def _make_videos(
    pipeline: Any,
    prompts: Sequence[str],
    presets: Sequence[Preset],
    maps: Mapping[str, tuple[int, ...]],
    options: argparse.Namespace,
    settings: RunDefaults,
    progress: Progress,
    writer: ReportWriter,
    folder: Path,
) -> None:
    """Makes each prompt's video with every preset, dense first, for `folder` and `writer`."""
    for number, prompt in enumerate(prompts, 1):
        writer.start_prompt(prompt)
        if not options.json:
            with progress.aside():
                print(f"{prompt!r}, seed {options.seed}", flush=True)
        for place, preset in enumerate(presets):
            recorder, clock = LevelRecorder(**maps, max_bytes=_MAP_BYTES), StepClock()
            told = argparse.Namespace(**vars(options) | {"prompt": prompt})
            result = sample(pipeline, preset, told, settings, progress, recorder=recorder, clock=clock)
            name = f"{number}-{place}-{re.sub(r'[^A-Za-z0-9._-]', '_', preset.name)[:_LONGEST_NAME]}.mp4"
            write_video(result.video, folder / name, settings.fps)
            entry = writer.add(
                ReportRun(
                    name=preset.name,
                    description=preset.attention.description,
                    file=name,
                    video=result.video,
                    seconds=result.seconds,
                    step_seconds=clock.seconds,
                    stats=result.stats,
                    maps=recorder.maps(),
                    maps_left_out=recorder.left_out,
                )
            )
            if not options.json:
                with progress.aside():
                    print(f"  {_line(entry)}", flush=True)


def _line(entry: Any) -> str:
    line = f"{printable(entry['name'])}: {entry['seconds']:.1f} s, density {entry['density']:.3f}"
    if entry["dense"]:
        return line
    psnr = "equal to dense" if entry["psnr"] is None else f"PSNR {entry['psnr']:.2f} dB"
    return f"{line}, {psnr}, SSIM {entry['ssim']:.3f}"


def _check(prompts: Sequence[str], presets: Sequence[Preset], settings: RunDefaults) -> None:
    """What can be refused before the model is loaded."""
    if not prompts:
        raise ValueError("--prompt or --prompt-file must be given, got neither")
    names = [preset.name for preset in presets]
    if len(set(names)) < len(names):
        raise ValueError(f"--preset must be given once for each preset, got {', '.join(names)}")
    for preset in presets:
        if sparse_attention_of(preset) is None:
            raise ValueError(f"--preset must be a sparse one, as dense attention always runs; got {preset.name}")
        check_run(preset, settings)
    if min(settings.width, settings.height) < SMALLEST_SIDE:
        raise ValueError(
            f"--width and --height must be at least {SMALLEST_SIDE} to compare by SSIM, "
            f"got {settings.width} and {settings.height}"
        )


@contextmanager
def _folder(out: Path) -> Iterator[Path]:
    """A new folder that gets the name `out` when all went well; else it is gone, unless it got another name before.

    Where `out` is an empty folder, that stays and gets the files of the new one.
    """
    check_folder_of(out, "--out")
    there = os.path.lexists(out)
    if there and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"--out must be a new or an empty folder, and {out} is neither")
    if there:
        check_folder_of(out / "report", "--out")
    with folder_beside(out / "report" if there else out) as staging:
        # One folder further in: a temporary folder is closed to other users.
        partial = staging / "report"
        partial.mkdir()
        yield partial
        if there:
            # What shows the others last.
            for path in sorted(partial.iterdir(), key=lambda path: path.suffix == ".html"):
                path.replace(out / path.name)
            return
        try:
            partial.replace(out)
        except OSError as error:  # it was not there before all this work
            place = partial.replace(_free_name(out))
            raise FileExistsError(f"--out {out} was made by another meanwhile; the report is in {place}") from error


def _keep_finished(writer: ReportWriter, folder: Path, out: Path) -> Path | None:
    """Gives a run that was cut short the name `out` with `-unfinished` behind, or `-unfinished-2` and so on.

    Returns:
        The folder, with the report of what can be compared and no other file; None where nothing can.
    """
    videos = writer.finish_early()
    if not videos:
        return None
    for path in folder.iterdir():
        if path.name not in videos:
            path.unlink()
    writer.write(folder)
    return folder.replace(_free_name(out, "-unfinished"))


def _free_name(out: Path, ending: str = "") -> Path:
    """`out` with `ending` behind, and a number too where that is taken."""
    out = out.absolute()  # so that it has a name where it is "."
    names = itertools.chain([ending], (f"{ending}-{number}" for number in itertools.count(2)))
    return next(place for name in names if not os.path.lexists(place := out.with_name(out.name + name)))


def _maps_to_keep(
    options: argparse.Namespace, pipeline: Any, presets: Sequence[Preset], steps: int
) -> dict[str, tuple[int, ...]]:
    """Layers, steps and heads whose level maps are kept: those asked for, or a few from the first to the last."""
    config = pipeline.transformer.config
    settings = [found for preset in presets if (found := sparse_attention_of(preset)) is not None]
    first = max(found.warmup_steps for found in settings)
    stop = steps - max(found.cooldown_steps for found in settings)
    dense_layers = {layer for found in settings for layer in found.dense_layers}
    there = {"layers": config.num_layers, "steps": steps, "heads": config.num_attention_heads}
    sparse = {
        "layers": [layer for layer in range(config.num_layers) if layer not in dense_layers],
        "steps": list(range(first, stop)),
        "heads": list(range(config.num_attention_heads)),
    }
    kept = {}
    for name, count in _DEFAULT_MAPS.items():
        asked = getattr(options, f"map_{name}")
        if asked is not None and asked[-1] >= there[name]:
            raise ValueError(f"--map-{name} must be below {there[name]}, the number of {name}, got {asked[-1]}")
        kept[name] = asked or _spread(sparse[name] or list(range(there[name])), count)
    return kept


def _spread(numbers: Sequence[int], count: int) -> tuple[int, ...]:
    """`count` of the numbers, evenly from the first to the last; all where there are no more."""
    if len(numbers) <= count:
        return tuple(numbers)
    return tuple(numbers[round(i * (len(numbers) - 1) / (count - 1))] for i in range(count))
