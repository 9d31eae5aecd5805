"""How close sparse attention comes to dense, by policy: `nox -s bench -- quality`. No download, no GPU needed.

Three parts, of which a run does those that `--part` names:

attention  queries, keys and values of the tiny model, caught at a few steps in every layer while it makes videos with
           dense attention; every policy then attends over the same tensors
fields     the same over smooth random fields of several settings
videos     whole videos of the tiny model with each policy, by PSNR and SSIM against the dense video of the same seed

`--json` keeps the numbers; `plot_quality.py` makes the plots and the tables of docs/quality.md from them.
"""

import argparse
import json
import platform
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from quality_capture import Inputs, Size, capture
from quality_fields import FIELDS, make_inputs
from quality_metrics import Case, geometric_mean, spread
from quality_policies import ROWS, Point, Row, chosen, points
from quality_report import attention_tables, field_tables, spread_table, video_tables
from quality_videos import Run, compare, dense_videos, make_pairs

import psa_masks
from psa_integrations.tiny_wan.pipeline import TinyWanPipeline, load_pipeline
from psa_masks import VideoGrid

CAPTURE_STEPS, SEEN_STEPS = 25, (6, 15)
PARTS = ("attention", "fields", "videos")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

Found = dict[str, Any]


class Clock:
    """Whether there is time for another point."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds
        self.left_out: list[str] = []

    def points(self, rows: Iterable[Row]) -> Iterator[Point]:
        """All points of the rows for which time is left when their turn comes; the others' names are kept."""
        for row in rows:
            for point in points(row):
                if time.monotonic() < self._end:
                    yield point
                else:
                    self.left_out.append(f"{row.name} [{point.index}]")


def found_of(point: Point, **values: object) -> Found:
    return {"row": point.row.name, "point": point.index, **values}


def caught_cases(pipeline: TinyWanPipeline, prompts: int, batch: int, size: Size, rows: list[Row]) -> list[Inputs]:
    """Captures of all steps that the rows look at, with the prompts as samples."""
    ages = {row.reuse for row in rows} | {0}
    wanted = {step - age for step in SEEN_STEPS for age in ages}
    pairs = make_pairs(prompts)
    batches = [
        capture(pipeline, pairs[start : start + batch], wanted, size=size, steps=CAPTURE_STEPS)
        for start in range(0, len(pairs), batch)
    ]
    return [
        Inputs(*at, *(torch.cat([getattr(b[at], name) for b in batches]) for name in ("query", "key", "value")))
        for at in sorted(batches[0])
    ]


def measure_rows(
    cases: list[Case], before: dict[tuple[int, int], Inputs], rows: list[Row], clock: Clock
) -> list[Found]:
    """A row's error at each of its points: the geometric mean over the cases, for each sample."""
    found = []
    for point in clock.points(rows):
        reuse = point.row.reuse
        measured = [
            case.measure(point, before[case.inputs.step - reuse, case.inputs.layer] if reuse else None)
            for case in cases
        ]
        values = found_of(
            point,
            density=float(torch.stack([one.density for one in measured]).mean()),
            mass=float(torch.stack([one.mass for one in measured]).mean()),
            errors=geometric_mean([one.error for one in measured]).tolist(),
        )
        found.append(values)
        progress(values)
    return found


def attention_part(options: argparse.Namespace, rows: list[Row], clock: Clock) -> dict[str, Any]:
    """Errors on the tiny model's own queries, keys and values."""
    size = Size(*options.size)
    inputs = caught_cases(pipeline_of(options), options.prompts, options.batch, size, rows)
    cases = [Case(one, size.grid) for one in inputs if one.step in SEEN_STEPS]
    before = {(one.step, one.layer): one for one in inputs}
    spreads = [{"step": c.inputs.step, "layer": c.inputs.layer, **spread(c.inputs.query, c.inputs.key)} for c in cases]
    about = {**machine(options), "tokens": size.grid.seq_len, "prompts": options.prompts}
    about |= {"steps": CAPTURE_STEPS, "seen_steps": SEEN_STEPS, "layers": len({c.inputs.layer for c in cases})}
    return {"about": about, "spread": spreads, "found": measure_rows(cases, before, rows, clock)}


def fields_part(options: argparse.Namespace, rows: list[Row], clock: Clock) -> dict[str, Any]:
    """Errors on smooth random fields, of each setting."""
    grid = VideoGrid(**dict(zip(("frames", "height", "width"), options.grid, strict=True)))
    rows = [row for row in rows if not row.reuse]  # fields have no steps
    settings = []
    for setting in FIELDS:
        made = make_inputs(grid, setting, batch=options.draws)
        tensors = (x.to(options.device, DTYPES[options.dtype]) for x in (made.query, made.key, made.value))
        case = Case(Inputs(0, 0, *tensors), grid)
        progress({"field": str(setting)})
        found = measure_rows([case], {}, rows, clock)
        seen = spread(case.inputs.query, case.inputs.key)
        settings.append({"field": str(setting), "spread": seen, "found": found})
    return {"about": {**machine(options), "grid": options.grid, "draws": options.draws}, "settings": settings}


