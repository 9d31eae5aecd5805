"""Plots and tables of what `quality.py --json` wrote: `python benchmarks/plot_quality.py quality.json --docs docs`.

Writes docs/quality-attention.svg, docs/quality-fields.svg and docs/quality-videos.svg, and the tables of
docs/quality.md between its markers, as far as the files have numbers; of a part that several hold, the last counts. The
colours follow the reader's light or dark scheme.
"""

import argparse
import itertools
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plot_lengths import text
from quality_equal_time import equal_time_table
from quality_metrics import MAX_PSNR, geometric_interval, interval
from quality_policies import ROWS, Row
from quality_report import about_text, fill, parts_of_page, points_of
from quality_store import Found

# Light and dark: background, text, faint text, grid, then a line of each row with a sweep, in the table's order.
COLOURS = {
    "ground": ("#ffffff", "#0d1117"),
    "text": ("#1f2328", "#e6edf3"),
    "faint": ("#59636e", "#9198a1"),
    "grid": ("#d1d9e0", "#30363d"),
    "s0": ("#818b98", "#9198a1"),
    "s1": ("#8250df", "#bc8cff"),
    "s2": ("#9a6700", "#d29922"),
    "s3": ("#1a7f37", "#3fb950"),
    "s4": ("#0969da", "#4493f8"),
    "s5": ("#cf222e", "#ff7b72"),
    "s6": ("#bf3989", "#f778ba"),
    "s7": ("#1b7c83", "#39c5cf"),
}
SERIES = [name for name in COLOURS if name.startswith("s")]
FIXED_STYLE = """
text { font: 13px system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; }
.title { font-size: 17px; font-weight: 600; }
.line { fill: none; stroke-width: 2.2; stroke-linejoin: round; }
.bar { fill: none; stroke-width: 1.4; }
.grid { stroke-width: 1; }
"""
LEGEND_WIDTH, LEGEND_GAP, TITLE_HEIGHT, TICK_GAP = 230, 22, 66, 32

Values = tuple[float, float, float]
"""A mean and the ends of its interval."""


@dataclass(frozen=True)
class Line:
    """One policy: class of its colour, name, and value by executed density."""

    classes: str
    name: str
    values: dict[float, Values]


@dataclass(frozen=True)
class Scale:
    """Numbers along an axis to places from ``start`` to ``stop``."""

    low: float
    high: float
    start: float
    stop: float
    is_log: bool

    def __call__(self, value: float) -> float:
        low, high, at = (
            (math.log(v) for v in (self.low, self.high, value)) if self.is_log else (self.low, self.high, value)
        )
        return self.start + (at - low) / (high - low) * (self.stop - self.start)

    def ticks(self) -> list[float]:
        """On a logarithmic axis 1, 2, 5, 10, ..., or more where there is room; on a linear one round numbers."""
        if not self.is_log:
            step = next(step for step in (0.5, 1, 2, 5, 10, 20, 50) if (self.high - self.low) / step <= 7)
            return [step * k for k in range(math.ceil(self.low / step), math.floor(self.high / step) + 1)]
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        chosen: list[float] = []
        for digits in ((1, 1.5, 2, 3, 5, 7), (1, 2, 5), (1,)):
            every = (digit * 10.0**decade for decade in decades for digit in digits)
            chosen = [tick for tick in every if self.low <= tick <= self.high]
            places = [self(tick) for tick in chosen]
            if all(abs(b - a) >= TICK_GAP for a, b in itertools.pairwise(places)):
                break
        return chosen


@dataclass(frozen=True)
class Frame:
    """Where a panel lies in the drawing."""

    left: float
    top: float
    width: float
    height: float


def style() -> str:
    """Every class's colour, in both schemes."""

    def rules(scheme: int) -> str:
        lines = []
        for name, colours in COLOURS.items():
            lines.append(f"path.{name} {{ stroke: {colours[scheme]}; }}")
            lines.append(f"text.{name}, rect.{name}, circle.{name} {{ fill: {colours[scheme]}; }}")
        return "\n".join(lines)

    return f"<style>{rules(0)}\n@media (prefers-color-scheme: dark) {{\n{rules(1)}\n}}{FIXED_STYLE}</style>"


