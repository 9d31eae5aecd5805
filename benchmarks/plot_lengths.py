"""Draw what `gpu_lengths.py --json` wrote: `python benchmarks/plot_lengths.py lengths.json docs/lengths.svg`.

Milliseconds against length, both axes logarithmic. The colours follow the reader's light or dark scheme.
"""

import argparse
import json
import math
from dataclasses import dataclass
from html import escape
from pathlib import Path

from lengths_report import DENSE, FASTVIDEO, FLASH, FLEX, GRAPH, WHOLE, Found, short, times

WIDTH, HEIGHT = 950, 540
LEFT, RIGHT, TOP, BOTTOM = 62, 322, 74, 54  # margins; the right one holds the labels
LABEL_GAP = 19
# Name of the line's class, method, density, label.
SERIES = (
    ("flash", FLASH, 1.0, "dense, FlashAttention-2"),
    ("dense", DENSE, 1.0, "dense, cuDNN"),
    ("vsa", FASTVIDEO, 0.15, "FastVideo VSA 0.15, kernel"),
    ("flex", FLEX, 0.15, "FlexAttention 0.15, kernel"),
    ("graph", GRAPH, 0.15, "PSA 0.15, in a CUDA graph"),
    ("ours", WHOLE, 0.15, "PSA 0.15, whole op"),
    ("less", WHOLE, 0.10, "PSA 0.10, whole op"),
)
# Light and dark: background, text, faint text, grid, then a line of each class.
COLOURS = {
    "ground": ("#ffffff", "#0d1117"),
    "text": ("#1f2328", "#e6edf3"),
    "faint": ("#59636e", "#9198a1"),
    "grid": ("#d1d9e0", "#30363d"),
    "flash": ("#818b98", "#818b98"),
    "dense": ("#3d444d", "#c8d1da"),
    "vsa": ("#8250df", "#bc8cff"),
    "flex": ("#9a6700", "#d29922"),
    "graph": ("#0969da", "#4493f8"),
    "ours": ("#0969da", "#4493f8"),
    "less": ("#1a7f37", "#3fb950"),
}
FIXED_STYLE = """
text { font: 13px system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; }
.title { font-size: 17px; font-weight: 600; }
.line { fill: none; stroke-width: 1.6; stroke-linejoin: round; }
.line.ours, .line.less { stroke-width: 3.6; }
.line.graph, .line.flash { stroke-dasharray: 6 4; }
.leader { fill: none; stroke-width: 1; opacity: 0.55; }
.grid { stroke-width: 1; }
text.ours, text.less { font-weight: 700; }
"""


