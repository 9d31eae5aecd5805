"""`psa demo`: dense attention, the paper's preset and ours, from one seed, compared."""

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from psa_config import load_presets
from psa_integrations.cli.arguments import text
from psa_integrations.cli.load import load_model
from psa_integrations.cli.models import MODELS, RunDefaults
from psa_integrations.cli.output import counted, print_json, set_up_logging, versions
from psa_integrations.cli.progress import Progress
from psa_integrations.cli.sample import Result, add_sampling_options, check_run, chosen, sample, settings_report
from psa_integrations.cli.video import SMALLEST_SIDE, check_output, psnr_and_ssim, side_by_side, write_video

PRESETS = ("baseline", "psa_balanced", "psa_quality")
# Three videos take under four minutes on one core; larger ones gain more from sparse attention, and take longer.
DEFAULTS = RunDefaults(width=80, height=80, frames=16, steps=16, guidance=3.0, fps=8)
_SCALE = 4
_FILES = tuple(f"{name}.mp4" for name in (*PRESETS, "side_by_side"))


def add_parser(commands: Any) -> None:
    """Adds the subcommand to what `add_subparsers` returned."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "demo",
        help="compare dense and sparse attention on the shipped model",
        description="Generates one video three times from one seed: with dense attention, with the paper's "
        "preset, and with psa_quality, which pools like with like and skips no block. Prints time, density, PSNR and "
        "SSIM against dense, and writes the videos, alone and side by side.",
    )
    parser.add_argument("--prompt", type=text, default="a red circle moving right on a striped background")
    parser.add_argument("--out", type=Path, default=Path("videos"), metavar="FOLDER", help="default: videos")
    parser.add_argument("--weights", type=Path, metavar="FOLDER", help="other weights for the model")
    add_sampling_options(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Generates, compares and writes the videos."""
    set_up_logging(verbose=options.verbose, quiet=options.quiet)
    spec = MODELS["tiny-wan"]
    book = load_presets()
    presets = [book.get(spec.presets, name) for name in PRESETS]
    settings = chosen(options, DEFAULTS)
    if min(settings.width, settings.height) < SMALLEST_SIDE:
        raise ValueError(
            f"--width and --height must be at least {SMALLEST_SIDE} to compare by SSIM, "
            f"got {settings.width} and {settings.height}"
        )
    for preset in presets:
        check_run(preset, settings)
    results = []
    with _folder(options.out):
        for name in _FILES:
            check_output(options.out / name)
        pipeline = load_model(spec, weights=options.weights, device=options.device, dtype=options.dtype)
        with Progress(len(presets) * settings.steps, quiet=options.quiet) as progress:
            for preset in presets:
                result = sample(pipeline, preset, options, settings, progress)
                write_video(result.video, options.out / f"{preset.name}.mp4", settings.fps)
                results.append(result)
    together = side_by_side([result.video for result in results], _SCALE)
    write_video(together, options.out / "side_by_side.mp4", settings.fps)

    closeness = [None, *(psnr_and_ssim(result.video, results[0].video) for result in results[1:])]
    if options.json:
        rows = zip(PRESETS, results, closeness, strict=True)
        videos = [_video_report(options.out, name, result, close) for name, result, close in rows]
        together_at = str(options.out / "side_by_side.mp4")
        settings_of_all = settings_report(options, settings)
        print_json({**settings_of_all, "videos": videos, "side_by_side": together_at, "versions": versions()})
        return
    print(
        f"{options.prompt!r}, seed {options.seed}: {counted(settings.frames, 'frame')} of "
        f"{settings.width}x{settings.height}, {counted(settings.steps, 'step')}"
    )
    print(comparison_table(results, closeness))
    print(f"Videos: {', '.join(_FILES)} in {options.out}/")


@contextmanager
def _folder(out: Path) -> Iterator[None]:
    """Makes the folder, which goes again where it was not there before and nothing came into it."""
    there = out.is_dir()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"--out must be a folder or become one, got {out}: {error.strerror}") from error
    try:
        yield
    finally:
        if not there and not any(out.iterdir()):
            out.rmdir()


def comparison_table(results: list[Result], closeness: Sequence[tuple[float, float] | None]) -> str:
    """A Markdown table of the results; `closeness` is PSNR and SSIM to the dense one, None for itself."""
    lines = [
        "| preset       | seconds | density | PSNR (dB) | SSIM  |",
        "|--------------|---------|---------|-----------|-------|",
    ]
    for name, result, close in zip(PRESETS, results, closeness, strict=True):
        psnr, ssim = ("-", "-") if close is None else (f"{close[0]:.2f}", f"{close[1]:.3f}")
        lines.append(f"| {name:<12} | {result.seconds:7.1f} | {result.density:7.3f} | {psnr:>9} | {ssim:>5} |")
    return "\n".join(lines)


def _video_report(folder: Path, name: str, result: Result, close: tuple[float, float] | None) -> dict[str, object]:
    psnr, ssim = (None, None) if close is None else close
    return {
        "preset": name,
        "out": str(folder / f"{name}.mp4"),
        "seconds": result.seconds,
        "density": result.density,
        "density_per_step": result.density_per_step,
        "psnr": psnr,
        "ssim": ssim,
    }