def lines_of(
    found: list[Found], rows: Sequence[Row], value: str, of: Callable[[Sequence[float]], Values]
) -> list[Line]:
    """A line of each row with a sweep that was measured."""
    swept = [row for row in rows if row.sweep]
    lines = []
    for i, row in enumerate(swept):
        values = {}
        for one in points_of(found, row):
            values[one["density"]] = of(one[value])
        if values:
            lines.append(Line(SERIES[i % len(SERIES)], row.name, values))
    return lines


def panel(frame: Frame, lines: Sequence[Line], *, y_is_log: bool, title: str = "", y_name: str = "") -> list[str]:
    """Axes, lines, points and the bars of their intervals."""
    densities = [density for line in lines for density in line.values]
    ends = [end for line in lines for value in line.values.values() for end in value]
    y_low, y_high = (min(ends) / 1.15, max(ends) * 1.15) if y_is_log else (min(ends) - 1, max(ends) + 1)
    bottom, right = frame.top + frame.height, frame.left + frame.width
    x = Scale(min(densities) / 1.15, max(densities) * 1.15, frame.left, right, is_log=True)
    y = Scale(y_low, y_high, bottom, frame.top, is_log=y_is_log)
    parts = [text(frame.left, frame.top - 10, title or y_name, "text" if title else "faint")]
    for tick in x.ticks():
        parts.append(f'<path class="grid" d="M{x(tick):.1f} {frame.top:.1f}V{bottom:.1f}"/>')
        parts.append(text(x(tick), bottom + 18, f"{tick:g}", "faint", "middle"))
    for tick in y.ticks():
        parts.append(f'<path class="grid" d="M{frame.left:.1f} {y(tick):.1f}H{right:.1f}"/>')
        parts.append(text(frame.left - 7, y(tick) + 4, f"{tick:g}", "faint", "end"))
    for line in lines:
        at = [(x(density), *map(y, values)) for density, values in sorted(line.values.items())]
        path = "L".join(f"{px:.1f} {py:.1f}" for px, py, _, _ in at)
        parts.append(f'<path class="line {line.classes}" d="M{path}"/>')
        for px, py, low, high in at:
            parts.append(f'<circle class="{line.classes}" cx="{px:.1f}" cy="{py:.1f}" r="3.2"/>')
            if low != high:
                bar = f"M{px - 4:.1f} {low:.1f}h8M{px:.1f} {low:.1f}V{high:.1f}M{px - 4:.1f} {high:.1f}h8"
                parts.append(f'<path class="bar {line.classes}" d="{bar}"/>')
    return parts


def legend(left: float, top: float, lines: Sequence[Line]) -> list[str]:
    parts = []
    for i, line in enumerate(lines):
        y = top + LEGEND_GAP * i
        parts.append(f'<path class="line {line.classes}" d="M{left:.1f} {y:.1f}h22"/>')
        parts.append(text(left + 30, y + 4, line.name, "text"))
    return parts


def drawing(width: float, height: float, title: str, under: Sequence[str], parts: Sequence[str]) -> str:
    words = [text(16, 26, title, "text title"), *(text(16, 46 + 17 * i, one, "faint") for i, one in enumerate(under))]
    head = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" role="img">',
        f"<title>{title}</title>",
        style(),
        f'<rect class="ground" width="{width:g}" height="{height:g}"/>',
    ]
    return "\n".join([*head, *words, *parts, "</svg>"]) + "\n"


