"""`psa generate` on diffusers' own pipelines, saved to a folder at toy size."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import imageio.v3 as iio
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel, UMT5Config, UMT5EncoderModel

from psa_config import load_presets
from psa_integrations.cli import main
from psa_integrations.cli.models import MODELS

TEXT_SIZE: dict[str, Any] = {
    "vocab_size": 64,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 37,
    "num_layers": 1,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
}


def tokenizer() -> Any:
    vocabulary = {"<pad>": 0, "</s>": 1, "<unk>": 2, "a": 3, "cat": 4}
    model = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    model.pre_tokenizer = Whitespace()
    model.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=model, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=226
    )


def save_wan(folder: Path) -> None:
    transformer = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=16,
        out_channels=16,
        text_dim=32,
        freq_dim=32,
        ffn_dim=32,
        num_layers=1,
        rope_max_seq_len=32,
    )
    vae = diffusers.AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )
    diffusers.WanPipeline(
        tokenizer=tokenizer(),
        text_encoder=UMT5EncoderModel(UMT5Config(**TEXT_SIZE)),
        transformer=transformer,
        vae=vae,
        scheduler=diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
    ).save_pretrained(folder)


def save_cogvideox(folder: Path) -> None:
    transformer = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=2,
        text_embed_dim=32,
        num_layers=1,
        sample_width=8,
        sample_height=8,
        sample_frames=9,
        use_rotary_positional_embeddings=True,
    )
    vae = diffusers.AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(8,) * 4,
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
    )
    diffusers.CogVideoXPipeline(
        tokenizer=tokenizer(),
        text_encoder=T5EncoderModel(T5Config(**TEXT_SIZE)),
        transformer=transformer,
        vae=vae,
        scheduler=diffusers.CogVideoXDDIMScheduler(),
    ).save_pretrained(folder)


@pytest.fixture(autouse=True)
def fixed_weights() -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def density_printed(capsys: pytest.CaptureFixture[str]) -> float:
    return float(capsys.readouterr().out.split("density")[1])


def test_wan_from_a_local_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_wan(tmp_path / "wan")
    out = tmp_path / "cat.mp4"
    arguments = ["generate", "--model", "wan2.1-1.3b", "--weights", str(tmp_path / "wan"), "--prompt", "a cat"]
    size = ["--width", "64", "--height", "32", "--frames", "5", "--steps", "17", "--quiet"]
    assert main([*arguments, *size, "--out", str(out)]) == 0
    assert iio.imread(out).shape == (5, 32, 64, 3)
    # Fifteen warm-up steps of seventeen are dense.
    assert 15 / 17 < density_printed(capsys) <= 1


def test_the_four_step_recipe_of_cogvideox(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_cogvideox(tmp_path / "cog")
    called: dict[str, Any] = {}
    plain = diffusers.CogVideoXPipeline.__call__

    def recorded(pipeline: Any, **arguments: Any) -> Any:
        called.update(arguments)
        return plain(pipeline, **{**arguments, "width": 32, "height": 32, "num_frames": 9})

    monkeypatch.setattr(diffusers.CogVideoXPipeline, "__call__", recorded)
    out = tmp_path / "cat.mp4"
    arguments = ["generate", "--model", "cogvideox-5b", "--weights", str(tmp_path / "cog"), "--prompt", "a cat"]
    assert main([*arguments, "--preset", "psa_4steps", "--out", str(out), "--quiet"]) == 0
    assert (called["num_inference_steps"], called["guidance_scale"]) == (4, 1.0)
    assert (called["width"], called["height"], called["num_frames"]) == (720, 480, 49)
    assert iio.imread(out).shape == (9, 32, 32, 3)
    assert 0 < density_printed(capsys) <= 1


PRESETS = """
{model}:
  default_attention: mine
  video_scale: {{width_divisor: 16, height_divisor: 16, depth_divisor: 4}}
  text_length: {text}
  attention_configs:
    mine:
      type: psa
      use_rearrange: true
      block_size: {{m: 64, n: 64}}
      mask_ratios: {{1: [0.0, 0.5], 2: [0.5, 1.0]}}
      mask_mode: topk
      warmup_steps: 1
"""


@pytest.mark.parametrize(
    ("model", "save", "text"), [("wan2.1-1.3b", save_wan, 0), ("cogvideox-5b", save_cogvideox, 226)]
)
def test_compare_keeps_the_maps_of_their_grids(
    tmp_path: Path, model: str, save: Callable[[Path], None], text: int
) -> None:
    save(tmp_path / "weights")
    out = tmp_path / "out"
    presets = tmp_path / "presets.yaml"
    presets.write_text(PRESETS.format(model=MODELS[model].presets, text=text))
    arguments = ["compare", "--model", model, "--weights", str(tmp_path / "weights"), "--presets", str(presets)]
    size = ["--width", "64", "--height", "32", "--frames", "9", "--steps", "3", "--quiet"]
    assert main([*arguments, "--prompt", "a cat", *size, "--out", str(out)]) == 0
    found = re.search(r'id="data">(.*?)</script>', (out / "report.html").read_text(encoding="utf-8"), re.DOTALL)
    assert found is not None
    data = json.loads(found[1])
    (order,) = data["orders"]
    assert (order["frames"], order["height"], order["width"], order["seq_len"]) == (3, 2, 4, 24 + text)
    maps = data["shown"][0][1]["maps"]
    assert [(one["step"], one["layer"], one["heads"]) for one in maps] == [(1, 0, [0, 1]), (2, 0, [0, 1])]
    assert [len(run["step_seconds"]) for run in data["prompts"][0]["runs"]] == [3, 3]
    assert [len(run["frames"]) for run in data["shown"][0]] == [9, 9]


def test_tune_measures_a_diffusers_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_wan(tmp_path / "wan")
    (tmp_path / "prompts.txt").write_text("a cat\n")
    files = ["--weights", str(tmp_path / "wan"), "--prompts", str(tmp_path / "prompts.txt")]
    # Four blocks of 128 tokens.
    size = ["--width", "256", "--height", "128", "--frames", "13", "--steps", "18", "--quiet", "--videos", "1"]
    out = tmp_path / "mine.yaml"
    assert main(["tune", "--model", "wan2.1-1.3b", "--target-density", "0.4", *files, *size, "--out", str(out)]) == 0
    found = re.findall(r"attention error ([\d.]+), density ([\d.]+)", capsys.readouterr().out)
    assert len(found) == 9
    assert all(0 < float(density) <= 0.4 for _, density in found)
    description = load_presets(out).get(MODELS["wan2.1-1.3b"].presets, "tuned").attention.description
    assert f"attention error {min(error for error, _ in found)}" in description


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("model_index.json", "{", "model_index.json must be JSON"),
        ("model_index.json", "[]", "model_index.json must name a pipeline of diffusers as its _class_name, got None"),
        ("model_index.json", '{"_class_name": "MyPipeline"}', "as its _class_name, got 'MyPipeline'"),
        ("model_index.json", '{"_class_name": "WanTransformer3DModel"}', "got 'WanTransformer3DModel'"),
        ("text_encoder/model.safetensors", "no safetensors", "cannot be loaded: SafetensorError"),
    ],
)
def test_bad_files_among_the_weights_are_an_error_of_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str, content: str, message: str
) -> None:
    folder = tmp_path / "wan"
    save_wan(folder)
    (folder / file).write_text(content)
    arguments = ["generate", "--model", "wan2.1-1.3b", "--weights", str(folder), "--prompt", "a cat"]
    assert main([*arguments, "--out", str(tmp_path / "cat.mp4")]) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("psa: error: ")
    assert str(folder) in line
    assert message in line
