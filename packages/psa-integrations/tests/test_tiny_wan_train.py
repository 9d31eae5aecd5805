"""Training: a resumed run is the same run, and what it exports loads and samples."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from psa_integrations.tiny_wan import evaluate, load_pipeline, train
from psa_integrations.tiny_wan.train import SMOKE, Trainer

CPU = torch.device("cpu")


def assert_same_state(left: object, right: object) -> None:
    if isinstance(left, dict):
        assert isinstance(right, dict)
        assert left.keys() == right.keys()
        for key in left:
            assert_same_state(left[key], right[key])
    elif isinstance(left, list):
        assert isinstance(right, list)
        for a, b in zip(left, right, strict=True):
            assert_same_state(a, b)
    elif isinstance(left, torch.Tensor):
        assert isinstance(right, torch.Tensor)
        assert torch.equal(left, right)
    else:
        assert left == right


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path) -> None:
    progress = [0.0, 0.1, 0.3, 0.5, 0.7, 0.9]
    whole = Trainer(SMOKE, CPU)
    losses = [float(whole.step(p)) for p in progress]

    first = Trainer(SMOKE, CPU)
    halves = [float(first.step(p)) for p in progress[:3]]
    train.save_checkpoint(first, tmp_path / "checkpoint.pt")
    second = Trainer(SMOKE, CPU, seed=7)
    second.load_state_dict(torch.load(tmp_path / "checkpoint.pt", weights_only=True))
    halves += [float(second.step(p)) for p in progress[3:]]

    assert halves == losses
    assert_same_state(second.state_dict(), whole.state_dict())


def test_the_rate_warms_up_and_falls_to_zero() -> None:
    trainer = Trainer(SMOKE, CPU)

    def rate(progress: float) -> float:
        trainer.step(progress)
        return float(trainer.optimizer.param_groups[0]["lr"])

    assert rate(0.0) == pytest.approx(SMOKE.peak_rate / SMOKE.warmup_steps)
    assert rate(0.0) == pytest.approx(SMOKE.peak_rate)
    assert rate(0.5) == pytest.approx(SMOKE.peak_rate / 2)
    assert rate(1.0) == 0.0


def test_training_lowers_the_validation_loss() -> None:
    trainer = Trainer(SMOKE, CPU)
    before = trainer.validate()
    assert trainer.validate() == before
    for _ in range(60):
        trainer.step(0.1)
    after = trainer.validate()
    assert after["val_high"] < before["val_high"]
    assert after["val_low"] < before["val_low"]


def test_noise_levels_follow_the_scheduler() -> None:
    scheduler = Trainer(SMOKE, CPU).pipeline().scheduler
    times = torch.linspace(1, 1000, 1000).flip(0) / 1000
    torch.testing.assert_close(train.shifted(times), scheduler.sigmas[:1000])


@pytest.mark.parametrize(("seconds", "checked"), [(math.inf, [2]), (-1.0, [1, 2, 2])], ids=["never due", "always due"])
def test_checks_come_when_their_time_has_passed_and_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float, checked: list[int]
) -> None:
    monkeypatch.setattr(train, "SMOKE", replace(SMOKE, check_seconds=seconds))
    assert train.main(["--out", str(tmp_path), "--smoke", "--device", "cpu", "--max-steps", "2"]) == 0
    entries = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in entries if "val_high" in entry] == checked


def test_the_command_trains_resumes_exports_and_is_judged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(train, "SMOKE", replace(SMOKE, check_seconds=math.inf))  # whatever the machine's speed
    out = tmp_path / "run"
    arguments = ["--out", str(out), "--smoke", "--device", "cpu"]
    assert train.main([*arguments, "--max-steps", "4"]) == 0
    assert train.main([*arguments, "--max-steps", "6", "--resume"]) == 0
    entries = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in entries if "val_high" in entry] == [4, 6]
    assert not list(out.glob("*.partial"))

    with pytest.raises(SystemExit):
        train.main(arguments)
    assert "pass --resume" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        train.main(["--out", str(tmp_path / "none"), "--smoke", "--resume"])
    assert "--resume needs the checkpoint of an earlier run" in capsys.readouterr().err

    loaded = load_pipeline(folder=out / "weights")
    assert loaded.transformer.config.num_layers == SMOKE.transformer["num_layers"]

    table, sheet = tmp_path / "table.md", tmp_path / "sheet.png"
    judge = ["--weights", str(out / "weights"), "--device", "cpu", "--size", "4x16x16", "--steps", "1"]
    assert evaluate.main([*judge, "--prompts", "3", "--out", str(table), "--sheet", str(sheet)]) == 0
    assert "Of 3 samples" in table.read_text()
    assert table.read_text().count("| a ") == 3
    assert sheet.stat().st_size > 0


def test_a_size_must_be_three_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        evaluate.main(["--size", "64x64"])
    assert "must be FRAMESxHEIGHTxWIDTH" in capsys.readouterr().err