def single(
    title: str, part: Mapping[str, Any], lines: Sequence[Line], *, y_is_log: bool, y_name: str, x_name: str
) -> str:
    """One panel with its legend beside it."""
    frame = Frame(left=62, top=TITLE_HEIGHT + 34, width=600, height=380)
    bottom = frame.top + frame.height
    parts = panel(frame, lines, y_is_log=y_is_log, y_name=y_name)
    parts.append(text(frame.left + frame.width / 2, bottom + 40, x_name, "faint", "middle"))
    parts += legend(frame.left + frame.width + 26, frame.top + 12, lines)
    return drawing(frame.left + frame.width + LEGEND_WIDTH, bottom + 54, title, about_text(part).split("; ", 1), parts)


def draw_attention(part: Mapping[str, Any], rows: Sequence[Row]) -> str:
    lines = _some(lines_of(part["found"], rows, "errors", geometric_interval))
    names = {"y_name": "error of the attention output relative to dense", "x_name": "executed density"}
    return single("Attention error on the tiny model", part, lines, y_is_log=True, **names)


def draw_videos(part: Mapping[str, Any], rows: Sequence[Row]) -> str:
    found = [one for one in part["found"] if max(one["psnr"]) < MAX_PSNR]
    lines = _some(lines_of(found, rows, "psnr", interval))
    names = {"y_name": "PSNR against dense, dB, 95% intervals", "x_name": "executed density of the sparse steps"}
    return single("Whole videos of the tiny model", part, lines, y_is_log=False, **names)


def draw_fields(part: Mapping[str, Any], rows: Sequence[Row], columns: int = 4) -> str:
    """One panel of each setting, four in a row."""
    each = [
        (setting["field"], _some(lines_of(setting["found"], rows, "errors", geometric_interval)))
        for setting in part["settings"]
    ]
    columns = min(columns, len(each))
    across, down, margin = 250.0, 240.0, 52.0
    parts: list[str] = []
    for i, (name, lines) in enumerate(each):
        frame = Frame(
            left=margin + across * (i % columns),
            top=TITLE_HEIGHT + 44 + down * (i // columns),
            width=across - margin,
            height=down - 74,
        )
        smoothness, rest = name.split(", ", 1)
        parts += panel(frame, lines, y_is_log=True, title=rest)
        parts.append(text(frame.left, frame.top - 26, smoothness, "text"))
    under = [about_text(part), "Error of the attention output relative to dense against executed density"]
    right = margin + across * columns
    height = TITLE_HEIGHT + 30 + down * math.ceil(len(each) / columns)
    parts += legend(right, TITLE_HEIGHT + 60, each[0][1])
    return drawing(right + LEGEND_WIDTH, height, "Attention error on smooth random fields", under, parts)


DRAW = {"attention": draw_attention, "fields": draw_fields, "videos": draw_videos}


def _some(lines: list[Line]) -> list[Line]:
    if not lines:
        raise ValueError("none of the policies with a sweep was measured")
    return lines


def merged(paths: Iterable[Path]) -> dict[str, Any]:
    """The parts of all files."""
    results: dict[str, Any] = {}
    for path in paths:
        results |= json.loads(path.read_text())
    return results


def texts_of(results: Mapping[str, Any]) -> dict[str, str]:
    """The text of each marked part of docs/quality.md that the results have numbers for."""
    texts = parts_of_page(results, ROWS)
    if {"attention", "fields"} <= results.keys():
        pages = (Path(__file__).with_name("results") / name for name in ("gpu_orders.md", "gpu_attention.md"))
        texts["equal-time"] = equal_time_table(results, ROWS, *(page.read_text(encoding="utf-8") for page in pages))
    return texts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("json", type=Path, nargs="+", help="what quality.py --json wrote")
    parser.add_argument("--docs", type=Path, required=True, help="the folder of quality.md")
    options = parser.parse_args()
    results = merged(options.json)
    for name, part in results.items():
        if name in DRAW:
            (options.docs / f"quality-{name}.svg").write_text(DRAW[name](part, ROWS), encoding="utf-8")
    page = options.docs / "quality.md"
    page.write_text(fill(page.read_text(encoding="utf-8"), texts_of(results)), encoding="utf-8")


if __name__ == "__main__":
    main()
