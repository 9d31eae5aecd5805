"""The `psa` command on an untrained tiny model: what it writes, what it prints, what it refuses."""

import re
from pathlib import Path
from typing import Any

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import psa_integrations
from psa_config import load_presets
from psa_integrations.cli import build_parser, demo, main
from psa_integrations.cli.load import device_named
from psa_integrations.cli.models import MODELS
from psa_integrations.tiny_wan import build_random_pipeline

SIZE = ["--frames", "4", "--width", "32", "--height", "16", "--steps", "6", "--quiet"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("weights")
    pipeline = build_random_pipeline(num_attention_heads=1, num_layers=1, ffn_dim=32)
    pipeline.save_pretrained(folder)
    return str(folder)


def generate(weights: str, out: Path, *more: str) -> int:
    prompt = ["--prompt", "a red circle moving right"]
    return main(["generate", *prompt, "--weights", weights, "--out", str(out), *SIZE, *more])


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("psa: ")]
    assert len(lines) == 1
    return lines[0]


def test_generate_writes_a_video_and_says_so(weights: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "video.mp4"
    assert generate(weights, out, "--preset", "psa_tail") == 0
    assert [path.name for path in tmp_path.iterdir()] == ["video.mp4"]
    assert iio.imread(out).shape == (4, 16, 32, 3)
    printed = capsys.readouterr().out
    match = re.fullmatch(r".*video\.mp4: 4 frames of 32x16, tiny-wan/psa_tail, [\d.]+ s, density ([\d.]+)\n", printed)
    assert match is not None
    assert 0 < float(match[1]) <= 1


def test_the_seed_decides(weights: str, tmp_path: Path) -> None:
    for name, seed in (("first", "1"), ("same", "1"), ("other", "2")):
        assert generate(weights, tmp_path / f"{name}.mp4", "--seed", seed, "--preset", "baseline") == 0
    first, same, other = (iio.imread(tmp_path / f"{name}.mp4") for name in ("first", "same", "other"))
    assert np.array_equal(first, same)
    assert not np.array_equal(first, other)


def test_the_progress_bar_counts_steps(weights: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["generate", "--prompt", "a ring", "--weights", weights, "--out", str(tmp_path / "a.mp4")]
    size = [word for word in SIZE if word != "--quiet"]
    assert main([*arguments, *size, "--preset", "baseline"]) == 0
    assert re.search(r"baseline: 100%.*6/6", capsys.readouterr().err)
    assert main([*arguments, *SIZE]) == 0
    assert "6/6" not in capsys.readouterr().err


def test_a_lora_changes_the_video(weights: str, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    name = "transformer.blocks.0.attn1.to_q"
    lora = {
        f"{name}.lora_A.weight": torch.randn((2, 64), generator=generator),
        f"{name}.lora_B.weight": torch.randn((64, 2), generator=generator),
    }
    save_file(lora, tmp_path / "lora.safetensors")
    plain, file, folder = (tmp_path / f"{name}.mp4" for name in ("plain", "file", "folder"))
    assert generate(weights, plain) == 0
    assert generate(weights, file, "--lora", str(tmp_path / "lora.safetensors")) == 0
    assert generate(weights, folder, "--lora", str(tmp_path)) == 0
    assert np.array_equal(iio.imread(file), iio.imread(folder))
    assert not np.array_equal(iio.imread(plain), iio.imread(file))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", "a red elephant"], "'elephant'"),
        (["--preset", "psa_balancd"], 'no preset "psa_balancd"'),
        (["--width", "30"], "--width must be a multiple of 4 for tiny-wan, got 30; the nearest are 28 and 32"),
        (["--height", "3"], "--height must be a multiple of 4 for tiny-wan, got 3; the least is 4"),
        (
            ["--model", "cogvideox-5b", "--width", "728", "--height", "480", "--steps", "50", "--weights", "nowhere"],
            "--width must be a multiple of 16 for CogVideo_5b, got 728; the nearest are 720 and 736",
        ),
        (["--out", "video.gif"], "--out must end in .mp4, got video.gif"),
        (["--out", "nowhere/video.mp4"], "--out must lie in a folder that exists"),
        (["--lora", "nothing.safetensors"], "--lora must be a .safetensors file"),
        (["--lora", "."], "--lora must hold a .safetensors file"),
        (["--weights", "nowhere"], "no tiny-wan weights"),
        (
            ["--model", "wan2.1-1.3b", "--preset", "baseline", "--weights", "nowhere"],
            "--weights must be a folder with a model_index.json",
        ),
        (["--steps", "5", "--preset", "psa_tail"], "tiny-wan/psa_tail, warmup_steps 5 and cooldown_steps 0, got 5"),
        *(
            (["--device", name], "--device must be one that torch sees, cpu")
            for name in ("abacus", "", "cuda:99", "cuda:200", "cuda:256", "xpu:99", "mps:99", "meta", "cpu:1")
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_an_error_is_one_line_and_leaves_nothing(
    weights: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert generate(weights, Path("video.mp4"), *arguments) == 1
    assert message in error_line(capsys)
    assert not list(tmp_path.iterdir())


def test_devices_are_those_that_torch_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    for name in ("cpu", "cpu:0", "cuda", "cuda:0", "cuda:1"):
        assert device_named(name) == torch.device(name)
    for name in ("cuda:2", "cuda:256", "xpu"):
        with pytest.raises(ValueError, match=f"must be one that torch sees, cpu or cuda:0 or cuda:1, got {name}"):
            device_named(name)


@pytest.mark.parametrize("content", [b"no safetensors", None], ids=["damaged", "half of a pair"])
def test_a_file_that_is_no_lora_is_named(
    weights: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes | None
) -> None:
    lora = tmp_path / "lora.safetensors"
    if content is None:
        save_file({"transformer.blocks.0.attn1.to_q.lora_A.weight": torch.ones(2, 64)}, lora)
    else:
        lora.write_bytes(content)
    assert generate(weights, tmp_path / "video.mp4", "--lora", str(lora)) == 1
    assert f"--lora must be a LoRA of this model in safetensors, and {lora} is not" in error_line(capsys)


def test_weights_that_cannot_be_downloaded_are_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise OSError("Cannot load model: offline")

    monkeypatch.setattr("diffusers.DiffusionPipeline.from_pretrained", unreachable)
    arguments = ["generate", "--model", "wan2.2-a14b", "--prompt", "a cat", "--out", str(tmp_path / "a.mp4")]
    assert main(arguments) == 1
    line = error_line(capsys)
    assert "wan2.2-a14b (Wan-AI/Wan2.2-T2V-A14B-Diffusers)" in line
    assert "--weights FOLDER" in line


def test_a_failed_write_leaves_nothing(
    weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def half_written(frames: object, path: str, **_: object) -> None:
        Path(path).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("diffusers.utils.export_to_video", half_written)
    out = tmp_path / "video.mp4"
    assert generate(weights, out) == 1
    assert re.fullmatch(
        rf"psa: error: {out} was not written: disk full; its disk has [\d,]+ bytes free", error_line(capsys)
    )
    assert not list(tmp_path.iterdir())


def test_an_interrupt_is_no_traceback(
    weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("psa_integrations.cli.generate.sample", interrupt)
    assert generate(weights, tmp_path / "video.mp4") == 130
    assert error_line(capsys) == "psa: interrupted"


@pytest.mark.parametrize("arguments", [[], ["generate"], ["generate", "--prompt", "a", "--frames", "0"]], ids=str)
def test_wrong_usage_exits_with_two(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2


@pytest.mark.parametrize(
    ("option", "value", "rule"),
    [
        ("--width", "abc", "must be a whole number, got 'abc'"),
        ("--frames", "1.5", "must be a whole number, got '1.5'"),
        ("--frames", "0", "must be at least 1, got 0"),
        ("--frames", "9" * 26, f"must be at most 2147483647, got {'9' * 26}"),
        ("--fps", "1001", "must be at most 1000, got 1001"),
        ("--seed", "", "must be a whole number, got ''"),
        ("--guidance", "high", "must be a number, got 'high'"),
        ("--guidance", "nan", "must be finite, got nan"),
        ("--guidance", "inf", "must be finite, got inf"),
        ("--seed", str(2**64), f"must fit 64 bits, got {2**64}"),
        ("--seed", str(-(2**63) - 1), f"must fit 64 bits, got {-(2**63) - 1}"),
    ],
)
@pytest.mark.parametrize("command", [["generate", "--prompt", "a ring"], ["demo"]], ids=["generate", "demo"])
def test_numbers_out_of_range_are_named(
    command: list[str], option: str, value: str, rule: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        build_parser().parse_args([*command, option, value])
    assert exit_.value.code == 2
    assert f"argument {option}: {rule}" in capsys.readouterr().err


@pytest.mark.parametrize("seed", [2**64 - 1, -(2**63)])
def test_the_outermost_seeds_work(weights: str, tmp_path: Path, seed: int) -> None:
    assert generate(weights, tmp_path / "a.mp4", "--preset", "baseline", "--steps", "1", "--seed", str(seed)) == 0


def test_every_model_has_presets_and_documented_defaults() -> None:
    book = load_presets()
    no_video = {"Qwen2.5-VL_7b"}
    assert sorted(spec.presets for spec in MODELS.values()) == sorted(set(book.models) - no_video)
    for spec in MODELS.values():
        assert {"baseline", "psa_balanced", *spec.few_steps} <= set(book.presets(spec.presets))


def test_demo_compares_and_writes_four_videos(weights: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "videos"
    assert main(["demo", "--weights", weights, "--out", str(out), *SIZE]) == 0
    names = [f"{name}.mp4" for name in (*demo.PRESETS, "side_by_side")]
    assert sorted(path.name for path in out.iterdir()) == sorted(names)
    assert iio.imread(out / "side_by_side.mp4").shape == (4, 16 * 4, (3 * 32 + 2 * 2) * 4, 3)

    rows: dict[str, list[Any]] = {}
    for line in capsys.readouterr().out.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if cells[0] in demo.PRESETS:
            rows[cells[0]] = cells[1:]
    assert list(rows) == list(demo.PRESETS)
    assert rows["baseline"][1:] == ["1.000", "-", "-"]
    for name in demo.PRESETS[1:]:
        seconds, density, psnr, ssim = map(float, rows[name])
        assert seconds >= 0
        assert 0 < density <= 1
        assert psnr > 0
        assert ssim <= 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--width", "8"], "--width and --height must be at least 12 to compare by SSIM, got 8 and 16"),
        (["--steps", "5"], "tiny-wan/psa_balanced, warmup_steps 5 and cooldown_steps 0, got 5"),
        (["--height", "18"], "--height must be a multiple of 4 for tiny-wan, got 18; the nearest are 16 and 20"),
        (["--out", "taken"], "--out must be a folder or become one, got taken: File exists"),
        (["--out", "folders"], "--out must be a file, and folders/side_by_side.mp4 is a folder"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_demo_refuses_before_it_loads_the_model(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("taken").touch()
    Path("folders/side_by_side.mp4").mkdir(parents=True)
    monkeypatch.setattr(demo, "load_model", lambda *_, **__: pytest.fail("the model was loaded"))
    assert main(["demo", "--out", "videos", *SIZE, *arguments]) == 1
    assert message in error_line(capsys)


def test_a_demo_that_fails_leaves_no_empty_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--weights", "nowhere", "--out", str(tmp_path / "videos"), "--quiet"]) == 1
    assert "no tiny-wan weights" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    assert main(["demo", "--weights", "nowhere", "--out", str(tmp_path), "--quiet"]) == 1
    assert tmp_path.is_dir()


def test_the_smallest_demo_is_compared(weights: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--weights", weights, "--out", str(tmp_path), *SIZE, "--width", "12", "--height", "12"]) == 0
    assert "nan" not in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"psa-integrations {psa_integrations.__version__}\n"
