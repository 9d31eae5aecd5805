"""How close sparse attention comes to dense, by policy: `nox -s bench -- quality`. No download, no GPU needed.

Four parts, of which a run does those that `--part` names:

attention  queries, keys and values of the tiny model, caught at a few steps in every layer while it makes videos with
           dense attention; every policy then attends over the same tensors
fields     the same over smooth random fields of several settings
videos     whole videos of the tiny model with each policy, by PSNR and SSIM against the dense video of the same seed
limits     the same for a few policies while the circumstances of a video change: schedule, dense steps, order, blocks

`--json` adds the numbers to a file, in place of those of the same rows; with `--only-new` a run does no point that the
file has. `plot_quality.py` makes the plots and the tables of docs/quality.md from it.
"""

import argparse
import platform
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from options import whole
from quality_capture import Inputs, Size, capture
from quality_fields import FIELDS, make_inputs
from quality_metrics import Case, geometric_mean, spread
from quality_policies import ROWS, Point, Row, chosen, points
from quality_report import parts_of_page
from quality_store import Found, Key, Part, add, commit_here, measured, read
from quality_videos import CIRCUMSTANCES, Run, compare, dense_videos, make_pairs

import psa_masks
from psa_integrations.tiny_wan.pipeline import TinyWanPipeline, load_pipeline
from psa_masks import VideoGrid

CAPTURE_STEPS, SEEN_STEPS = 25, (6, 15)
PARTS = ("attention", "fields", "videos", "limits")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Clock:
    """Which points are to be measured: those that nobody has, for as long as there is time."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds
        self.left_out: list[str] = []

    def points(self, rows: Iterable[Row], known: frozenset[Key] = frozenset(), where: str = "") -> Iterator[Point]:
        """The rows' points that ``known`` lacks, for which time is left when their turn comes; the others' names are
        kept."""
        for row in rows:
            for point in points(row):
                if (where, row.name, point.index) in known:
                    continue
                if time.monotonic() < self._end:
                    yield point
                else:
                    self.left_out.append(f"{where} {row.name} [{point.index}]".strip())


def unmeasured(rows: Iterable[Row], known: frozenset[Key], where: str = "") -> list[Row]:
    """The rows with a point that ``known`` lacks."""
    return [row for row in rows if any((where, row.name, point.index) not in known for point in points(row))]


def found_of(point: Point, **values: object) -> Found:
    return {"row": point.row.name, "point": point.index, "run": 0, **values}


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
    cases: list[Case], before: dict[tuple[int, int], Inputs], rows: list[Row], known: frozenset[Key], clock: Clock
) -> list[Found]:
    """A row's error at each of its points: the geometric mean over the cases, for each sample."""
    found = []
    for point in clock.points(rows, known):
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


def attention_part(options: argparse.Namespace, rows: list[Row], known: frozenset[Key], clock: Clock) -> Part:
    """Errors on the tiny model's own queries, keys and values."""
    size = Size(*options.size)
    inputs = caught_cases(pipeline_of(options), options.prompts, options.batch, size, unmeasured(rows, known))
    cases = [Case(one, size.grid) for one in inputs if one.step in SEEN_STEPS]
    before = {(one.step, one.layer): one for one in inputs}
    spreads = [{"step": c.inputs.step, "layer": c.inputs.layer, **spread(c.inputs.query, c.inputs.key)} for c in cases]
    about = {"tokens": size.grid.seq_len, "prompts": options.prompts, "steps": CAPTURE_STEPS}
    about |= {"seen_steps": SEEN_STEPS, "layers": len({c.inputs.layer for c in cases})}
    found = measure_rows(cases, before, rows, known, clock)
    return {"about": about, "runs": [machine(options)], "spread": spreads, "found": found}


def fields_part(options: argparse.Namespace, rows: list[Row], known: frozenset[Key], clock: Clock) -> Part:
    """Errors on smooth random fields, of each setting."""
    grid = VideoGrid(**dict(zip(("frames", "height", "width"), options.grid, strict=True)))
    settings = []
    for setting in FIELDS:
        made = make_inputs(grid, setting, batch=options.draws)
        tensors = (x.to(options.device, DTYPES[options.dtype]) for x in (made.query, made.key, made.value))
        case = Case(Inputs(0, 0, *tensors), grid)
        progress({"field": str(setting)})
        found = measure_rows([case], {}, rows, known, clock)
        seen = spread(case.inputs.query, case.inputs.key)
        settings.append({"field": str(setting), "spread": seen, "found": found})
    about = {"grid": options.grid, "draws": options.draws}
    return {"about": about, "runs": [machine(options)], "settings": settings}


def videos_part(options: argparse.Namespace, rows: list[Row], known: frozenset[Key], clock: Clock) -> Part:
    """PSNR and SSIM of whole videos."""
    run = Run(Size(*options.size), options.steps, options.warmup, options.batch)
    pipeline, pairs = pipeline_of(options), make_pairs(options.pairs)
    dense = dense_videos(pipeline, pairs, run)
    found = []
    for point in clock.points(rows, known):
        values = found_of(point, **compare(pipeline, point, pairs, dense, run))
        found.append(values)
        progress(values)
    about = {"size": options.size, "pairs": options.pairs, "steps": run.steps, "warmup": run.warmup}
    return {"about": about, "runs": [machine(options)], "found": found}