def videos_part(options: argparse.Namespace, rows: list[Row], clock: Clock) -> dict[str, Any]:
    """PSNR and SSIM of whole videos."""
    run = Run(Size(*options.size), options.steps, options.warmup, options.batch)
    pipeline, pairs = pipeline_of(options), make_pairs(options.pairs)
    dense = dense_videos(pipeline, pairs, run)
    found = []
    for point in clock.points(row for row in rows if row.videos):
        values = found_of(point, **compare(pipeline, point, pairs, dense, run))
        found.append(values)
        progress(values)
    about = {**machine(options), "size": options.size, "pairs": options.pairs, "steps": run.steps, "warmup": run.warmup}
    return {"about": about, "found": found}


def pipeline_of(options: argparse.Namespace) -> TinyWanPipeline:
    pipeline = load_pipeline(options.device, DTYPES[options.dtype])
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def machine(options: argparse.Namespace) -> dict[str, object]:
    on_gpu = torch.device(options.device).type == "cuda"
    return {
        "device": torch.cuda.get_device_name(options.device) if on_gpu else "CPU",
        "dtype": options.dtype,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "psa-masks": psa_masks.__version__,
    }


def progress(values: Found) -> None:
    """A line on stderr: numbers, and the means of lists."""
    words = (
        f"{name} {sum(v) / len(v):.4f}" if isinstance(v, list) else f"{name} {v:.4f}" if isinstance(v, float) else v
        for name, v in values.items()
    )
    print(*words, sep="  ", file=sys.stderr, flush=True)


def rounded(value: Any) -> Any:
    """The same with five significant digits in every float, which keeps the file small."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {name: rounded(one) for name, one in value.items()}
    return [rounded(one) for one in value] if isinstance(value, (list, tuple)) else value


def write(path: Path | None, results: dict[str, Any]) -> None:
    """All so far, under the final name only once it is whole."""
    if path is None:
        return
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(rounded(results)) + "\n")
    partial.replace(path)


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=PARTS, action="append", help="may be repeated; default: attention")
    parser.add_argument(
        "--policies", action="append", metavar="TEXT", help="only policies whose name holds this; may be repeated"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="float32")
    parser.add_argument("--size", type=int, nargs=3, default=[16, 64, 64], metavar=("FRAMES", "HEIGHT", "WIDTH"))
    parser.add_argument("--prompts", type=int, default=2, help="attention: prompts, each with a seed of its own")
    parser.add_argument("--draws", type=int, default=2, help="fields: samples of each setting")
    parser.add_argument("--grid", type=int, nargs=3, default=[16, 16, 16], help="fields: frames, rows, columns")
    parser.add_argument("--pairs", type=int, default=32, help="videos: pairs of prompt and seed")
    parser.add_argument("--steps", type=int, default=20, help="videos: denoising steps")
    parser.add_argument("--warmup", type=int, default=5, help="videos: dense steps at the start")
    parser.add_argument("--batch", type=int, default=1, help="videos made at once; 32 fill a large GPU")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no point after this time")
    parser.add_argument("--threads", type=int, help="of torch on a CPU")
    parser.add_argument("--json", type=Path, help="write the numbers to this file, after each part")
    options = parser.parse_args(given)
    for name in ("prompts", "draws", "pairs", "steps", "batch"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(options, name)}")
    try:
        chosen(options.policies)
    except ValueError as error:
        parser.error(str(error))
    return options


def run(options: argparse.Namespace) -> dict[str, Any]:
    """What was measured, by part."""
    if options.threads:
        torch.set_num_threads(options.threads)
    rows, clock = chosen(options.policies), Clock(options.seconds)
    results: dict[str, Any] = {}
    measure = {"attention": attention_part, "fields": fields_part, "videos": videos_part}
    with torch.no_grad():
        for part in PARTS:
            if part in (options.part or ["attention"]):
                results[part] = measure[part](options, rows, clock)
                write(options.json, results)
    if clock.left_out:
        print(f"no time left for: {', '.join(clock.left_out)}", file=sys.stderr)
    return results


def main() -> None:
    results = run(arguments())
    if "attention" in results:
        print(spread_table(results["attention"]), attention_tables(results["attention"], ROWS), sep="\n\n")
    if "fields" in results:
        print(field_tables(results["fields"], ROWS))
    if "videos" in results:
        print(video_tables(results["videos"], ROWS))


if __name__ == "__main__":
    main()
