"""What pages of docs/models/ repeat of the code: `python tests/lib/model_pages.py` writes it into them anew."""

import re
from collections.abc import Iterator
from pathlib import Path

from psa_config import Preset, load_presets
from psa_integrations.build import sparse_attention_of
from psa_integrations.cli.estimate import estimate_density, run_density
from psa_integrations.cli.models import MODELS, ModelSpec
from psa_integrations.cli.presets import tera
from psa_integrations.cli.shapes import SHAPES, grid_of

PAGES = Path(__file__).parents[2] / "docs" / "models"
START, END = "<!-- written by tests/lib/model_pages.py -->", "<!-- end -->"
_FOUND = re.compile(f"{re.escape(START)}.*?{re.escape(END)}", re.DOTALL)


def page_of(name: str) -> Path:
    """The page of a model of the command."""
    return PAGES / f"{name}.md"


def with_facts(text: str, spec: ModelSpec) -> str:
    """The text of a page, with its tables as the code has them."""
    parts = _FOUND.split(text)
    if len(parts) != 2:
        raise ValueError(f"a page must have one pair of {START} and {END}, got {len(parts) - 1} in that of {spec.name}")
    return parts[0] + "\n".join([START, "", *_facts(spec), "", *_presets(spec), "", END]) + parts[1]


def _facts(spec: ModelSpec) -> Iterator[str]:
    run, shape = spec.defaults, SHAPES[spec.presets]
    grid = grid_of(load_presets().get(spec.presets), width=run.width, height=run.height, frames=run.frames)
    text = f" and {grid.text} of text" if grid.text else ""
    yield f"| in preset files | `{spec.presets}` |"
    yield "|---|---|"
    yield f"| weights | {spec.hub or 'in the package'} |"
    yield f"| default size | {run.width}x{run.height}, {run.frames} frames, {run.fps} a second |"
    scale = load_presets().get(spec.presets).video_scale
    frames = "1 frame" if scale.depth_divisor == 1 else f"{scale.depth_divisor} frames, of the first frame alone"
    yield f"| a token | {scale.width_divisor} x {scale.height_divisor} pixels of {frames} |"
    yield f"| tokens of the default size | {grid.seq_len:,} ({grid.frames} x {grid.height} x {grid.width}{text}) |"
    yield f"| steps, guidance | {run.steps}, {run.guidance:g} |"
    yield f"| self-attention | {shape.layers} layers, {shape.heads} heads of {shape.head_dim} |"
    yield f"| its work in a dense forward | {tera(shape.dense_flops(grid.seq_len))} |"


def _presets(spec: ModelSpec) -> Iterator[str]:
    book = load_presets()
    default = book.get(spec.presets).name
    head = ("preset", "levels 1, 2, 3, 4 end at", "shares of", "block", "dense steps", "a sparse step", "the run")
    yield f"| {' | '.join(head)} |"
    yield f"|{'---|' * len(head)}"
    for name in book.presets(spec.presets):
        title = f"`{name}`, the default" if name == default else f"`{name}`"
        yield f"| {title} | {' | '.join(_row(book.get(spec.presets, name), spec))} |"


def _row(preset: Preset, spec: ModelSpec) -> tuple[str, ...]:
    attention = sparse_attention_of(preset)
    run = spec.defaults_of(preset.name)
    if attention is None:
        return "all whole", "-", "-", f"{run.steps} of {run.steps}", "1", "1"
    assert attention.mask_ratios is not None, "no shipped preset has a budget"
    bounds = ", ".join(f"{bound:g}" for bound in attention.mask_ratios.bounds)
    rest = "; the rest as means" if attention.skip == "mean" else "; the rest skipped"
    share = "importance" if attention.mask_mode == "thresholdbound" else "blocks"
    if attention.use_sim_mask:
        share += ", where keys are alike"
    grid = grid_of(preset, width=run.width, height=run.height, frames=run.frames)
    estimate = estimate_density(attention, grid)
    expected, most = f"{estimate.expected:.3f}", f"{estimate.most:.3f}"
    dense = min(run.steps, attention.warmup_steps + attention.cooldown_steps)
    whole = run_density(attention, estimate.expected, steps=run.steps, layers=SHAPES[spec.presets].layers)
    return (
        bounds + rest,
        share,
        f"{attention.block_size.m} x {attention.block_size.n}",
        f"{dense} of {run.steps}",
        expected if expected == most else f"about {expected}, at most {most}",
        f"{whole:.3f}" if expected == most else f"about {whole:.3f}",
    )


def main() -> None:
    """Writes the tables of every page."""
    for spec in MODELS.values():
        page = page_of(spec.name)
        page.write_text(with_facts(page.read_text(encoding="utf-8"), spec), encoding="utf-8")


if __name__ == "__main__":
    main()
