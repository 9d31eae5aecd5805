"""The shipped presets carry the published figures."""

from importlib import resources

import pytest

from psa_config import DenseAttention, PyramidSparseAttention, load_presets

T, Q = "thresholdbound", "topk"

# model, preset, mode, block n, bounds, warm-up steps, rearranged, similarity cap: as published with
# arXiv 2512.04025
PUBLISHED = [
    ("Wan2.1_14b", "psa_balanced", T, 128, (0.4, 0.5, 0.6, 0.8), 15, True, False),
    ("Wan2.1_1.3b", "psa_balanced", T, 128, (0.5, 0.6, 0.7, 0.8), 15, True, True),
    ("Wan2.1_1.3b", "psa_topk", Q, 32, (0.05, 0.1, 0.15, 0.25), 15, True, False),
    ("Wan2.2_A14B", "psa_balanced", T, 32, (0.5, 0.6, 0.6, 0.8), 12, True, False),
    ("Wan2.2_5B", "psa_balanced", T, 32, (0.6, 0.7, 0.7, 0.8), 15, True, False),
    ("CogVideo1.5_5b", "psa_balanced", Q, 32, (0.1, 0.15, 0.15, 0.35), 15, True, False),
    ("CogVideo_5b", "psa_balanced", Q, 128, (0.1, 0.15, 0.15, 0.35), 15, False, False),
    ("CogVideo_5b", "psa_4steps", Q, 128, (0.05, 0.15, 0.25, 0.5), 0, False, False),
]

# Nothing is published for these models. Each starts from the figures of another.
UNTUNED = {"HunyuanVideo": "Wan2.1_14b", "LTX-Video": "Wan2.2_5B", "Mochi": "CogVideo1.5_5b"}

# model: divisors of width, height and frames; text tokens
GEOMETRY = {
    "Wan2.1_14b": ((16, 16, 4), 0),
    "Wan2.1_1.3b": ((16, 16, 4), 0),
    "Wan2.2_A14B": ((16, 16, 4), 0),
    "Wan2.2_5B": ((32, 32, 4), 0),
    "CogVideo1.5_5b": ((16, 16, 8), 226),
    "CogVideo_5b": ((16, 16, 4), 226),
    "Qwen2.5-VL_7b": ((28, 28, 2), 0),
    "tiny-wan": ((4, 4, 1), 0),
    "HunyuanVideo": ((16, 16, 4), 256),
    "LTX-Video": ((32, 32, 8), 0),
    "Mochi": ((16, 16, 6), 256),
}
VIDEO = [model for model in GEOMETRY if model != "Qwen2.5-VL_7b"]


def pyramid(model: str, preset: str | None = None) -> PyramidSparseAttention:
    attention = load_presets().get(model, preset).attention
    assert isinstance(attention, PyramidSparseAttention)
    return attention


@pytest.mark.parametrize(("model", "name", "mode", "n", "bounds", "warmup", "rearranged", "capped"), PUBLISHED)
def test_published_figures(
    model: str,
    name: str,
    mode: str,
    n: int,
    bounds: tuple[float, ...],
    warmup: int,
    rearranged: bool,
    capped: bool,
) -> None:
    attention = pyramid(model, name)
    assert (attention.block_size.m, attention.block_size.n, attention.block_size.tile_n) == (128, n, 32)
    assert attention.mask_mode == mode
    assert attention.mask_ratios is not None
    assert attention.mask_ratios.bounds == bounds
    assert attention.mask_ratios.skipped == (bounds[-1], 1.0)
    assert (attention.warmup_steps, attention.cooldown_steps) == (warmup, 0)
    assert (attention.use_rearrange, attention.rearrange_method) == (rearranged, "Gilbert")
    assert (attention.tile_size, attention.cubes_along) == ((2, 8, 8), "Raster")
    assert attention.use_sim_mask is capped
    x8 = 0.65 if name == "psa_topk" else 0.6
    assert attention.sim_thresholds.values == (0.7, 0.65, x8)
    assert (attention.skip, attention.min_full, attention.dense_layers) == ("drop", 0.0, ())


