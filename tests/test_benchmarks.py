"""The benchmarks that have a tiny form run in it, and write the tables that they print."""

import importlib
import json
import re
import subprocess
from pathlib import Path

import gpu_backward
import gpu_lengths
import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.parametrize(("name", "rows", "sparse_rows"), [("gpu_prefill", 4, 4), ("dit_forward", 8, 6)])
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


@pytest.mark.skipif(torch.cuda.is_available(), reason="measures there")
def test_what_fails_in_the_process_is_its_last_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_backward.report_fastvideo("C") == 1
    assert re.match(r"\w+Error: ", capsys.readouterr().out.splitlines()[-1])
