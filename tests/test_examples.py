"""The examples run in their tiny form."""

import importlib.util
import json
import math
import runpy
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from psa_integrations.tiny_wan import train

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


def entries(text: str) -> tuple[list[dict[str, float]], dict[str, list[str]]]:
    """The log's lines in what a run printed, and its table's rows by name."""
    lines = text.splitlines()
    log = [json.loads(line) for line in lines if line.startswith("{")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    return log, {name: rest for name, *rest in cells}


@pytest.fixture
def no_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checks at the end alone, however slow the machine is."""
    monkeypatch.setattr(train, "SMOKE", replace(train.SMOKE, check_seconds=math.inf))


def run_twice(example: str, out: Path, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """What a training example prints when it runs to step 20, and when it is resumed and goes on to step 40."""
    main = runpy.run_path(str(EXAMPLES / example))["main"]
    arguments = ["--smoke", "--device", "cpu", "--out", str(out), "--total-minutes", "600"]
    printed = []
    for more in (["--max-steps", "20"], ["--max-steps", "40", "--resume"]):
        main([*arguments, *more])
        printed.append(capsys.readouterr().out)
    with pytest.raises(SystemExit):
        main(arguments)
    assert "pass --resume" in capsys.readouterr().err
    return printed


@pytest.mark.usefixtures("no_clock")
def test_fine_tuning_goes_on_where_it_stopped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    printed = run_twice("finetune_tiny_wan.py", tmp_path, capsys)
    (first_log, first), (second_log, second) = map(entries, printed)
    assert [first_log[-1]["step"], second_log[0]["step"], second_log[-1]["step"]] == [20, 22, 40]
    shipped = ["as shipped, dense", "as shipped, sparse"]
    head, *rows = second
    assert rows == [*shipped, "after 40 steps, sparse"]
    assert [first[name] for name in shipped] == [second[name] for name in shipped]

    columns = {name: dict(zip(second[head], cells, strict=True)) for name, cells in second.items()}
    dense, sparse, trained = (columns[row] for row in rows)
    assert dense["density"] == "1.000"
    assert trained["density"] == sparse["density"] < "0.6"
    assert (dense["PSNR"], dense["SSIM"]) == ("", "")
    for loss in ("val_low", "val_high"):
        assert float(trained[loss]) < float(sparse[loss])
    assert (tmp_path / "weights" / "transformer").is_dir()
    assert len(json.loads((tmp_path / "evaluation.json").read_text())["rows"]) == 3


@pytest.mark.usefixtures("no_clock")
def test_distillation_learns_and_goes_on_where_it_stopped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    printed = run_twice("distill_tiny_wan.py", tmp_path, capsys)
    (first_log, first), (second_log, second) = map(entries, printed)
    assert [first_log[-1]["step"], second_log[0]["step"], second_log[-1]["step"]] == [20, 22, 40]
    for step in range(1, 5):
        assert second_log[-1][f"loss_{step}"] < first_log[-1][f"loss_{step}"]

    head, *rows = second
    assert rows[:3] == list(first)[1:4] == ["teacher, dense", "as shipped, dense", "as shipped, sparse"]
    assert [first[name] for name in rows[:3]] == [second[name] for name in rows[:3]]
    columns = {name: dict(zip(second[head], cells, strict=True)) for name, cells in second.items()}
    assert [columns[row]["forwards"] for row in rows] == ["14", "8", "8", "4", "4"]
    student, undistilled = columns["student after 40 steps, sparse"], columns["as shipped, sparse"]
    assert student["density"] == undistilled["density"] < "0.6"
    assert float(student["PSNR"]) > float(undistilled["PSNR"])
    assert (tmp_path / "weights" / "transformer").is_dir()
    assert len(json.loads((tmp_path / "evaluation.json").read_text())["rows"]) == 5
