"""Comparisons: what their rows hold, and that they leave the pipeline as it was."""

import json
from pathlib import Path

import pytest
import torch

from psa_config import BlockSize, load_presets
from psa_integrations.tiny_wan import build_random_pipeline
from psa_integrations.tiny_wan.captions import evaluation_captions
from psa_integrations.tiny_wan.compare import Comparison, likeness


def test_likeness_is_that_of_each_video() -> None:
    generator = torch.Generator().manual_seed(0)
    reference = 0.5 * torch.rand(2, 3, 16, 16, 3, generator=generator)
    psnr, ssim = likeness(torch.stack([reference[0], reference[1] + 0.1]), reference)
    assert psnr[0] == 100.0
    assert psnr[1] == pytest.approx(20.0, abs=1e-4)
    assert ssim[0] == pytest.approx(1.0)
    assert ssim[1] < 1.0


def test_rows_are_held_against_the_first(tmp_path: Path) -> None:
    pipeline = build_random_pipeline(num_layers=1, num_attention_heads=1, ffn_dim=64)
    pipeline.set_progress_bar_config(disable=True)
    shipped = load_presets().get("tiny-wan", "psa_fast")
    attention = shipped.attention.model_copy(update={"warmup_steps": 0, "block_size": BlockSize(m=32, n=32)})
    sparse = shipped.model_copy(update={"attention": attention})

    comparison = Comparison(evaluation_captions()[:3], (4, 16, 16), batch=2)
    first = comparison.add("dense", pipeline, steps=2, guidance=3.0)
    other = comparison.add("sparse", pipeline, steps=2, guidance=3.0, preset=sparse, losses={"loss": 0.5})
    again = comparison.add("dense again", pipeline, steps=2, guidance=3.0)
    quick = comparison.add("one step", pipeline, steps=1, guidance=1.0)
    assert (first.density, first.psnr, first.ssim) == (1.0, (), ())
    assert (again.density, again.psnr) == (1.0, (100.0,) * 3)
    assert 0 < other.density < 0.6
    assert max(other.psnr) < 100.0
    assert (first.forwards, quick.forwards) == (4, 1)

    head, _, *lines = comparison.markdown().splitlines()
    assert head.endswith("| SSIM | loss |")
    assert [line.split(" | ")[0] for line in lines] == ["| dense", "| sparse", "| dense again", "| one step"]
    assert lines[1].endswith("| 0.50000 |")
    comparison.write(tmp_path / "found.json")
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["videos"] == 3
    assert [row["psnr"] for row in found["rows"]] == [list(row.psnr) for row in comparison.rows]
    assert [path.name for path in tmp_path.iterdir()] == ["found.json"]
