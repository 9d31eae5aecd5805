"""The numbers of `quality.py` in a file: a run adds to what earlier ones found, and says what each number comes from.

A part has ``about`` (what its numbers are of, the same for all of them), ``runs`` (machine, versions and commit of
each), and ``found``, whose measurements name their run by its place in ``runs``; of fields, each of the ``settings``
has a ``found`` of its own.
"""

import json
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Part = dict[str, Any]
Found = dict[str, Any]
Key = tuple[str, str, int]
"""Circumstances (only of the part that varies them), row and point."""


def key_of(one: Found) -> Key:
    return one.get("circumstances", ""), one["row"], one["point"]


def lists_of(part: Part) -> list[list[Found]]:
    """Every list of measurements: one, or one a setting."""
    return [setting["found"] for setting in part["settings"]] if "settings" in part else [part["found"]]


def measured(part: Part | None) -> frozenset[Key]:
    """What the part has numbers of, in all its settings."""
    if part is None:
        return frozenset()
    return frozenset.intersection(*(frozenset(map(key_of, found)) for found in lists_of(part)))


def rounded(value: Any) -> Any:
    """The same with five significant digits in every float, which keeps the file small, and as JSON gives it back."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {name: rounded(one) for name, one in value.items()}
    return [rounded(one) for one in value] if isinstance(value, (list, tuple)) else value


def merged(old: Part, new: Part) -> Part:
    """The old part with the new measurements in place of those of the same row and point, or after the others.

    Raises:
        ValueError: the two are not of the same things, such as other prompts, or their settings differ.
    """
    new = rounded(new)
    differing = sorted(name for name in old["about"] | new["about"] if old["about"].get(name) != new["about"].get(name))
    if differing:
        both = ", ".join(f"{name} {old['about'].get(name)!r} and {new['about'].get(name)!r}" for name in differing)
        raise ValueError(f"measurements must be of the same things to stand in one file, got {both}")
    if [one["field"] for one in old.get("settings", ())] != [one["field"] for one in new.get("settings", ())]:
        raise ValueError("fields must be the same to stand in one file")
    part = {name: value for name, value in old.items() if name not in ("runs", "found", "settings")}
    part["runs"] = old["runs"] + new["runs"]
    lists = [_replaced(kept, added, len(old["runs"])) for kept, added in zip(lists_of(old), lists_of(new), strict=True)]
    if "settings" in old:
        part["settings"] = [{**setting, "found": found} for setting, found in zip(old["settings"], lists, strict=True)]
    else:
        part["found"] = lists[0]
    return _without_unused_runs(part)


def _replaced(kept: Iterable[Found], added: Iterable[Found], first_run: int) -> list[Found]:
    by_key = {key_of(one): one for one in kept}
    by_key |= {key_of(one): {**one, "run": one["run"] + first_run} for one in added}
    return list(by_key.values())


def _without_unused_runs(part: Part) -> Part:
    """Runs of which no number is left go; equal ones become one."""
    used = sorted({one["run"] for found in lists_of(part) for one in found})
    runs: list[Any] = []
    places = {}
    for number in used:
        run = part["runs"][number]
        if run not in runs:
            runs.append(run)
        places[number] = runs.index(run)
    for found in lists_of(part):
        found[:] = [{**one, "run": places[one["run"]]} for one in found]
    return {**part, "runs": runs}


def read(path: Path | None) -> dict[str, Part]:
    """The parts in a file; none where there is no file."""
    if path is None or not path.exists():
        return {}
    parts: dict[str, Part] = json.loads(path.read_text())
    return parts


def add(path: Path, parts: dict[str, Part]) -> dict[str, Part]:
    """What the file has with these parts merged in, which is written under its name only once it is whole.

    Raises:
        ValueError: a part of the file is of other things; the file stays as it is.
    """
    results = read(path)
    for name, part in parts.items():
        results[name] = merged(results[name], part) if name in results else rounded(part)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(results) + "\n")
    partial.replace(path)
    return results


def commit_here() -> str:
    """The commit that is checked out, with a ``+`` where files differ from it; ``unknown`` outside a checkout."""

    def git(*words: str) -> str:
        return subprocess.run(
            ("git", "-C", str(Path(__file__).parent), *words), check=True, capture_output=True, text=True
        ).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