def limits_part(options: argparse.Namespace, rows: list[Row], known: frozenset[Key], clock: Clock) -> Part:
    """PSNR and SSIM of whole videos of a few policies, in each of the circumstances."""
    pipeline, pairs = pipeline_of(options), make_pairs(options.pairs)
    dense: dict[Run, list[torch.Tensor]] = {}
    found = []
    for there in CIRCUMSTANCES:
        run = there.run(Size(*options.size), options.batch)
        for point in clock.points(map(there.changed, rows), known, there.name):
            if run.all_dense() not in dense:
                dense[run.all_dense()] = dense_videos(pipeline, pairs, run)
            compared = compare(pipeline, point, pairs, dense[run.all_dense()], run)
            values = found_of(point, circumstances=there.name, noise=run.noise_after_warmup(), **compared)
            found.append(values)
            progress(values)
    about = {"size": options.size, "pairs": options.pairs}
    return {"about": about, "runs": [machine(options)], "found": found}


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
        "commit": options.commit or commit_here(),
    }


def progress(values: Found) -> None:
    """A line on stderr: numbers, and the means of lists."""
    words = (
        f"{name} {sum(v) / len(v):.4f}" if isinstance(v, list) else f"{name} {v:.4f}" if isinstance(v, float) else v
        for name, v in values.items()
    )
    print(*words, sep="  ", file=sys.stderr, flush=True)


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=PARTS, action="append", help="may be repeated; default: attention")
    parser.add_argument(
        "--policies", action="append", metavar="TEXT", help="only policies whose name holds this; may be repeated"
    )
    parser.add_argument(
        "--rows", action="append", metavar="NAME", help="only the policy of exactly this name; may be repeated"
    )
    parser.add_argument("--only-new", action="store_true", help="only points that the file of --json lacks")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="float32")
    parser.add_argument("--size", type=whole, nargs=3, default=[16, 64, 64], metavar=("FRAMES", "HEIGHT", "WIDTH"))
    parser.add_argument("--prompts", type=whole, default=2, help="attention: prompts, each with a seed of its own")
    parser.add_argument("--draws", type=whole, default=2, help="fields: samples of each setting")
    parser.add_argument("--grid", type=whole, nargs=3, default=[16, 16, 16], help="fields: frames, rows, columns")
    parser.add_argument("--pairs", type=whole, default=32, help="videos: pairs of prompt and seed")
    parser.add_argument("--steps", type=whole, default=20, help="videos: denoising steps")
    parser.add_argument("--warmup", type=int, default=5, help="videos: dense steps at the start")
    parser.add_argument("--batch", type=whole, default=1, help="videos made at once; 32 fill a large GPU")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no point after this time")
    parser.add_argument("--threads", type=whole, help="of torch on a CPU")
    parser.add_argument("--json", type=Path, help="add the numbers to this file, after each part")
    parser.add_argument("--commit", help="of this code, for the file; default: as git says")
    options = parser.parse_args(given)
    if options.only_new and options.json is None:
        parser.error("--only-new needs --json, which says what is measured already")
    try:
        chosen(options.policies, options.rows)
    except ValueError as error:
        parser.error(str(error))
    return options


def rows_of(part: str, rows: Iterable[Row]) -> list[Row]:
    """The rows that a part measures."""
    if part == "fields":
        return [row for row in rows if not row.reuse]  # fields have no steps
    if part == "videos":
        return [row for row in rows if row.videos]
    return [row for row in rows if row.limits] if part == "limits" else list(rows)


def run(options: argparse.Namespace) -> dict[str, Part]:
    """What was measured, by part; with a file what that has of the parts now."""
    if options.threads:
        torch.set_num_threads(options.threads)
    clock = Clock(options.seconds)
    before = read(options.json)
    results: dict[str, Part] = {}
    measure = {"attention": attention_part, "fields": fields_part, "videos": videos_part, "limits": limits_part}
    with torch.no_grad():
        for part in PARTS:
            if part not in (options.part or ["attention"]):
                continue
            rows = rows_of(part, chosen(options.policies, options.rows))
            known = measured(before.get(part)) if options.only_new else frozenset()
            places: dict[str, list[Row]] = {"": rows}
            if part == "limits":
                places = {there.name: [there.changed(row) for row in rows] for there in CIRCUMSTANCES}
            if not any(unmeasured(changed, known, place) for place, changed in places.items()):
                print(f"{part}: the file has every point of these rows", file=sys.stderr)
                continue
            found = measure[part](options, rows, known, clock)
            results[part] = found if options.json is None else add(options.json, {part: found})[part]
    if clock.left_out:
        print(f"no time left for: {', '.join(clock.left_out)}", file=sys.stderr)
    return results


def main() -> None:
    print("\n\n".join(parts_of_page(run(arguments()), ROWS).values()))


if __name__ == "__main__":
    main()
