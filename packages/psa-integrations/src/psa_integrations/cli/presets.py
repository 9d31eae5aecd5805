"""`psa presets`: preset files, and what a preset does and costs."""

import argparse
import textwrap
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from psa_config import Preset, load_presets
from psa_config.commands import add_commands
from psa_config.describe import describe
from psa_config.errors import printable
from psa_integrations.build import sparse_attention_of
from psa_integrations.cli.arguments import positive
from psa_integrations.cli.estimate import estimate_density, run_density
from psa_integrations.cli.models import MODELS, presets_name
from psa_integrations.cli.output import counted
from psa_integrations.cli.shapes import SHAPES, grid_of

_SIZE = ("width", "height", "frames")


def add_parser(commands: Any) -> None:
    """Adds the subcommand to what `add_subparsers` returned."""
    parser: argparse.ArgumentParser = commands.add_parser("presets", help="list, explain, check and write presets")
    subcommands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    add_commands(subcommands)
    new = subcommands.choices["new"]
    new.set_defaults(run=partial(run_new, new.get_default("run")))
    show: argparse.ArgumentParser = subcommands.add_parser(
        "show", help="explain a preset in words, with its density and work at a size"
    )
    show.add_argument("model", help="as psa-config names it (Wan2.1_1.3b) or as psa generate does (wan2.1-1.3b)")
    show.add_argument("preset", nargs="?", help="left out: the model's default")
    show.add_argument("--presets", type=Path, metavar="FILE", help="YAML file of presets, instead of the shipped ones")
    for name in (*_SIZE, "steps"):
        show.add_argument(f"--{name}", type=positive, help="default: the model's")
    show.set_defaults(run=run_show)


def run_new(plain: Callable[[argparse.Namespace], int], options: argparse.Namespace) -> int:
    """psa-config's command, which is `plain`, for either name of the model."""
    options.model = presets_name(options.model)
    return plain(options)


def run_show(options: argparse.Namespace) -> int:
    """Prints the explanation."""
    book = load_presets(options.presets)
    model = options.model if options.model in book.models else presets_name(options.model)
    preset = book.get(model, options.preset)
    for line in list(_explanation(preset, options)):  # nothing of it where something is wrong
        print(textwrap.fill(line, 100, subsequent_indent="  ") if line else "")
    return 0


def _explanation(preset: Preset, options: argparse.Namespace) -> Iterator[str]:
    title = printable(f"{preset.model}/{preset.name}")
    description = printable(" ".join(preset.attention.description.split()))
    yield f"{title}: {description}" if description else title
    yield ""
    yield from describe(preset)
    yield ""
    defaults = next((spec.defaults_of(preset.name) for spec in MODELS.values() if spec.presets == preset.model), None)
    steps = options.steps or getattr(defaults, "steps", None)
    width, height, frames = (getattr(options, name) or getattr(defaults, name, None) for name in _SIZE)
    if width is None or height is None or frames is None:
        yield "Density and work at a size: give --width, --height and --frames."
        return
    grid = grid_of(preset, width=width, height=height, frames=frames)
    text = f" and {grid.text} of text" if grid.text else ""
    yield (
        f"At {width}x{height}, {counted(frames, 'frame')}: {counted(grid.seq_len, 'token')} "
        f"({grid.frames} x {grid.height} x {grid.width}{text})."
    )
    shape = SHAPES.get(preset.model)
    work = "" if shape is None else tera(shape.dense_flops(grid.seq_len))
    attention = sparse_attention_of(preset)
    if attention is None:
        yield f"Attention of one forward: {work or 'dense'}."
        return
    estimate = estimate_density(attention, grid)
    if f"{estimate.expected:.3f}" == f"{estimate.most:.3f}":
        yield f"Density of a sparse step: {estimate.expected:.3f}."
    else:
        yield (
            f"Density of a sparse step: about {estimate.expected:.3f} where importance falls with rank as 1/rank, at "
            f"most {estimate.most:.3f} where it is flat{_and_unlike(attention.use_sim_mask)}. A run reports its own."
        )
    if work:
        yield f"Attention of one forward: {work} dense, about {estimate.expected:.3f} of that in a sparse step."
    if steps is not None:
        dense = min(steps, attention.warmup_steps + attention.cooldown_steps)
        layers = None if shape is None else shape.layers
        run = run_density(attention, estimate.expected, steps=steps, layers=layers)
        yield f"Density of {counted(steps, 'step')}, {dense} of them dense: about {run:.3f}."


def tera(flops: float) -> str:
    """Work as a text, in TFLOP."""
    value = flops / 1e12
    return f"{value:,.0f} TFLOP" if value >= 100 else f"{value:.3g} TFLOP"


def _and_unlike(capped: bool) -> str:
    return " and keys are too unlike to be pooled" if capped else ""
