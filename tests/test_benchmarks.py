"""The benchmarks that have a tiny form run in it, and write the tables that they print."""

import importlib
import re
from pathlib import Path

import pytest

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
