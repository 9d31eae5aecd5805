"""What the pipelines compute with pyramid sparse attention on them, against what they compute without."""

from collections.abc import Callable
from itertools import combinations
from typing import Any

import pytest
import torch

from psa_config import Preset
from psa_integrations import apply_pyramid_sparse_attention


def assert_same_but_for_rounding(out: torch.Tensor, expected: torch.Tensor) -> None:
    """Sums in another order: within 1e-5 of the largest value, some hundred times float32's rounding unit."""
    error = (out - expected).abs().max() / expected.abs().max()
    assert error <= 1e-5, f"relative error {error:.2e}"


@pytest.mark.parametrize(
    "changes",
    [
        {"use_rearrange": False},
        {"rearrange_method": "Cube"},
        {"rearrange_method": "Cube", "tile_size": (2, 4, 4), "cubes_along": "Gilbert"},
    ],
)
@pytest.mark.parametrize("name", ["wan21", "cogvideox_5b"])
def test_other_token_orders(
    name: str,
    changes: dict[str, Any],
    build: Callable[[str], Any],
    run: Callable[..., torch.Tensor],
    make_preset: Callable[..., Preset],
) -> None:
    pipeline = build(name)
    expected = run(pipeline)
    with apply_pyramid_sparse_attention(pipeline, make_preset((1.0, 1.0, 1.0, 1.0), **changes)):
        assert_same_but_for_rounding(run(pipeline), expected)


@pytest.mark.parametrize("name", ["wan21", "cogvideox_5b", "hunyuan_token_replace", "ltx_i2v", "mochi"])
def test_keys_by_a_tree(
    name: str, build: Callable[[str], Any], run: Callable[..., torch.Tensor], make_preset: Callable[..., Preset]
) -> None:
    pipeline = build(name)
    expected = run(pipeline, steps=2, height=96)
    with apply_pyramid_sparse_attention(pipeline, make_preset((1.0, 1.0, 1.0, 1.0), rearrange_method="KdTree")):
        assert_same_but_for_rounding(run(pipeline, steps=2, height=96), expected)


@pytest.mark.parametrize("name", ["wan21", "wan22_5b_i2v", "cogvideox_5b", "hunyuan_token_replace", "ltx_i2v", "mochi"])
def test_blocks_are_cut_in_token_order(
    name: str, build: Callable[[str], Any], run: Callable[..., torch.Tensor], make_preset: Callable[..., Preset]
) -> None:
    pipeline = build(name)
    outputs = []
    for changes in ({}, {"rearrange_method": "Cube"}, {"use_rearrange": False}):
        with apply_pyramid_sparse_attention(pipeline, make_preset((0.25, 0.4, 0.6, 0.75), **changes)):
            outputs.append(run(pipeline, height=256, width=288))
    for one, other in combinations(outputs, 2):
        assert (one - other).abs().max() / other.abs().max() > 1e-4


def test_per_token_timesteps_follow_their_tokens(build: Callable[[str], Any], full: Preset) -> None:
    transformer = build("wan22_5b").transformer
    generator = torch.Generator().manual_seed(2)
    latents = torch.randn(2, 48, 3, 12, 10, generator=generator)
    call = {
        "hidden_states": latents,
        "timestep": torch.randint(0, 1000, (2, 3 * 6 * 5), generator=generator),
        "encoder_hidden_states": torch.randn(2, 16, 32, generator=generator),
    }
    with torch.no_grad():
        expected = transformer(**call).sample
        with apply_pyramid_sparse_attention(transformer, full):
            by_name = transformer(**call).sample
            by_position = transformer(*call.values()).sample
    assert_same_but_for_rounding(by_name, expected)
    assert torch.equal(by_position, by_name)


@torch.no_grad()
def test_mochi_leaves_out_the_same_text_wherever_it_stands(build: Callable[[str], Any], full: Preset) -> None:
    transformer = build("mochi").transformer
    generator = torch.Generator().manual_seed(2)
    call = {
        "hidden_states": torch.randn(3, 12, 2, 10, 12, generator=generator),
        "encoder_hidden_states": torch.randn(3, 16, 32, generator=generator),
        "timestep": torch.tensor([500.0] * 3),
        "encoder_attention_mask": torch.rand(3, 16, generator=generator) > torch.tensor([0.3, 0.7, 0.0])[:, None],
    }
    expected = transformer(**call).sample
    with apply_pyramid_sparse_attention(transformer, full):
        assert_same_but_for_rounding(transformer(**call).sample, expected)
