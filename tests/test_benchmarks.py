"""The benchmarks that have a tiny form run in it, and write the tables that they print."""

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import gpu_backward
import gpu_lengths
import gpu_prefill
import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.parametrize(("name", "rows", "sparse_rows"), [("gpu_prefill", 4, 4), ("dit_forward", 45, 36)])
def test_tiny(
    name: str,
    rows: int,
    sparse_rows: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    benchmark = importlib.import_module(name)
    written = tmp_path / "table.md"
    benchmark.main(["--tiny", "--out", str(written)])
    table = written.read_text()
    assert table.strip() == capsys.readouterr().out.strip()
    found = re.findall(r"^\| [^|]+ \| (\d\.\d{3}) \|", table, re.MULTILINE)
    assert len(found) == rows
    sparse = [float(density) for density in found if density != "1.000"]
    assert len(sparse) == sparse_rows
    assert all(0 < density < 1 for density in sparse)


def test_half_blocks_are_the_same_tokens() -> None:
    levels = (torch.rand(1, 2, 5, 5, generator=torch.Generator().manual_seed(0)) < 0.5).to(torch.int8)
    levels[:, :, :, 0] = 1
    count, indices = levels.sum(dim=-1, dtype=torch.int32), levels.argsort(dim=-1, descending=True, stable=True).int()
    halves, counts, sizes = gpu_lengths.half_blocks(count, indices, length=4 * 128 + 70)
    assert sizes.tolist() == [64] * 9 + [6]
    expected = levels.repeat_interleave(2, dim=-1).repeat_interleave(2, dim=-2)
    for head in range(2):
        for row in range(10):
            read = halves[0, head, row, : counts[0, head, row]]
            assert sorted(read.tolist()) == expected[0, head, row].nonzero()[:, 0].tolist()


@pytest.mark.parametrize(
    ("child", "expected"),
    [
        (
            subprocess.CompletedProcess([], 0, json.dumps({"density": 0.15, "forward": 1, "both": 4, "extra": 0.5})),
            "| 0.150 | 1.00 | 4.00 | 2.00 | 1.00 | 0.50 |",
        ),
        (
            subprocess.CompletedProcess([], 1, "ImportError: no a|b\n"),
            "| not measured: ImportError: no a/b | | | | | |",
        ),
        (subprocess.CompletedProcess([], -11, ""), "| not measured: its process ended with code -11 | | | | | |"),
        (subprocess.TimeoutExpired("x", 1), "| not measured: its process took more than 120 s | | | | | |"),
    ],
    ids=["measured", "an error", "a crash", "too long"],
)
def test_another_kernel_that_fails_becomes_a_remark(
    child: object, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(*_: object, **__: object) -> object:
        if isinstance(child, Exception):
            raise child
        return child

    monkeypatch.setattr(subprocess, "run", run)
    row = gpu_backward.fastvideo_row("W", {"FlashAttention-2": 8.0, "cuDNN": 4.0})
    assert row == f"| {gpu_backward.FASTVIDEO} {expected}"
    assert row.count("|") == 8


def test_what_fails_in_the_process_is_its_last_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def measure(shape: object) -> None:
        raise ImportError("no kernel for this card")

    monkeypatch.setattr(gpu_backward, "measure_fastvideo", measure)
    assert gpu_backward.report_fastvideo("C") == 1
    assert re.match(r"\w+Error: ", capsys.readouterr().out.splitlines()[-1])


def test_forwards_of_several_runs_make_one_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    benchmark = importlib.import_module("dit_forward")
    kept = ["--json", str(tmp_path / "runs.json")]
    benchmark.main(["--tiny", "--models", "ltx-video,wan2.2-5b", "--commit", "1234567", *kept])
    monkeypatch.setattr(benchmark, "LONG", 0)  # each dense forward takes too long for a second one
    benchmark.main(["--tiny", "--models", "wan2.2-5b", "--commit", "89abcde", *kept])
    capsys.readouterr()
    benchmark.main(["--models", "none", *kept])
    page = capsys.readouterr().out
    assert re.findall(r"^## ([^:]+):.*\n\n(Run \d)", page, re.MULTILINE) == [
        ("wan2.2-5b", "Run 2"),
        ("ltx-video", "Run 1"),
    ]
    long, short = page.split("## ltx-video")
    assert (long.count(", the first |"), short.count(", the first |")) == (1, 0)
    assert re.search(r"^1\. A CPU.*commit 1234567: `.* --tiny --models ltx-video,wan2.2-5b`$", page, re.MULTILINE)
    assert re.search(r"^2\. A CPU.*commit 89abcde: `.* --tiny --models wan2.2-5b`$", page, re.MULTILINE)
    with pytest.raises(SystemExit):
        benchmark.main(["--models", "wan2.2-5b,wan3"])
    assert "must be none or some of wan2.1-1.3b,cogvideox-5b" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["0", "-3", "1.5", "x", "\u0664"])
def test_a_count_that_is_none_is_wrong_usage(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        gpu_prefill.main(["--tiny", f"--length={text}"])
    assert exit_.value.code == 2
    assert f"argument --length: must be a whole number of at least 1, got {text}" in capsys.readouterr().err


def test_two_processes_make_the_table_of_one_forward(tmp_path: Path) -> None:
    written = tmp_path / "table.md"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    script = [str(BENCHMARKS / "dit_parallel.py"), "--tiny", "--commit", "1234567", "--out", str(written)]
    ran = subprocess.run([*torchrun, *script], capture_output=True, text=True, timeout=200, check=False)
    assert ran.returncode == 0, ran.stderr
    table = written.read_text()
    assert table in ran.stdout
    assert "768 tokens" in table
    rows = re.findall(r"^\| ([^|]+) \| \d+ \| \d+ \| [\d.]+x \| [\d.]+x \| (\S+) \|$", table, re.MULTILINE)
    assert [name for name, _ in rows] == [
        "dense",
        "psa_balanced with quotas .10/.05/0/.20",
        "the same, 16 samples a block",
        "psa_quality",
        "psa_fast",
    ]
    assert all(float(difference) < 1e-5 for _, difference in rows)
