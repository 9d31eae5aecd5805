"""What `gpu_lengths` says about its measurements: tables, and the length from which sparse attention pays.

A measurement is a dictionary with ``method``, ``density``, ``length``, ``ms`` (None where there is none), ``note`` (why
there is none) and, where there is, the density ``executed``.
"""

import math
from collections.abc import Callable, Iterable

DENSE = "dense, cuDNN"
FLASH = "dense, FlashAttention-2"
FLEX = "FlexAttention, kernel"
FASTVIDEO = "FastVideo VSA, kernel"
LEVEL_1 = "PSA level 1 alone, plan given"
PLANNED = "PSA, plan given"
WHOLE = "PSA, whole op"
GRAPH = "PSA, whole op in a CUDA graph"
METHODS = (DENSE, FLASH, FLEX, FASTVIDEO, LEVEL_1, PLANNED, WHOLE, GRAPH)

Found = dict[str, object]


def times(found: list[Found], method: str, density: float, what: str = "ms") -> dict[int, float]:
    """Milliseconds, or ``what`` of the measurement, by length."""
    chosen = [one for one in found if (one["method"], one["density"]) == (method, density) and one["ms"]]
    return {one["length"]: one[what] for one in sorted(chosen, key=lambda one: one["length"])}


def ratios(found: list[Found], method: str, density: float) -> dict[int, float]:
    """Time over that of dense attention by cuDNN, by length."""
    base = times(found, DENSE, 1.0)
    return {length: ms / base[length] for length, ms in times(found, method, density).items() if length in base}


def break_even(ratio: dict[int, float]) -> float:
    """The length from which the ratio stays below 1, interpolated linearly over log2 of the length.

    Returns 0 where it is below 1 at every length, infinity where it is not at the longest.
    """
    lengths = sorted(ratio)
    slower = [i for i, length in enumerate(lengths) if ratio[length] >= 1.0]
    if not slower:
        return 0.0
    if slower[-1] == len(lengths) - 1:
        return math.inf
    low, high = lengths[slower[-1]], lengths[slower[-1] + 1]
    share = (ratio[low] - 1.0) / (ratio[low] - ratio[high])
    return low * (high / low) ** share


def break_even_text(found: list[Found], density: float, method: str = WHOLE) -> str:
    """The break-even of the whole op in words."""
    ratio = ratios(found, method, density)
    if not ratio:
        return "not measured"
    tokens = break_even(ratio)
    if tokens == 0.0:
        return f"below {short(min(ratio))} tokens"
    return f"above {short(max(ratio))} tokens" if tokens == math.inf else f"{tokens / 1024:.1f}k tokens"


def is_always_faster(found: list[Found], densities: Iterable[float]) -> bool:
    """Whether the whole op beats dense attention at every length, at one of the densities, launched or in a graph."""
    each = (ratios(found, method, density) for density in densities for method in (WHOLE, GRAPH))
    return any(ratio and break_even(ratio) == 0.0 for ratio in each)


def short(length: int) -> str:
    return f"{length // 1024}k" if length % 1024 == 0 else str(length)


def rows(found: list[Found]) -> list[tuple[str, float]]:
    """Method and density of the tables' rows."""
    known = {(one["method"], one["density"]) for one in found}
    return sorted(known, key=lambda row: (-row[1], METHODS.index(row[0])))


def reasons(found: list[Found], method: str, density: float) -> str:
    """Why the row lacks what it lacks."""
    where: dict[str, list[str]] = {}
    for one in found:
        if (one["method"], one["density"]) == (method, density) and one["note"]:
            where.setdefault(one["note"].replace("|", "\\|"), []).append(short(one["length"]))
    return "; ".join(f"{', '.join(lengths)}: {note}" for note, lengths in where.items())


def table(
    found: list[Found], values: Callable[..., dict[int, float]], last: tuple[str, Callable[..., str]] | None = None
) -> list[str]:
    """A row for each method and density, a column for each length, and a last column of text."""
    lengths = sorted({one["length"] for one in found})
    heads = ["method", "density", *map(short, lengths)] + ([last[0]] if last else [])
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for method, density in rows(found):
        value = values(found, method, density)
        cells = [method, f"{density:.2f}"] + [f"{value[n]:.3f}" if n in value else "-" for n in lengths]
        lines.append(f"| {' | '.join(cells + ([last[1](found, method, density)] if last else []))} |")
    return lines


def executed(found: list[Found], method: str, density: float) -> dict[int, float]:
    return times(found, method, density, "executed")


def sections(found: list[Found], densities: list[float]) -> list[str]:
    """Everything below the page's head."""
    return [
        "## Milliseconds",
        "",
        *table(found, times, ("not measured", reasons)),
        "",
        "## Time over that of dense cuDNN",
        "",
        *table(found, ratios),
        "",
        "The whole op is faster from",
        "",
        *[
            f"- density {density:.2f}: {break_even_text(found, density)}, "
            f"in a CUDA graph {break_even_text(found, density, GRAPH)}"
            for density in densities
        ],
        "",
        "(between the lengths measured, the ratio is taken as linear in the logarithm of the length).",
        "",
        "## Density executed",
        "",
        "Quotas are rounded up to whole blocks.",
        "",
        *table([one for one in found if one["density"] < 1.0 and one["ms"]], executed),
        "",
    ]
