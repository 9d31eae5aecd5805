"""What `quality.py` says about its measurements: tables, and their place between the markers of a page.

A measurement is a dictionary with ``row`` and ``point``, executed ``density``, and ``errors`` and ``mass``, or for
videos ``density_of_run``, ``psnr`` and ``ssim``, and for limits ``circumstances`` and ``noise`` as well; lists hold a
number a sample.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from quality_metrics import FEWEST, geometric_interval, interval
from quality_policies import QUOTAS, Row
from quality_store import Found, lists_of

Interval = tuple[float, float, float]


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def with_ends(values: Sequence[float], of: Callable[[Sequence[float]], Interval], form: str) -> str:
    """The mean, and its interval where there are enough values."""
    mean, low, high = (format(number, form) for number in of(values))
    return f"{mean} ({low} to {high})" if len(values) >= FEWEST else mean


def points_of(found: Iterable[Found], row: Row) -> list[Found]:
    """The row's measurements by rising density."""
    return sorted((one for one in found if one["row"] == row.name), key=lambda one: one["density"])


def plain_point(found: Iterable[Found], name: str | None) -> Found | None:
    """The measurement of a row with its settings as they are."""
    return next((one for one in found if (one["row"], one["point"]) == (name, 0)), None)


def against_base(
    found: list[Found], row: Row, one: Found, value: str, how: Callable[[float, float], float]
) -> list[float]:
    """``how`` of the value and the base's, for each sample; empty where there is no base to hold it against."""
    base = plain_point(found, row.base)
    return [] if base is None else [how(a, b) for a, b in zip(one[value], base[value], strict=True)]


def sections(found: list[Found], rows: Sequence[Row], of_section: Callable[[list[Row]], str]) -> str:
    """A table of each section that has something measured."""
    measured = {one["row"] for one in found}
    present = [row for row in rows if row.name in measured]
    parts = [
        f"**{section}**\n\n{of_section([row for row in present if row.section == section])}"
        for section in dict.fromkeys(row.section for row in present)
    ]
    return "\n\n".join(parts)


def attention_tables(part: Mapping[str, Any], rows: Sequence[Row]) -> str:
    """Density, error and mass of every point, and how the error compares with that of the row it changes."""
    found: list[Found] = part["found"]

    def lines(row: Row) -> Iterable[Sequence[str]]:
        for one in points_of(found, row):
            ratios = against_base(found, row, one, "errors", lambda error, base: error / base)
            yield (
                row.name,
                f"{one['density']:.3f}",
                with_ends(one["errors"], geometric_interval, ".3f"),
                f"{one['mass']:.3f}",
                *([with_ends(ratios, geometric_interval, ".2f") if ratios else ""] if row.base else []),
            )

    def of_section(shown: list[Row]) -> str:
        heads = ["policy", "density", "error", "mass at level 1"]
        heads += ["error / its base's"] if any(row.base for row in shown) else []
        return table(heads, (line for row in shown for line in lines(row)))

    return sections(found, rows, of_section)


def field_tables(part: Mapping[str, Any], rows: Sequence[Row]) -> str:
    """What the settings are like, and the error of every row's first point, a column for each setting.

    A density that the settings do not share stands in each cell before the error.
    """
    settings: list[dict[str, Any]] = part["settings"]
    names = [chr(ord("A") + i) for i in range(len(settings))]
    about = table(
        ["", "field", "effective keys / all", "mass of the best 5%", "of the best 15%"],
        [(name, setting["field"], *_shares(setting["spread"])) for name, setting in zip(names, settings, strict=True)],
    )

    def line(row: Row) -> Sequence[str]:
        each = [plain_point(setting["found"], row.name) for setting in settings]
        densities = ["-" if one is None else f"{one['density']:.3f}" for one in each]
        errors = ["-" if one is None else f"{geometric_interval(one['errors'])[0]:.3f}" for one in each]
        if len(set(densities)) == 1:
            return (row.name, densities[0], *errors)
        return (row.name, "", *(f"{density}: {error}" for density, error in zip(densities, errors, strict=True)))

    measured = {one["row"] for setting in settings for one in setting["found"]}
    errors = table(["policy", "density", *names], [line(row) for row in rows if row.name in measured])
    return f"{about}\n\n{errors}"


def spread_table(part: Mapping[str, Any]) -> str:
    """How concentrated the tiny model's attention is, layer by layer, as the mean over the steps."""
    by_layer: dict[int, list[dict[str, float]]] = {}
    for one in part["spread"]:
        by_layer.setdefault(one["layer"], []).append(one)
    means = {
        layer: {name: sum(one[name] for one in found) / len(found) for name in ("effective", "top5", "top15")}
        for layer, found in sorted(by_layer.items())
    }
    return table(
        ["layer", "effective keys / all", "mass of the best 5%", "of the best 15%"],
        [(str(layer), *_shares(mean)) for layer, mean in means.items()],
    )


def _shares(spread: Mapping[str, float]) -> tuple[str, ...]:
    return tuple(f"{spread[name]:.3f}" for name in ("effective", "top5", "top15"))


