"""The examples run in their tiny form."""

import importlib.util
import json
import runpy
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_qwen2_5_vl(capsys: pytest.CaptureFixture[str]) -> None:
    spec = importlib.util.spec_from_file_location("qwen2_5_vl", EXAMPLES / "qwen2_5_vl.py")
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        example.main(["--tiny", "--max-new-tokens", "4"])
    answer, summary = capsys.readouterr().out.splitlines()
    assert 1 <= len(answer.split(",")) <= 4
    assert summary.startswith("2566 tokens of prompt, density of their attention 0.")
    with pytest.raises(SystemExit):
        example.main([])
    assert "a video is needed, or --tiny" in capsys.readouterr().err


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
