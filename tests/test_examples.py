"""The examples run."""

import json
import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_fine_tuning_goes_on_where_it_stopped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main = runpy.run_path(str(EXAMPLES / "finetune_tiny_wan.py"))["main"]
    arguments = ["--smoke", "--device", "cpu", "--out", str(tmp_path)]
    lines = []
    for more in (["--max-steps", "20"], ["--max-steps", "40", "--resume"]):
        main([*arguments, *more])
        lines.append([json.loads(line) for line in capsys.readouterr().out.splitlines()])
    first, second = lines
    assert first[:2] == second[:2]
    assert [x["what"] for x in second[:2]] == ["dense, as shipped", "sparse, training-free"]
    assert first[-1]["what"] == "sparse, after 20 steps"
    assert second[-1]["what"] == "sparse, after 40 steps"
    assert second[0]["density"] == 1.0
    assert second[-1]["density"] == second[1]["density"] < 0.6
    assert second[-1]["val_low"] < second[1]["val_low"]
    assert second[-1]["val_high"] < second[1]["val_high"]
    assert (tmp_path / "weights" / "transformer").is_dir()