def video_tables(part: Mapping[str, Any], rows: Sequence[Row]) -> str:
    """Densities, PSNR and SSIM of every point, and how the PSNR compares with that of the row it changes."""
    found: list[Found] = part["found"]

    def lines(row: Row) -> Iterable[Sequence[str]]:
        for one in points_of(found, row):
            gains = against_base(found, row, one, "psnr", lambda decibel, base: decibel - base)
            yield (
                row.name,
                f"{one['density']:.3f}",
                f"{one['density_of_run']:.3f}",
                with_ends(one["psnr"], interval, ".2f"),
                with_ends(one["ssim"], interval, ".3f"),
                *([with_ends(gains, interval, "+.2f") if gains else ""] if row.base else []),
            )

    def of_section(shown: list[Row]) -> str:
        heads = ["policy", "density, sparse steps", "density, all steps", "PSNR (dB)", "SSIM"]
        heads += ["PSNR - its base's"] if any(row.base for row in shown) else []
        return table(heads, (line for row in shown for line in lines(row)))

    return sections(found, rows, of_section)


def limits_table(part: Mapping[str, Any], rows: Sequence[Row]) -> str:
    """PSNR of each policy in each of the circumstances, and what the last of them gains over the paper's quotas.

    Densities stand beside each other: with blocks of another size the same shares are other numbers of blocks.
    """
    found: list[Found] = part["found"]
    shown = [row.name for row in rows if any(one["row"] == row.name for one in found)]
    lines = []
    for name in dict.fromkeys(one["circumstances"] for one in found):
        here = {one["row"]: one for one in found if one["circumstances"] == name}
        cells = [with_ends(here[row]["psnr"], interval, ".2f") if row in here else "-" for row in shown]
        last, before = here.get(shown[-1]), here.get(QUOTAS)
        gains = [a - b for a, b in zip(last["psnr"], before["psnr"], strict=True)] if last and before else []
        one = next(iter(here.values()))
        densities = [f"{here[row]['density']:.3f}" if row in here else "-" for row in shown]
        lines.append(
            (
                name,
                f"{one['noise']:.3f}",
                " / ".join(densities),
                *cells,
                with_ends(gains, interval, "+.2f") if gains else "-",
            )
        )
    heads = ["circumstances", "noise at the first sparse step", "density of each", *shown, f"{shown[-1]} - {QUOTAS}"]
    return table(heads, lines)


def about_text(part: Mapping[str, Any]) -> str:
    """What was measured, on what, in a sentence."""
    about = part["about"]
    words = [
        " and ".join(
            dict.fromkeys(
                f"{run['device']}, {run['dtype']}, torch {run['torch']}, psa-masks {run['psa-masks']}"
                for run in part["runs"]
            )
        )
    ]
    if "prompts" in about:
        seen = " and ".join(map(str, about["seen_steps"]))
        words.append(
            f"{_count(about['prompts'], 'prompt')}, steps {seen} of {about['steps']}, {about['layers']} layers, "
            f"{about['tokens']:,} tokens"
        )
    if "draws" in about:
        words.append(f"{_count(about['draws'], 'draw')}, {_by(about['grid'])} tokens")
    if "pairs" in about:
        words.append(f"{_count(about['pairs'], 'pair')} of prompt and seed, {_by(about['size'])}")
    if "warmup" in about:
        words[-1] += f", {about['steps']} steps, the first {about['warmup']} dense"
    return "Measured: " + "; ".join(words) + "."


def runs_text(part: Mapping[str, Any]) -> str:
    """Which commits the numbers come from."""
    of_commit: Counter[str] = Counter()
    for found in lists_of(dict(part)):
        of_commit.update(part["runs"][one["run"]]["commit"] for one in found)
    total = sum(of_commit.values())
    if len(of_commit) == 1:
        return f"Commit {next(iter(of_commit))}."
    return (
        "Commits: "
        + ", ".join(f"{commit} ({count / total:.0%} of the numbers)" for commit, count in of_commit.items())
        + "."
    )


def _count(number: int, name: str) -> str:
    return f"{number} {name}{'' if number == 1 else 's'}"


def _by(sizes: Sequence[int]) -> str:
    return "x".join(map(str, sizes))


def parts_of_page(results: Mapping[str, Any], rows: Sequence[Row]) -> dict[str, str]:
    """The text of each marked part of docs/quality.md that the results have numbers for."""
    texts: dict[str, str] = {}
    if "attention" in results:
        texts["spread"] = spread_table(results["attention"])
    tables = {"attention": attention_tables, "fields": field_tables, "videos": video_tables, "limits": limits_table}
    for name, made in tables.items():
        if part := results.get(name):
            texts[name] = f"{about_text(part)} {runs_text(part)}\n\n{made(part, rows)}"
    return texts


def fill(page: str, texts: Mapping[str, str]) -> str:
    """The page with each text in place of what stands between ``<!-- name -->`` and ``<!-- /name -->``.

    Raises:
        ValueError: the page lacks a text's markers.
    """
    for name, text in texts.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        if len(pattern.findall(page)) != 1:
            raise ValueError(f"the page must have <!-- {name} --> and <!-- /{name} --> once, on lines of their own")
        page = pattern.sub(lambda match, text=text: f"{match[1]}{text}\n{match[2]}", page)
    return page
