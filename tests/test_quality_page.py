"""The files of the quality bench, and the page made of them: it says what their numbers say."""

import math
import re
from pathlib import Path
from xml.etree import ElementTree

import plot_quality
import pytest
import quality
import quality_equal_time
import quality_store
from quality_metrics import interval
from quality_policies import FRONTIER, ORDERS, ROWS
from quality_report import fill, limits_table, parts_of_page
from quality_videos import Circumstances

ROOT = Path(__file__).parents[1]

PART = {
    "about": {"prompts": 2},
    "runs": [{"device": "a", "commit": "1"}],
    "found": [{"row": name, "point": 0, "run": 0, "errors": [0.25]} for name in ("x", "y")],
}


def part_of(rows, **changes):
    found = [{"row": row, "point": 0, "run": 0, "errors": [1 / 3]} for row in rows]
    return {**PART, "runs": [{"device": "b", "commit": "2"}], "found": found, **changes}


def test_a_file_gains_rows_and_says_what_each_comes_from(tmp_path):
    path = tmp_path / "found.json"
    quality_store.add(path, {"attention": PART})
    results = quality_store.add(path, {"attention": part_of(["y", "z"]), "videos": PART})
    assert results == quality_store.read(path)
    assert results["videos"] == PART
    part = results["attention"]
    assert [(one["row"], one["run"], one["errors"]) for one in part["found"]] == [
        ("x", 0, [0.25]), ("y", 1, [0.33333]), ("z", 1, [0.33333]),
    ]  # fmt: skip
    assert [run["commit"] for run in part["runs"]] == ["1", "2"]
    assert quality_store.measured(part) == {("", name, 0) for name in "xyz"}
    again = quality_store.add(path, {"attention": part_of(["x", "y"])})["attention"]
    assert [run["commit"] for run in again["runs"]] == ["2"]
    assert {one["run"] for one in again["found"]} == {0}


def test_other_samples_do_not_go_into_a_file(tmp_path):
    path = tmp_path / "found.json"
    quality_store.add(path, {"attention": PART})
    before = path.read_text()
    with pytest.raises(ValueError, match="prompts 2 and 3"):
        quality_store.add(path, {"attention": part_of(["z"], about={"prompts": 3})})
    assert path.read_text() == before
    assert list(tmp_path.iterdir()) == [path]


def test_fields_gain_rows_in_each_setting():
    def fields(row, commit):
        settings = [
            {"field": name, "found": [{"row": row, "point": 0, "run": 0, "errors": [1.0]}]} for name in ("one", "two")
        ]
        return {"about": {}, "runs": [{"commit": commit}], "settings": settings}

    part = quality_store.merged(fields("x", "1"), fields("y", "2"))
    assert [[(one["row"], one["run"]) for one in found] for found in quality_store.lists_of(part)] == [
        [("x", 0), ("y", 1)]
    ] * 2
    del part["settings"][1]["found"][1]
    assert quality_store.measured(part) == {("", "x", 0)}
    with pytest.raises(ValueError, match="fields must be the same"):
        quality_store.merged(part, {**part, "settings": part["settings"][:1]})


def test_circumstances_keep_the_tree_inside_blocks_and_give_the_others_their_order():
    there = Circumstances("cubes", order="cubes 4x4x4")
    orders = {row.name: there.changed(row).order for row in ROWS if row.limits}
    assert orders.pop("k-d tree") == "k-d tree in cubes 4x4x4"
    assert set(orders.values()) == {"cubes 4x4x4"}
    assert all(there.changed(row).order in ORDERS for there in quality.CIRCUMSTANCES for row in ROWS if row.limits)
    tree = next(row for row in ROWS if row.name == "k-d tree")
    assert Circumstances("as above").changed(tree).order == "k-d tree"


