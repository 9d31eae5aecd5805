"""`psa tune` on an untrained tiny model: what it measures, prints and writes, and what it refuses."""

import re
from pathlib import Path

import pytest

from psa_config import PyramidSparseAttention, load_presets
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
    assert len(errors) == 8
    # Videos are made with the two of least error, in that order.
    assert [errors[name] for name in decibels] == sorted(errors.values())[:2]
    assert all(float(density) <= 0.4 for density in re.findall(r"density ([\d.]+)\n", printed))

    attention = load_presets(out).get("tiny-wan").attention
    assert isinstance(attention, PyramidSparseAttention)
    assert (attention.mask_mode, attention.density, attention.warmup_steps) == ("budget", 0.4, 5)
    best = max(decibels, key=lambda name: decibels[name])
    assert f"PSNR {decibels[best]:.2f} dB" in attention.description
    assert f"attention error {errors[best]:.4f}" in attention.description
    assert best.startswith(attention.rearrange_method)
    assert f"skip {attention.skip}, {attention.importance_reduction}, per {attention.budget_per}" in best

    video = tmp_path / "video.mp4"
    command = ["generate", "--prompt", "a red circle moving right", "--presets", str(out), "--out", str(video)]
    assert main([*command, "--weights", weights, *SIZE]) == 0
    assert video.is_file()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--target-density", "0.01"], r"--target-density must be above 0.015625, .* and below 1, got 0.01"),
        (["--target-density", "1"], r"--target-density must be above .* got 1"),
        (["--out", "preset.mp4"], r"--out must be a .yaml file in a folder that exists, got preset.mp4"),
        (["--prompts", "nowhere.txt"], r"--prompts must be a file that can be read, got nowhere.txt: No such file .*"),
        (["--steps", "5"], r"--steps must be above the dense steps of tiny-wan/psa_quality.* got 5"),
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


def test_refuses_an_empty_file_of_prompts(prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts.write_text("\n \n")
    assert tune("no such weights", prompts, tmp_path / "mine.yaml") == 1
    assert "--prompts must hold a prompt a line" in capsys.readouterr().err
