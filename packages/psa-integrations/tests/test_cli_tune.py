"""`psa tune` on an untrained tiny model: what it measures, prints and writes, and what it refuses."""

import json
import re
from pathlib import Path

import pytest

from psa_config import PyramidSparseAttention, load_presets
from psa_config.files import write_new
from psa_integrations.cli import main
from psa_integrations.tiny_wan import build_random_pipeline

SIZE = ["--frames", "8", "--width", "32", "--height", "32", "--steps", "8", "--quiet"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("weights")
    build_random_pipeline(num_attention_heads=1, num_layers=1, ffn_dim=32).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("a red circle moving right\n\n a blue square moving up \n")
    return path


def tune(weights: str, prompts: Path, out: Path, *more: str) -> int:
    files = ["--prompts", str(prompts), "--out", str(out), "--weights", weights]
    return main(["tune", "--target-density", "0.4", *files, *SIZE, *more])


def test_writes_the_best_of_what_it_measured(
    weights: str, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "mine.yaml"
    assert tune(weights, prompts, out) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.yaml", "prompts.txt"]
    printed = capsys.readouterr().out
    errors = {name: float(error) for name, error in re.findall(r"(.*): attention error ([\d.]+), density", printed)}
    decibels = {name: float(psnr) for name, psnr in re.findall(r"(.*): PSNR ([\d.]+) dB$", printed, re.MULTILINE)}
    assert len(errors) == 9
    # Videos are made with the two of least error, in that order.
    assert [errors[name] for name in decibels] == sorted(errors.values())[:2]
    densities = re.findall(r"density ([\d.]+)$", printed, re.MULTILINE)
    assert len(densities) == 9
    assert all(float(density) <= 0.4 for density in densities)

    attention = load_presets(out).get("tiny-wan").attention
    assert isinstance(attention, PyramidSparseAttention)
    assert attention.warmup_steps == 5
    assert (attention.mask_mode, attention.density) in (("budget", 0.4), ("topk", None))
    best = max(decibels, key=lambda name: decibels[name])
    assert f"PSNR {decibels[best]:.2f} dB" in attention.description
    assert f"attention error {errors[best]:.4f}" in attention.description
    assert best.startswith(attention.rearrange_method)
    assert f", skip {attention.skip}, {attention.importance_reduction}, " in best
    assert (attention.rearrange_method == "KdTree") == (", quotas " in best) == (attention.mask_mode == "topk")

    video = tmp_path / "video.mp4"
    command = ["generate", "--prompt", "a red circle moving right", "--presets", str(out), "--out", str(video)]
    assert main([*command, "--weights", weights, *SIZE]) == 0
    assert video.is_file()


def test_json_has_the_figures_as_numbers(
    weights: str, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts.write_text("a red ring\n")
    out = tmp_path / "mine.yaml"
    assert tune(weights, prompts, out, "--json", "--videos", "1", "--frames", "4", "--steps", "6") == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["out"], report["preset"]) == (str(out), "tiny-wan/tuned")
    assert (report["target_density"], report["steps"], report["prompts"]) == (0.4, 6, ["a red ring"])
    assert len(report["candidates"]) == 9
    best = report["candidates"][0]
    assert {name: report[name] for name in best} == best
    assert list(best) == ["policy", "density", "attention_error", "psnr"]
    assert all("psnr" not in candidate for candidate in report["candidates"][1:])
    errors = [candidate["attention_error"] for candidate in report["candidates"]]
    assert errors == sorted(errors)
    figures = (
        f"density {best['density']:.4f}, attention error {best['attention_error']:.4f}, PSNR {best['psnr']:.2f} dB"
    )
    assert figures in report["description"]


@pytest.mark.parametrize("density", [0.2, 0.7])
def test_the_quotas_of_the_shipped_preset_are_scaled_to_the_density(
    density: float, weights: str, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts.write_text("a red ring\n")
    out = tmp_path / "mine.yaml"
    monkeypatch.setattr("psa_integrations.cli.tune._POLICIES", ())  # the quotas alone are tried, and so written
    assert tune(weights, prompts, out, "--target-density", str(density), "--steps", "6") == 0
    attention = load_presets(out).get("tiny-wan").attention
    assert isinstance(attention, PyramidSparseAttention)
    assert (attention.rearrange_method, attention.mask_mode, attention.skip) == ("KdTree", "topk", "mean")
    shipped = load_presets().get("tiny-wan", "psa_quality").attention.mask_ratios.bounds
    bounds = attention.mask_ratios.bounds
    factor = bounds[0] / shipped[0]
    # Rounded to four places, and no end beyond all blocks.
    assert bounds == pytest.approx([min(1.0, factor * bound) for bound in shipped], abs=0.002)
    assert 0.8 * density < float(re.search(r"density ([\d.]+)", attention.description)[1]) <= density


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--target-density", "0.01"], r"--target-density must be above 0.015625, .* and below 1, got 0.01"),
        (["--target-density", "1"], r"--target-density must be above .* got 1"),
        (["--out", "preset.mp4"], r"--out must end in .yaml, got preset.mp4"),
        (["--out", "nowhere/a.yaml"], r"--out must lie in a folder that exists, got nowhere/a.yaml"),
        (["--out", "/proc/a.yaml"], r"--out must lie in a folder that can be written, got /proc/a.yaml: .*"),
        (["--prompts", "nowhere.txt"], r"--prompts must be a file that can be read, got nowhere.txt: No such file .*"),
        (["--steps", "5"], r"--steps must be above the dense steps of the presets that are tried.* got 5"),
        (["--width", "34"], r"--width must be a multiple of 4 for tiny-wan, got 34; the nearest are 32 and 36"),
        (["--height", "8"], r"--width and --height must be at least 12 to compare videos"),
    ],
)
def test_refuses_before_any_work(
    more: list[str], message: str, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tune("no such weights", prompts, tmp_path / "mine.yaml", *more) == 1
    assert re.fullmatch(f"psa: error: {message}\n", capsys.readouterr().err)
    assert [path.name for path in tmp_path.iterdir()] == ["prompts.txt"]


def test_a_file_that_is_there_stays(prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "mine.yaml"
    out.write_text("mine")
    message = f"--out must be a file that is not there yet, and {out} is left as it is"
    assert tune("no such weights", prompts, out) == 1
    assert capsys.readouterr().err == f"psa: error: {message}\n"
    with pytest.raises(FileExistsError, match=re.escape(message)):  # made while videos were
        write_new("tuned", out, "--out")
    assert out.read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.yaml", "prompts.txt"]


def test_refuses_an_empty_file_of_prompts(prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts.write_text("\n \n")
    assert tune("no such weights", prompts, tmp_path / "mine.yaml") == 1
    assert "--prompts must hold a prompt a line" in capsys.readouterr().err