@dataclass(frozen=True)
class Axes:
    """Tokens and milliseconds to places in the drawing."""

    tokens: tuple[int, int]
    ms: tuple[float, float]

    def x(self, length: float) -> float:
        low, high = (math.log2(end) for end in self.tokens)
        return LEFT + (math.log2(length) - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    def y(self, ms: float) -> float:
        low, high = (math.log10(end) for end in self.ms)
        return HEIGHT - BOTTOM - (math.log10(ms) - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    def ticks(self) -> list[float]:
        """1, 3, 10, 30, ... milliseconds, as far as the axis reaches."""
        decades = range(math.floor(math.log10(self.ms[0])), math.ceil(math.log10(self.ms[1])) + 1)
        every = (digit * 10.0**decade for decade in decades for digit in (1, 3))
        return [tick for tick in every if self.ms[0] <= tick <= self.ms[1]]


def style() -> str:
    """Every class's colour, in both schemes."""

    def rules(scheme: int) -> str:
        lines = []
        for name, colours in COLOURS.items():
            colour = colours[scheme]
            lines.append(f"path.{name} {{ stroke: {colour}; }}")
            lines.append(f"text.{name}, rect.{name}, circle.{name} {{ fill: {colour}; }}")
        return "\n".join(lines)

    return f"<style>{rules(0)}\n@media (prefers-color-scheme: dark) {{\n{rules(1)}\n}}{FIXED_STYLE}</style>"


def text(x: float, y: float, words: str, classes: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{classes}" text-anchor="{anchor}">{escape(words)}</text>'


def grid(axes: Axes, lengths: list[int]) -> list[str]:
    """Lines and numbers of both axes."""
    parts = []
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    for tick in axes.ticks():
        y = axes.y(tick)
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{right}"/>')
        parts.append(text(LEFT - 8, y + 4, f"{tick:g}", "faint", "end"))
    for length in lengths:
        x = axes.x(length)
        parts.append(f'<path class="grid" d="M{x:.1f} {TOP}V{bottom}"/>')
        parts.append(text(x, bottom + 20, short(length), "faint", "middle"))
    parts.append(text((LEFT + right) / 2, bottom + 42, "tokens", "faint", "middle"))
    parts.append(text(LEFT - 8, TOP - 12, "ms", "faint", "end"))
    return parts


def spread(places: list[float]) -> list[float]:
    """The places, in rising order, moved apart to ``LABEL_GAP`` and kept above the bottom of the plot."""
    moved: list[float] = []
    for place in places:
        moved.append(max(place, moved[-1] + LABEL_GAP) if moved else place)
    limit = float(HEIGHT - BOTTOM)
    for i in reversed(range(len(moved))):
        moved[i] = min(moved[i], limit)
        limit = moved[i] - LABEL_GAP
    return moved


def curve(axes: Axes, name: str, line: dict[int, float]) -> list[str]:
    points = [(axes.x(length), axes.y(ms)) for length, ms in line.items()]
    path = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    radius = 4.0 if name in ("ours", "less") else 2.4
    dots = [f'<circle class="{name}" cx="{x:.1f}" cy="{y:.1f}" r="{radius}"/>' for x, y in points]
    return [f'<path class="line {name}" d="M{path}"/>', *dots]


def rounded(ms: float) -> str:
    return f"{ms:.0f}" if ms >= 100.0 else f"{ms:.3g}"


def labels(axes: Axes, lines: list[tuple[str, str, dict[int, float]]]) -> list[str]:
    """A label at the end of each line, with the time there, and the length where the line ends early."""
    ends = sorted((axes.y(line[max(line)]), name, words, line) for name, words, line in lines)
    parts = []
    for (y, name, words, line), place in zip(ends, spread([end[0] for end in ends]), strict=True):
        last = max(line)
        x = axes.x(last)
        where = "" if last == axes.tokens[1] else f" at {short(last)}"
        parts.append(f'<path class="leader {name}" d="M{x + 6:.1f} {y:.1f}L{WIDTH - RIGHT + 26} {place:.1f}h6"/>')
        parts.append(text(WIDTH - RIGHT + 37, place + 4, f"{words}: {rounded(line[last])} ms{where}", name))
    return parts


def draw(about: dict[str, object], found: list[Found]) -> str:
    """The whole drawing."""
    shown = [(name, words, times(found, method, density)) for name, method, density, words in SERIES]
    shown = [one for one in shown if one[2]]
    if not shown:
        raise ValueError("none of the methods has a time")
    every = [ms for _, _, line in shown for ms in line.values()]
    lengths = sorted({length for _, _, line in shown for length in line})
    last = max(lengths[-1], 2 * lengths[0])
    axes = Axes((lengths[0], last), (min(every) / 1.3, max(every) * 1.3))
    shape = about["shape"]
    under = (
        f"{about['card']}, B{shape['batch']} H{shape['heads']} D{shape['head_dim']}, {shape['dtype']}; lower is better"
    )
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">',
        "<title>Milliseconds of one attention call against its length</title>",
        style(),
        f'<rect class="ground" width="{WIDTH}" height="{HEIGHT}"/>',
        text(LEFT, 26, "One attention call against its length", "text title"),
        text(LEFT, 46, under, "faint"),
        *grid(axes, lengths),
        *[part for name, _, line in shown for part in curve(axes, name, line)],
        *labels(axes, shown),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("json", type=Path, help="what gpu_lengths.py --json wrote")
    parser.add_argument("svg", type=Path, help="the drawing to write")
    options = parser.parse_args()
    measured = json.loads(options.json.read_text())
    options.svg.write_text(draw(measured["about"], measured["found"]))


if __name__ == "__main__":
    main()