def test_tiny_wan() -> None:
    attention = pyramid("tiny-wan", "psa_balanced")
    assert (attention.block_size.m, attention.block_size.n) == (64, 64)
    assert attention.mask_mode == "thresholdbound"
    assert attention.mask_ratios == pyramid("Wan2.1_1.3b", "psa_balanced").mask_ratios
    assert (attention.warmup_steps, attention.use_sim_mask, attention.skip) == (5, False, "drop")


def test_qwen_scores_antidiagonals_and_has_the_published_similarity_cap() -> None:
    attention = pyramid("Qwen2.5-VL_7b", "psa_balanced")
    assert (attention.block_size.m, attention.block_size.n) == (128, 128)
    assert (attention.importance_method, attention.samples.q, attention.samples.kv) == ("antidiagonal", 8, 8)
    assert (attention.use_sim_mask, attention.sim_thresholds.values) == (True, (0.75, 0.7, 0.7))
    assert (attention.mask_mode, attention.mask_ratios.bounds) == (T, (0.7, 0.8, 0.9, 0.9))
    assert (attention.use_rearrange, attention.warmup_steps, attention.cooldown_steps) == (False, 0, 0)


@pytest.mark.parametrize(("model", "other"), UNTUNED.items())
def test_untuned_presets_say_so(model: str, other: str) -> None:
    attention, start = pyramid(model, "psa_balanced"), pyramid(other, "psa_balanced")
    assert attention.description == f"Untuned, the published setting of {other}."
    assert attention.model_copy(update={"description": start.description}) == start


def test_every_model_and_preset_is_in_the_tables() -> None:
    book = load_presets()
    assert sorted(book.models) == sorted(GEOMETRY)
    named = {(model, name) for model, name, *_ in PUBLISHED}
    named |= {(model, "psa_balanced") for model in ("tiny-wan", "Qwen2.5-VL_7b", *UNTUNED)}
    shipped = {(model, name) for model in book.models for name in book.presets(model)}
    named |= {(model, name) for model in GEOMETRY for name in ("baseline", "psa_tail")}
    assert shipped == named | {(model, name) for model in VIDEO for name in ("psa_quality", "psa_fast")}


@pytest.mark.parametrize("model", GEOMETRY)
def test_each_model(model: str) -> None:
    preset = load_presets().get(model)
    divisors, text_length = GEOMETRY[model]
    scale = preset.video_scale
    assert (scale.width_divisor, scale.height_divisor, scale.depth_divisor) == divisors
    assert preset.text_length == text_length
    assert (preset.model, preset.name) == (model, "psa_balanced")
    assert isinstance(load_presets().get(model, "baseline").attention, DenseAttention)


@pytest.mark.parametrize("model", GEOMETRY)
def test_the_tail_preset_is_the_balanced_one_with_means(model: str) -> None:
    tail, balanced = pyramid(model, "psa_tail"), pyramid(model, "psa_balanced")
    assert tail.skip == "mean"
    assert tail.model_copy(update={"skip": "drop", "description": balanced.description}) == balanced


@pytest.mark.parametrize("model", VIDEO)
def test_the_presets_of_our_own_pool_like_with_like_and_read_every_block(model: str) -> None:
    quality, fast, balanced = (pyramid(model, name) for name in ("psa_quality", "psa_fast", "psa_balanced"))
    assert (quality.mask_mode, quality.skip) == ("topk", "mean")
    assert (quality.use_rearrange, quality.rearrange_method) == (True, "KdTree")
    assert quality.mask_ratios is not None
    assert fast.mask_ratios is not None
    assert quality.mask_ratios.bounds == (0.02, 0.12, 0.22, 0.6)
    assert fast.mask_ratios.bounds == (0.012, 0.072, 0.132, 0.36)
    same = {"mask_ratios": quality.mask_ratios, "description": quality.description}
    assert fast.model_copy(update=same) == quality
    assert quality.warmup_steps == balanced.warmup_steps


def test_one_file_a_model_named_after_it() -> None:
    folder = resources.files("psa_config") / "presets"
    names = [file.name for file in folder.iterdir()]
    assert sorted(names) == sorted(f"{model}.yaml" for model in load_presets().models)
    for name in names:
        first, second, *_ = (folder / name).read_text().splitlines()
        assert first == "# yaml-language-server: $schema=../schema.json"
        assert second == name.removesuffix(".yaml") + ":"
