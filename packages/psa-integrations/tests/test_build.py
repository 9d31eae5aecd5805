"""Presets to mask policies and token orders."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from psa_config import BlockSize, MaskRatios, Preset, PyramidSparseAttention, Samples, SimThresholds, load_presets
from psa_integrations.build import find_preset, mask_policy, sparse_attention_of, token_order
from psa_integrations.diffusers.cogvideox import CogVideoXAdapter
from psa_integrations.diffusers.hunyuan_video import HunyuanVideoAdapter
from psa_integrations.diffusers.ltx import LTXAdapter
from psa_integrations.diffusers.mochi import MochiAdapter
from psa_integrations.diffusers.wan import WanAdapter
from psa_masks import MaskPolicy, TokenOrder, VideoGrid, cube_order, gilbert_order

MakePreset = Callable[..., Preset]

GRID = VideoGrid(frames=3, height=5, width=4)
WITH_TEXT = VideoGrid(frames=3, height=5, width=4, text=7, text_first=True)


def settings(preset: Preset) -> PyramidSparseAttention:
    attention = sparse_attention_of(preset)
    assert attention is not None
    return attention


def test_every_setting_reaches_the_policy(make_preset: MakePreset) -> None:
    attention = settings(
        make_preset(
            (0.1, 0.2, 0.3, 0.4),
            mask_mode="thresholdbound",
            skip="mean",
            min_full=0.06,
            samples=Samples(q=4, kv=4),
            importance_method="antidiagonal",
            use_sim_mask=True,
            sim_thresholds=SimThresholds(x2=0.9, x4=0.8, x8=0.7),
            seed=5,
        )
    )
    assert mask_policy(attention, WITH_TEXT) == MaskPolicy(
        mode="threshold",
        bounds=(0.1, 0.2, 0.3, 0.4),
        block_q=32,
        block_kv=32,
        skip="mean",
        min_full=0.06,
        samples_q=4,
        samples_kv=4,
        method="antidiagonal",
        similarity_thresholds=(0.9, 0.8, 0.7),
        protected=((0, 7),),
        seed=5,
    )


def test_a_budget_reaches_the_policy() -> None:
    attention = PyramidSparseAttention(
        type="psa",
        use_rearrange=True,
        block_size=BlockSize(m=32, n=32),
        mask_mode="budget",
        density=0.2,
        budget_per="layer",
        skip="mean",
        importance_reduction="error",
    )
    assert mask_policy(attention) == MaskPolicy(
        mode="budget", density=0.2, share="layer", block_q=32, block_kv=32, skip="mean", reduction="error"
    )


def test_what_is_left_out_stays_out(make_preset: MakePreset) -> None:
    attention = settings(make_preset((0.1, 0.2, 0.3, 0.4)))
    expected = MaskPolicy(mode="quota", bounds=(0.1, 0.2, 0.3, 0.4), block_q=32, block_kv=32)
    assert mask_policy(attention) == expected
    assert mask_policy(attention, GRID) == expected


def test_the_text_is_protected_where_it_stands(make_preset: MakePreset) -> None:
    attention = settings(make_preset((0.1, 0.2, 0.3, 0.4)))
    text_last = VideoGrid(frames=3, height=5, width=4, text=7)
    assert mask_policy(attention, text_last).protected == ((60, 67),)


def test_a_level_left_out_of_the_ratios_is_empty(make_preset: MakePreset) -> None:
    ratios = MaskRatios(**{"1": (0.0, 0.3), "8": (0.3, 0.6), "0": (0.6, 1.0)})
    attention = settings(make_preset((0.1, 0.2, 0.3, 0.4), mask_ratios=ratios))
    assert mask_policy(attention).bounds == (0.3, 0.3, 0.3, 0.6)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, gilbert_order(GRID)),
        ({"rearrange_method": "Cube", "tile_size": (1, 2, 2)}, cube_order(GRID, (1, 2, 2))),
        (
            {"rearrange_method": "Cube", "tile_size": (1, 2, 2), "cubes_along": "Gilbert"},
            cube_order(GRID, (1, 2, 2), along="gilbert"),
        ),
        ({"tile_size": (1, 2, 2), "cubes_along": "Raster"}, gilbert_order(GRID)),
        ({"rearrange_method": "Semantic"}, gilbert_order(GRID)),
        ({"rearrange_method": "Hybrid"}, gilbert_order(GRID)),
        ({"rearrange_method": "KdTree"}, gilbert_order(GRID)),
    ],
)
def test_the_token_order_is_the_one_named(
    changes: dict[str, Any], expected: TokenOrder, make_preset: MakePreset
) -> None:
    order = token_order(settings(make_preset((1.0,) * 4, **changes)), GRID)
    assert order is not None
    assert torch.equal(order.order, expected.order)
    assert not torch.equal(order.order, TokenOrder.identity(GRID.seq_len).order)


def test_no_rearrangement_is_no_order(make_preset: MakePreset) -> None:
    assert token_order(settings(make_preset((1.0,) * 4, use_rearrange=False)), GRID) is None


@pytest.mark.parametrize("model", load_presets().models)
def test_every_shipped_preset_builds_for_its_model(model: str) -> None:
    book = load_presets()
    for name in book.presets(model):
        preset = find_preset(f"{model}/{name}")
        assert preset == book.get(model, name) == find_preset(name, model=model)
        attention = sparse_attention_of(preset)
        assert (attention is None) == (name == "baseline")
        if attention is None:
            continue
        grid = VideoGrid(frames=5, height=30, width=45, text=preset.text_length, text_first=True)
        policy = mask_policy(attention, grid)
        assert policy.bounds == (() if attention.mask_ratios is None else attention.mask_ratios.bounds)
        assert policy.density == attention.density
        order = token_order(attention, grid)
        assert (order is not None) == attention.use_rearrange


@pytest.mark.parametrize(
    ("adapter", "config", "boundary", "model"),
    [
        (WanAdapter, {"num_layers": 30, "num_attention_heads": 12}, None, "Wan2.1_1.3b"),
        (WanAdapter, {"num_layers": 40, "num_attention_heads": 40}, None, "Wan2.1_14b"),
        (WanAdapter, {"num_layers": 40, "num_attention_heads": 40}, 0.875, "Wan2.2_A14B"),
        (WanAdapter, {"num_layers": 30, "num_attention_heads": 24, "in_channels": 48}, None, "Wan2.2_5B"),
        (WanAdapter, {"num_layers": 6, "num_attention_heads": 4, "patch_size": (1, 4, 4)}, None, "tiny-wan"),
        (WanAdapter, {"num_layers": 2, "num_attention_heads": 2}, None, None),
        (CogVideoXAdapter, {"num_layers": 42, "num_attention_heads": 48}, None, "CogVideo_5b"),
        (
            CogVideoXAdapter,
            {"num_layers": 42, "num_attention_heads": 48, "patch_size_t": 2},
            None,
            "CogVideo1.5_5b",
        ),
        (CogVideoXAdapter, {"num_layers": 30, "num_attention_heads": 30}, None, None),
        (
            HunyuanVideoAdapter,
            {"num_layers": 20, "num_single_layers": 40, "num_attention_heads": 24},
            None,
            "HunyuanVideo",
        ),
        (HunyuanVideoAdapter, {"num_layers": 20, "num_single_layers": 20, "num_attention_heads": 24}, None, None),
        (LTXAdapter, {"num_layers": 28, "num_attention_heads": 32}, None, "LTX-Video"),
        (LTXAdapter, {"num_layers": 48, "num_attention_heads": 32}, None, "LTX-Video"),
        (LTXAdapter, {"num_layers": 2, "num_attention_heads": 2}, None, None),
        (MochiAdapter, {"num_layers": 48, "num_attention_heads": 24}, None, "Mochi"),
        (MochiAdapter, {"num_layers": 2, "num_attention_heads": 2}, None, None),
    ],
)
def test_models_are_known_by_their_configuration(
    adapter: type, config: dict[str, Any], boundary: float | None, model: str | None
) -> None:
    defaults = {"patch_size": (1, 2, 2), "in_channels": 16, "patch_size_t": None}
    transformer = SimpleNamespace(config=SimpleNamespace(**defaults | config))
    pipeline = SimpleNamespace(config=SimpleNamespace(boundary_ratio=boundary))
    assert adapter().model(transformer, pipeline) == model
    if model is not None:
        assert find_preset("baseline", model=model).model == model


def test_a_bare_14b_transformer_may_be_of_two_models() -> None:
    config = SimpleNamespace(num_layers=40, num_attention_heads=40, patch_size=(1, 2, 2), in_channels=16)
    for pipeline in (None, SimpleNamespace()):
        assert WanAdapter().model(SimpleNamespace(config=config), pipeline) is None
