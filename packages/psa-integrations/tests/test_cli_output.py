"""The progress bar, `--json`, `--quiet` and the log."""

import json
import logging
import re
from pathlib import Path

import pytest

from psa_integrations import apply_pyramid_sparse_attention
from psa_integrations.cli import main
from psa_integrations.cli.output import counted, print_json
from psa_integrations.tiny_wan import build_random_pipeline

SIZE = ["--frames", "4", "--width", "32", "--height", "16", "--steps", "7"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("weights")
    build_random_pipeline(num_attention_heads=1, num_layers=1, ffn_dim=32).save_pretrained(folder)
    return str(folder)


def generate(weights: str, out: Path, *more: str) -> int:
    prompt = ["--prompt", "a red circle moving right", "--weights", weights, "--out", str(out)]
    return main(["generate", *prompt, *SIZE, *more])


def test_the_bar_says_step_kind_density_and_time_left(
    weights: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate(weights, tmp_path / "a.mp4", "--preset", "psa_balanced") == 0
    bars = [bar for bar in re.split(r"[\r\n]", capsys.readouterr().err) if "psa_balanced" in bar and "step/s" in bar]
    last = bars[-1]
    assert re.search(r"psa_balanced: 100%.*7/7 \[\d\d:\d\d<\d\d:\d\d, .*, sparse, density 0\.\d{3}\]", last)
    assert not any("sparse" in bar for bar in bars if re.search(r" [0-5]/7 ", bar))


def test_the_demo_has_one_bar(weights: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--weights", weights, "--out", str(tmp_path), *SIZE, "--json"]) == 0
    printed = capsys.readouterr()
    assert re.search(r"psa_quality: 100%.*21/21", printed.err)
    assert re.search(r"baseline: .* 7/21 ", printed.err)
    report = json.loads(printed.out)
    assert [video["preset"] for video in report["videos"]] == ["baseline", "psa_balanced", "psa_quality"]
    assert report["videos"][0]["psnr"] is None
    assert all(0 < video["ssim"] <= 1 for video in report["videos"][1:])
    assert all(Path(video["out"]).is_file() for video in report["videos"])
    assert Path(report["side_by_side"]).is_file()
    assert (report["steps"], report["seed"], report["width"]) == (7, 0, 32)


@pytest.mark.parametrize(
    ("command", "out", "total"),
    [
        (["generate", "--prompt-file"], "a.mp4", 14),
        (["compare", "--prompt-file"], "report", 28),
        (["tune", "--target-density", "0.3", "--videos", "1", "--prompts"], "a.yaml", 28),
    ],
    ids=["generate", "compare", "tune"],
)
def test_every_command_has_one_bar_for_all_its_steps(
    weights: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: list[str], out: str, total: int
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\na blue ring\n")
    assert main([*command, str(prompts), "--weights", weights, *SIZE, "--out", str(tmp_path / out)]) == 0
    printed = capsys.readouterr()
    assert re.findall(r"100%.*?(\d+/\d+)", printed.err)[-1] == f"{total}/{total}"
    assert set(re.findall(r"/(\d+) \[", printed.err)) == {str(total)}
    assert "step/s" not in printed.out


def test_no_bar_where_a_shell_closed_stderr(weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr", None)
    assert generate(weights, tmp_path / "a.mp4") == 0


def test_json_and_quiet(weights: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "a.mp4"
    assert generate(weights, out, "--preset", "psa_balanced", "--json", "--quiet") == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert printed.out.count("\n") == 1
    report = json.loads(printed.out)
    assert report["out"] == str(out)
    assert report["preset"] == "tiny-wan/psa_balanced"
    assert (report["frames"], report["height"], report["width"]) == (4, 16, 32)
    assert report["density_per_step"][:5] == [1.0] * 5
    assert report["density"] == pytest.approx(sum(report["density_per_step"]) / 7)
    assert report["density"] < 1
    assert set(report["versions"]) == {"psa_integrations", "torch", "diffusers", "transformers"}


def test_one_is_not_several() -> None:
    assert [counted(number, "frame") for number in (0, 1, 2, 1024)] == [
        "0 frames",
        "1 frame",
        "2 frames",
        "1,024 frames",
    ]


def test_what_json_cannot_say_is_null(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"a": float("inf"), "b": [float("nan"), 1.5], "c": {"d": (1, None, "x")}})
    assert json.loads(capsys.readouterr().out) == {"a": None, "b": [None, 1.5], "c": {"d": [1, None, "x"]}}


def test_verbose_shows_the_log_and_plain_does_not(
    weights: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate(weights, tmp_path / "a.mp4", "--quiet", "--verbose") == 0
    error = capsys.readouterr().err
    assert "psa_integrations.cli.load: loading tiny-wan onto cpu in torch.float32" in error
    assert "psa_integrations.diffusers.apply: transformer has tiny-wan/psa_balanced" in error
    assert "a.mp4" in error
    assert generate(weights, tmp_path / "a.mp4", "--quiet") == 0
    assert capsys.readouterr().err == ""


def test_the_library_logs_through_logging(caplog: pytest.LogCaptureFixture) -> None:
    pipeline = build_random_pipeline(num_attention_heads=1, num_layers=1, ffn_dim=32)
    with caplog.at_level(logging.INFO, logger="psa_integrations"):
        apply_pyramid_sparse_attention(pipeline, "tiny-wan/psa_balanced").remove()
    assert [record.getMessage() for record in caplog.records] == [
        "transformer has tiny-wan/psa_balanced",
        "transformer is as it was",
    ]


def test_the_library_prints_nothing_of_its_own(capfd: pytest.CaptureFixture[str]) -> None:
    pipeline = build_random_pipeline(num_attention_heads=1, num_layers=1, ffn_dim=32)
    pipeline.set_progress_bar_config(disable=True)
    with apply_pyramid_sparse_attention(pipeline, "tiny-wan/psa_tail"):
        pipeline("a red ring", num_frames=2, height=16, width=16, num_inference_steps=6)
    assert capfd.readouterr() == ("", "")
