"""`psa bench`: what it times, what it concludes, and that it times nothing that is wrong."""

import json
from typing import Any

import pytest
import torch

from psa_integrations.build import find_preset
from psa_integrations.cli import bench, main
from psa_integrations.cli.bench import Row, recommendations, table
from psa_integrations.cli.selftest import OperatorCheck
from psa_integrations.cli.timing import at_length, break_even, measure
from psa_integrations.tiny_wan import build_random_pipeline
from psa_masks import kd_tree_order

SMALL = ["bench", "--device", "cpu", "--lengths", "256", "128", "--heads", "1", "--head-dim", "16", "--repeats", "1"]


@pytest.fixture
def trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves out the operators, which take a second."""
    monkeypatch.setattr(bench, "check_operators", lambda device: [])


@pytest.mark.usefixtures("trusted")
def test_json_has_every_length_and_preset(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    tiny = build_random_pipeline(num_attention_heads=1, num_layers=1, ffn_dim=32)
    monkeypatch.setattr("psa_integrations.tiny_wan.load_pipeline", lambda device, dtype: tiny.to(device, dtype))
    assert main([*SMALL, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["heads"], report["head_dim"], report["dtype"]) == (1, 16, "float32")
    assert [row["tokens"] for row in report["rows"]] == [128, 256]
    for row in report["rows"]:
        assert set(row["dense"]) == {"sdpa"}
        assert set(row["sparse"]) == set(row["density"]) == set(bench.CPU_PRESETS)
        assert all(value > 0 for value in (*row["dense"].values(), *row["sparse"].values()))
        assert all(0 < value <= 1 for value in row["density"].values())
    assert report["forward"]["tokens"] == 4096
    assert 0 < report["forward"]["density"] < 1
    assert report["recommendations"]


@pytest.mark.usefixtures("trusted")
def test_a_table_and_words_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "--no-forward", "--preset", "CogVideo_5b/psa_balanced"]) == 0
    printed = capsys.readouterr().out
    assert "| tokens | sdpa | CogVideo_5b/psa_balanced |" in printed
    assert "\n| 256 | " in printed
    assert "CogVideo_5b/psa_balanced: " in printed


@pytest.mark.usefixtures("trusted")
def test_orders_by_content_are_timed_too(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    seen = []

    def counting(*arguments: Any, **options: Any) -> Any:
        orders = kd_tree_order(*arguments, **options)
        seen.append(orders)
        return orders

    monkeypatch.setattr("psa_integrations.kd_trees.kd_tree_order", counting)
    twice = ["--preset", "tiny-wan/psa_quality"] * 2
    assert main([*SMALL, "--no-forward", *twice]) == 0
    # At each of two lengths once for the density, once before it counts and once timed.
    assert len(seen) == 6
    assert capsys.readouterr().out.count("tiny-wan/psa_quality: ") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "tiny-wan/baseline"], "--preset must be sparse"),
        (["--preset", "psa_balanced"], "preset must name its model"),
        (["--preset", "tiny-wan/none"], 'no preset "none"'),
    ],
)
def test_a_preset_that_cannot_be_timed(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, *arguments]) == 1
    assert message in capsys.readouterr().err


def test_nothing_wrong_is_timed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = OperatorCheck("key_similarity", "torch", "float32", "error 1")
    monkeypatch.setattr(bench, "check_operators", lambda device: [wrong])
    monkeypatch.setattr(bench, "measure", lambda *_: pytest.fail("something was timed"))
    assert main(SMALL) == 1
    assert "key_similarity is wrong on cpu, so nothing is timed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("sparse", "expected"),
    [
        ([1, 1, 1], (None, 10)),
        ([3, 3, 3], (10, 20)),
        ([3, 9, 3], (20, 40)),
        ([1, 9, 3], (20, 40)),
        ([3, 9, 9], (40, None)),
        ([2, 4, 8], (40, None)),
    ],
)
def test_break_even(sparse: list[float], expected: tuple[int | None, int | None]) -> None:
    assert break_even([10, 20, 40], [2, 4, 8], sparse) == expected


@pytest.mark.parametrize("length", [5, 10, 15, 40, 100])
def test_a_power_of_the_length_is_met_exactly(length: int) -> None:
    lengths = [10, 20, 40]
    assert at_length(length, lengths, [3e-6 * n**1.7 for n in lengths]) == pytest.approx(3e-6 * length**1.7)
    assert at_length(length, [10], [1.0]) == pytest.approx((length / 10) ** 2)


def test_recommendations_in_words() -> None:
    preset = find_preset("Wan2.1_1.3b/psa_balanced")
    name = "Wan2.1_1.3b/psa_balanced"
    rows = [
        Row(n, {"cudnn": n**2 * 1e-9, "flash": n**2 * 2e-9}, {name: n * 3e-5}, {name: 0.1})
        for n in (8192, 16384, 32768, 65536)
    ]
    lines = list(recommendations(rows, [preset]))
    assert lines[0] == f"{name}: breaks even between 16,384 and 32,768 tokens."
    assert "  832x480, 49 frames (20,280 tokens): dense is faster, x1.48" in lines
    assert "  1280x720, 69 frames (64,800 tokens): sparse is faster, x2.16" in lines
    assert "  1280x720, 81 frames (75,600 tokens): sparse is faster, x2.52, beyond what was measured" in lines
    assert table(rows).splitlines()[-1] == "| 65536 | 4294.97 | 8589.93 | 1966.08, x2.18 at density 0.100 |"
    slower = [Row(row.tokens, row.dense, {name: 99.0}, row.density) for row in rows]
    assert (
        next(recommendations(slower, [preset])) == f"{name}: dense is faster up to 65,536 tokens, the longest measured."
    )


def test_calls_are_timed_in_turn() -> None:
    seen: list[str] = []
    calls = {name: (lambda name=name: seen.append(name)) for name in "ab"}
    seconds = measure(calls, torch.device("cpu"), 2)
    assert seen == ["a", "b"] * 3
    assert set(seconds) == {"a", "b"}
    assert all(value >= 0 for value in seconds.values())