def test_a_run_from_command_to_page(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(quality, "FIELDS", quality.FIELDS[:2])
    two = Circumstances("few", steps=2, warmup=1), Circumstances("calm", steps=2, warmup=1, shift=3.0, guidance=1.0)
    monkeypatch.setattr(quality, "CIRCUMSTANCES", two)
    path = tmp_path / "found.json"
    small = "--size 2 16 16 --grid 2 8 8 --prompts 1 --draws 1 --pairs 1 --steps 2 --warmup 1 --commit abc"
    parts = [word for part in quality.PARTS for word in ("--part", part)]
    only = ["--policies", "level 1 + tail", "--rows", "quotas + tail"]

    def measure(*more):
        quality.run(quality.arguments([*small.split(), *parts, "--json", str(path), *more]))
        return plot_quality.merged([path])

    measure("--rows", "quotas + tail")
    results = measure(*only, "--only-new", "--commit", "def")
    assert sorted(results) == sorted(quality.PARTS)
    assert [(one["row"], one["run"]) for one in results["attention"]["found"]] == (
        [("quotas + tail", 0)] * 5 + [("level 1 + tail", 1)] * 5
    )
    assert [run["commit"] for run in results["attention"]["runs"]] == ["abc", "def"]
    assert all(0 < one["density"] <= 1 for one in results["attention"]["found"])

    def shifted(noise, shift):
        return shift * noise / (1 + (shift - 1) * noise)

    noise = {one["circumstances"]: one["noise"] for one in results["limits"]["found"]}
    # The second of two steps is at the least noise, 1/1000, which the schedule shifts twice.
    expected = {name: shifted(shifted(0.001, shift), shift) for name, shift in (("few", 6.0), ("calm", 3.0))}
    assert noise == pytest.approx(expected, rel=1e-4)
    before = path.read_text()
    capsys.readouterr()
    measure(*only, "--only-new", "--commit", "ghi")
    assert path.read_text() == before
    said = capsys.readouterr().err.splitlines()
    assert said == [f"{part}: the file has every point of these rows" for part in quality.PARTS]
    names = ("spread", *quality.PARTS)
    page = "".join(f"<!-- {name} -->\nold\n<!-- /{name} -->\n" for name in names)
    filled = fill(page, parts_of_page(results, ROWS))
    assert "old" not in filled
    assert filled.count("| level 1 + tail |") == 5 + 1 + 5
    assert "Commits: abc (50% of the numbers), def (50% of the numbers)." in filled
    for draw, name in ((plot_quality.draw_attention, "attention"), (plot_quality.draw_fields, "fields")):
        ElementTree.fromstring(draw(results[name], ROWS))


def test_time_becomes_density_and_density_an_error():
    names = (quality_equal_time.CURVE, *quality_equal_time.ORDERED.values())
    orders = "\n".join(f"| {name} | {ms} |" for name, ms in zip(names, (0.3, 3.01, 1.01), strict=True))
    more, less = quality_equal_time.OF_DENSITY
    attention = f"| what | density | call |\n|---|---|---|\n| {more} | 0.16 | 11 |\n| {less} | 0.06 | 5 |"
    assert quality_equal_time.order_milliseconds(orders) == pytest.approx({"semantic": 3.0, "hybrid": 1.0})
    assert quality_equal_time.density_milliseconds(attention) == pytest.approx(60.0)
    # error = 0.02 / density, a straight line with both axes logarithmic
    points = [(0.4, 0.05), (0.1, 0.2)]
    assert quality_equal_time.error_at(0.2, points) == pytest.approx(0.1)
    with pytest.raises(ValueError, match="density must lie within"):
        quality_equal_time.error_at(0.5, points)
    with pytest.raises(ValueError, match="must have a table's row 'what'"):
        quality_equal_time.density_milliseconds(orders)


def test_a_page_without_markers_is_refused():
    with pytest.raises(ValueError, match="must have <!-- spread -->"):
        fill("no markers", {"spread": "text"})


@pytest.fixture(scope="module")
def committed():
    return plot_quality.merged(sorted((ROOT / "benchmarks/results").glob("quality_*.json")))


@pytest.fixture(scope="module")
def prose():
    """What the page says of its tables, in one line."""
    page = (ROOT / "docs/quality.md").read_text(encoding="utf-8")
    return " ".join(page[page.index("## What wins") : page.index("## How concentrated")].split())


def test_limits_give_the_density_of_each_policy():
    def one(row, density, psnr):
        return {"circumstances": "x", "noise": 0.5, "row": row, "point": 0, "density": density, "psnr": [psnr]}

    found = [one("the paper's quotas", 0.168, 20.0), one("k-d tree", 0.159, 25.0)]
    *_, line = limits_table({"found": found}, ROWS).splitlines()
    assert line == "| x | 0.500 | 0.168 / 0.159 | 20.00 | 25.00 | +5.00 |"


def test_the_page_says_of_orders_by_cluster_what_its_table_does(committed, prose):
    lines = plot_quality.texts_of(committed)["equal-time"].splitlines()[2:]
    pairs = [tuple(map(float, pair)) for line in lines for pair in re.findall(r"([\d.]+) / ([\d.]+)", line)]
    assert len(pairs) == 4 * 9
    assert all(cluster > curve for cluster, curve in pairs)
    assert "behind the curve on the tiny model and in every field" in prose
    closest = min(pairs, key=lambda pair: pair[0] / pair[1])
    assert f"({closest[0]:.3f} against {closest[1]:.3f})" in prose


@pytest.mark.parametrize(("part", "value", "sign"), [("attention", "errors", -1), ("videos", "psnr", 1)])
def test_the_page_says_of_the_best_policies_what_its_tables_do(part, value, sign, committed, prose):
    policies = {row.name for row in ROWS if row.section == FRONTIER} - {"everything at level 1"}
    points = {}
    for one in committed[part]["found"]:
        if one["row"] in policies:
            # Of errors the geometric mean, as in the table; more is better.
            mean = interval([math.log(x) for x in one[value]] if value == "errors" else one[value])[0]
            points[one["row"], one["density"]] = sign * mean
    tree = {density: mean for (row, density), mean in points.items() if row == "k-d tree"}
    others = {at: mean for at, mean in points.items() if at[0] != "k-d tree"}
    assert "ahead of every other policy at every density" in prose
    for most, mean in tree.items():
        assert mean > max(other for (_, spent), other in others.items() if spent <= most)
    assert "`budget + tail` is the best policy but for the tree" in prose
    for at in (0.3, 0.45):
        rivals = [mean for (row, spent), mean in others.items() if row != "budget + tail" and spent < at + 0.02]
        mine = [mean for (row, spent), mean in others.items() if row == "budget + tail" and round(spent, 2) == at]
        assert mine > [max(rivals)]


def test_the_page_says_of_other_circumstances_what_its_table_does(committed, prose):
    found = {(one["circumstances"], one["row"]): one["psnr"] for one in committed["limits"]["found"]}
    gains = {
        there: interval([a - b for a, b in zip(psnr, found[there, "the paper's quotas"], strict=True)])[0]
        for (there, row), psnr in found.items()
        if row == "k-d tree"
    }
    assert f"the tree stays {min(gains.values()):.1f} to {max(gains.values()):.1f} dB ahead" in prose
    assert max(gains, key=gains.get) == "cubes 4x4x4"
    assert sorted(gains, key=gains.get)[:2] == ["blocks of 32", "no guidance"]


def test_the_page_and_plots_are_those_of_the_committed_numbers(committed):
    results = committed
    page = (ROOT / "docs/quality.md").read_text(encoding="utf-8")
    assert fill(page, plot_quality.texts_of(results)) == page
    for name, draw in plot_quality.DRAW.items():
        drawn = (ROOT / f"docs/quality-{name}.svg").read_text(encoding="utf-8")
        ElementTree.fromstring(drawn)
        assert draw(results[name], ROWS) == drawn
        assert f"quality-{name}.svg" in page
