"""`psa presets`: the density it says beforehand is the one that comes out, and its other commands are psa-config's."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_pipelines import build, sample

from psa_config import Preset, PyramidSparseAttention, load_presets
from psa_integrations.build import mask_policy
from psa_integrations.cli import bench, build_parser, main
from psa_integrations.cli.estimate import estimate_density
from psa_integrations.cli.models import MODELS, ModelSpec
from psa_integrations.cli.shapes import SHAPES, grid_of
from psa_integrations.diffusers.apply import ADAPTERS
from psa_integrations.tiny_wan import load_pipeline
from psa_kernels import BlockLayout
from psa_masks import VideoGrid, density


def sparse(model: str, name: str, **changes: object) -> tuple[Preset, PyramidSparseAttention]:
    preset = load_presets().get(model, name)
    assert isinstance(preset.attention, PyramidSparseAttention)
    return preset, preset.attention.model_copy(update=changes)


@pytest.mark.parametrize("skip", ["drop", "mean"])
@pytest.mark.parametrize("name", ["psa_balanced", "psa_4steps"])
def test_quotas_come_out_as_estimated(name: str, skip: str) -> None:
    preset, attention = sparse("CogVideo_5b", name, skip=skip)
    grid = grid_of(preset.model_copy(update={"text_length": 256}), width=256, height=256, frames=45)
    assert grid.seq_len == 12 * 16 * 16 + 256
    query, key = torch.randn(2, 1, 1, grid.seq_len, 16, generator=torch.Generator().manual_seed(0))
    layout = BlockLayout(grid.seq_len, grid.seq_len, block_q=128, block_kv=128)
    found = float(density(mask_policy(attention, grid)(query, key), layout))
    estimate = estimate_density(attention, grid)
    # The two blocks of text are level 1 whatever their rank: how much that adds depends on which rank they had.
    assert abs(estimate.expected - found) < 2 / layout.num_kv_blocks
    assert estimate.expected == estimate.most


def test_without_text_quotas_are_known_exactly() -> None:
    preset, attention = sparse("CogVideo_5b", "psa_balanced")
    grid = grid_of(preset.model_copy(update={"text_length": 0}), width=256, height=256, frames=45)
    query, key = torch.randn(2, 1, 1, grid.seq_len, 16, generator=torch.Generator().manual_seed(0))
    layout = BlockLayout(grid.seq_len, grid.seq_len, block_q=128, block_kv=128)
    assert estimate_density(attention, grid).expected == float(
        density(mask_policy(attention, grid)(query, key), layout)
    )


def test_a_threshold_stays_below_the_most() -> None:
    preset, attention = sparse("tiny-wan", "psa_balanced")
    grid = grid_of(preset, width=64, height=64, frames=8)
    layout = BlockLayout(grid.seq_len, grid.seq_len, block_q=64, block_kv=64)
    estimate = estimate_density(attention, grid)
    for sharpness in (0.0, 1.0, 4.0):
        query, key = torch.randn(2, 1, 2, grid.seq_len, 16, generator=torch.Generator().manual_seed(0))
        levels = mask_policy(attention, grid)(sharpness * query, key)
        assert float(density(levels, layout).max()) <= estimate.most + 1e-6
    assert estimate.expected < estimate.most


def test_a_similarity_cap_raises_the_most() -> None:
    preset, attention = sparse("tiny-wan", "psa_balanced")
    grid = grid_of(preset, width=64, height=64, frames=4)
    capped = attention.model_copy(update={"use_sim_mask": True})
    assert estimate_density(capped, grid).most > estimate_density(attention, grid).most


def test_the_shape_of_the_shipped_model() -> None:
    config = load_pipeline().transformer.config
    shape = SHAPES["tiny-wan"]
    found = (config.num_layers, config.num_attention_heads, config.attention_head_dim)
    assert found == (shape.layers, shape.heads, shape.head_dim)
    assert set(SHAPES) == set(load_presets().models) - {"Qwen2.5-VL_7b"}  # which makes no videos
    assert SHAPES["Wan2.1_1.3b"].dense_flops(10) == 4 * 100 * 12 * 128 * 30


@pytest.mark.parametrize(
    ("model", "size", "tokens"),
    [
        ("Wan2.1_1.3b", (1280, 720, 69), 18 * 45 * 80),
        ("Wan2.1_1.3b", (1280, 720, 70), 18 * 45 * 80),
        ("Wan2.2_5B", (1280, 704, 121), 31 * 22 * 40),
        ("CogVideo_5b", (720, 480, 49), 13 * 30 * 45 + 226),
        ("CogVideo1.5_5b", (1360, 768, 81), 11 * 48 * 85 + 226),
        ("tiny-wan", (80, 80, 16), 16 * 20 * 20),
    ],
)
def test_tokens_of_a_size(model: str, size: tuple[int, int, int], tokens: int) -> None:
    width, height, frames = size
    assert grid_of(load_presets().get(model), width=width, height=height, frames=frames).seq_len == tokens


class TransformerReachedError(Exception):
    """Raised by the transformer when it is called: its latents are there."""


@pytest.mark.parametrize(
    ("form", "model"),
    [
        ("wan21", "Wan2.1_1.3b"),
        ("wan22_a14b", "Wan2.2_A14B"),
        ("wan22_5b", "Wan2.2_5B"),
        ("cogvideox_5b", "CogVideo_5b"),
        ("cogvideox_1.5", "CogVideo1.5_5b"),
        ("hunyuan", "HunyuanVideo"),
        ("ltx", "LTX-Video"),
        ("mochi", "Mochi"),
    ],
)
def test_any_number_of_frames_is_cut_as_the_pipeline_cuts_it(form: str, model: str) -> None:
    pipeline, preset = build(form), load_presets().get(model)
    adapter = next(load() for name, load in ADAPTERS.items() if name == type(pipeline.transformer).__name__)
    found: list[VideoGrid | None] = []

    def look(module: Any, args: Any, call: dict[str, Any]) -> None:
        found.append(adapter.grid(module, call))
        raise TransformerReachedError

    pipeline.transformer.register_forward_pre_hook(look, with_kwargs=True)
    for frames in range(1, 2 * preset.video_scale.depth_divisor + 2):
        with pytest.raises(TransformerReachedError):
            sample(pipeline, width=64, height=64, num_frames=frames)
        expected = grid_of(preset, width=64, height=64, frames=frames)
        made = found[-1]
        assert made is not None
        assert (made.frames, made.height, made.width) == (expected.frames, expected.height, expected.width), frames


def test_show_explains_and_estimates(capsys: pytest.CaptureFixture[str]) -> None:
    size = ["--width", "160", "--height", "160", "--frames", "17", "--steps", "20"]
    assert main(["presets", "show", "cogvideox-5b", "psa_balanced", *size]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert text.startswith("CogVideo_5b/psa_balanced: The published balanced setting. Each block of 128 queries")
    assert "At 160x160, 17 frames: 726 tokens (5 x 10 x 10 and 226 of text)." in text
    assert "Density of a sparse step: 0." in text
    assert "Density of 20 steps, 15 of them dense: about 0." in text
    assert main(["presets", "show", "Wan2.1_1.3b"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "64,800 tokens (18 x 45 x 80)" in text
    assert "774 TFLOP dense" in text
    assert "too unlike to be pooled" in text
    assert main(["presets", "show", "tiny-wan", "psa_balanced", "--frames", "1", "--steps", "1"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "At 64x64, 1 frame: 256 tokens (1 x 16 x 16)." in text
    assert "Density of 1 step, 1 of them dense" in text
    assert main(["presets", "show", "tiny-wan", "baseline"]) == 0
    assert "Dense attention, unchanged" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["Wan2.1_1.3", "psa_balanced"], 'no model "Wan2.1_1.3", expected'),
        (["tiny-wan", "psa"], 'no preset "psa"'),
        (["tiny-wan", "--width", "30"], "--width must be a multiple of 4 for tiny-wan, got 30"),
    ],
)
def test_show_refuses(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    assert main(["presets", "show", *arguments]) == 1
    printed, error = capsys.readouterr()
    assert printed == ""
    assert error.startswith("psa: error: ")
    assert message in error


def test_a_model_of_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(
        "mine: {video_scale: {width_divisor: 8, height_divisor: 8, depth_divisor: 1}, text_length: 0,\n"
        "  attention_configs: {dense: {type: dense}}}\n"
    )
    assert main(["presets", "show", "mine", "--presets", str(file)]) == 0
    assert "give --width, --height and --frames" in capsys.readouterr().out
    # A name that the commands have for another model.
    file.write_text(file.read_text().replace("mine:", "mochi:"))
    assert main(["presets", "show", "mochi", "--presets", str(file)]) == 0
    assert capsys.readouterr().out.startswith("mochi/dense")


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("nodir/a.yaml", "must lie in a folder that exists, got nodir/a.yaml"),
        ("/proc/a.yaml", "must lie in a folder that can be written, got /proc/a.yaml: No such file or directory"),
        ("there.yaml", "must be a file that is not there yet, and there.yaml is left as it is"),
    ],
)
def test_new_files_are_refused_by_the_name_they_were_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], out: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("there.yaml").write_text("a: b\n")
    assert main(["presets", "new", out]) == 1
    assert capsys.readouterr().err == f"psa: error: file {message}\n"
    assert main(["presets", "convert", "there.yaml", "--out", out]) == 1
    assert capsys.readouterr().err == f"psa: error: --out {message}\n"
    assert Path("there.yaml").read_text() == "a: b\n"


@pytest.mark.parametrize("spec", MODELS.values(), ids=lambda spec: spec.name)
def test_every_command_takes_both_names_of_a_model(spec: ModelSpec, capsys: pytest.CaptureFixture[str]) -> None:
    printed = []
    for name in (spec.name, spec.presets):
        assert main(["presets", "new", "--model", name]) == 0
        assert main(["presets", "show", name]) == 0
        printed.append(capsys.readouterr().out)
        for command in ("generate", "compare"):
            assert build_parser().parse_args([command, "--prompt", "", "--model", name]).model == spec.name
        assert bench._preset_named(f"{name}/psa_balanced") == load_presets().get(spec.presets, "psa_balanced")
    assert printed[0] == printed[1]
    tune = ["tune", "--target-density", "0.4", "--prompts", "a.txt", "--model", "Wan2.1_14b"]
    assert build_parser().parse_args(tune).model == "wan2.1-14b"


def test_the_commands_of_psa_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "new.yaml"
    assert main(["presets", "new", str(file), "--model", "tiny-wan"]) == 0
    assert main(["presets", "check", str(file)]) == 0
    assert main(["presets", "convert", str(file)]) == 0
    assert main(["presets", "list", "--presets", str(file)]) == 0
    assert "tiny-wan\n  mine (default)" in capsys.readouterr().out
    text = "tiny-wan: {attention_configs: {a: {type: dens}}}"
    file.write_text(text)
    assert main(["presets", "check", str(file)]) == 1
    printed = capsys.readouterr()
    assert printed.err == ""
    assert printed.out.splitlines()[2] == "      | " + " " * text.index("dens") + "^"
    assert main(["presets", "convert", str(file)]) == 1
    assert capsys.readouterr().err.startswith("psa: error: ")
