"""What the pipelines compute with pyramid sparse attention on them, against what they compute without."""

from collections.abc import Callable
from itertools import combinations
from typing import Any

import pytest
import torch

from psa_config import Preset
from psa_integrations import apply_pyramid_sparse_attention

PIPELINES = [
    "wan21",
    "wan22_a14b",
    "wan22_5b",
    "wan22_5b_i2v",
    "cogvideox_5b",
    "cogvideox_2b",
    "cogvideox_1.5",
]

SIZES = {
    "odd": {"height": 112, "width": 144},
    "portrait": {"height": 208, "width": 112},
    "one frame": {"height": 128, "width": 192, "num_frames": 1},
    "one column": {"height": 128, "width": 32},
}


def assert_same_but_for_rounding(out: torch.Tensor, expected: torch.Tensor) -> None:
    """Sums in another order: within 1e-5 of the largest value, some hundred times float32's rounding unit."""
    error = (out - expected).abs().max() / expected.abs().max()
    assert error <= 1e-5, f"relative error {error:.2e}"


@pytest.mark.parametrize("name", PIPELINES)
def test_every_block_at_level_1_is_the_untouched_pipeline(
    name: str, build: Callable[[str], Any], run: Callable[..., torch.Tensor], full: Preset
) -> None:
    pipeline = build(name)
    expected = run(pipeline)
    with apply_pyramid_sparse_attention(pipeline, full) as handle:
        out = run(pipeline)
        assert handle.stats().density == 1.0
        assert handle.stats().dense_steps() == []
    assert_same_but_for_rounding(out, expected)


@pytest.mark.parametrize("name", PIPELINES)
def test_sparse_blocks_change_the_output(
    name: str, build: Callable[[str], Any], run: Callable[..., torch.Tensor], sparse: Preset
) -> None:
    pipeline = build(name)
    expected = run(pipeline)
    with apply_pyramid_sparse_attention(pipeline, sparse) as handle:
        out = run(pipeline)
        assert 0.3 < handle.stats().density < 0.8
    assert out.isfinite().all()
    # The untouched pipeline and the full one differ by rounding only, see above.
    assert (out - expected).abs().max() / expected.abs().max() > 1e-4


@pytest.mark.parametrize("name", PIPELINES)
def test_remove_gives_back_the_old_output_bit_for_bit(
    name: str, build: Callable[[str], Any], run: Callable[..., torch.Tensor], sparse: Preset
) -> None:
    pipeline = build(name)
    expected = run(pipeline)
    before = dict(pipeline.transformer.attn_processors)
    handle = apply_pyramid_sparse_attention(pipeline, sparse)
    run(pipeline)
    handle.remove()
    assert pipeline.transformer.attn_processors == before
    assert torch.equal(run(pipeline), expected)
    handle.remove()


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES.keys())
@pytest.mark.parametrize("name", ["wan21", "cogvideox_5b"])
def test_odd_portrait_and_flat_sizes(
    name: str,
    size: dict[str, int],
    build: Callable[[str], Any],
    run: Callable[..., torch.Tensor],
    full: Preset,
    sparse: Preset,
) -> None:
    pipeline = build(name)
    expected = run(pipeline, **size)
    with apply_pyramid_sparse_attention(pipeline, full):
        assert_same_but_for_rounding(run(pipeline, **size), expected)
    with apply_pyramid_sparse_attention(pipeline, sparse):
        assert run(pipeline, **size).isfinite().all()


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


@pytest.mark.parametrize("name", ["wan21", "wan22_5b_i2v", "cogvideox_5b", "cogvideox_2b"])
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


def test_dense_layers_see_reordered_tokens_and_change_nothing(
    build: Callable[[str], Any], run: Callable[..., torch.Tensor], make_preset: Callable[..., Preset]
) -> None:
    pipeline = build("wan21")
    expected = run(pipeline)
    preset = make_preset((0.25, 0.4, 0.6, 0.75), dense_layers=(0, 1))
    with apply_pyramid_sparse_attention(pipeline, preset) as handle:
        out = run(pipeline)
        assert handle.stats().dense_layers() == [0, 1]
    assert_same_but_for_rounding(out, expected)


@pytest.mark.parametrize("name", ["wan21", "wan22_5b", "cogvideox_5b"])
def test_dense_steps_are_the_untouched_pipeline_bit_for_bit(
    name: str,
    build: Callable[[str], Any],
    run: Callable[..., torch.Tensor],
    make_preset: Callable[..., Preset],
) -> None:
    pipeline = build(name)

    def latents_of_steps() -> list[torch.Tensor]:
        seen = []

        def keep(pipe: Any, step: int, timestep: Any, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
            seen.append(tensors["latents"])
            return {}

        run(pipeline, steps=4, callback_on_step_end=keep)
        return seen

    untouched = latents_of_steps()
    with apply_pyramid_sparse_attention(pipeline, make_preset((0.25, 0.4, 0.6, 0.75), warmup_steps=2)):
        latents = latents_of_steps()
    assert [torch.equal(*pair) for pair in zip(latents, untouched, strict=True)] == [True, True, False, False]


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


def test_half_precision_runs_in_the_dtype_of_the_weights(build: Callable[[str], Any], sparse: Preset) -> None:
    transformer = build("wan21").transformer.to(torch.bfloat16)
    call = {
        "hidden_states": torch.randn(1, 16, 3, 16, 16, dtype=torch.bfloat16),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, 16, 32, dtype=torch.bfloat16),
    }
    with torch.no_grad(), apply_pyramid_sparse_attention(transformer, sparse):
        out = transformer(**call).sample
    assert out.dtype == torch.bfloat16
    assert out.isfinite().all()


@pytest.mark.parametrize("name", ["wan21", "cogvideox_5b"])
def test_projections_fused_before_apply(
    name: str, build: Callable[[str], Any], run: Callable[..., torch.Tensor], full: Preset
) -> None:
    pipeline = build(name)
    expected = run(pipeline)
    pipeline.transformer.fuse_qkv_projections()
    with apply_pyramid_sparse_attention(pipeline, full) as handle:
        assert_same_but_for_rounding(run(pipeline), expected)
        assert handle.stats().dense_steps() == []


def test_wan_projections_fused_after_apply(
    build: Callable[[str], Any], run: Callable[..., torch.Tensor], full: Preset
) -> None:
    pipeline = build("wan21")
    expected = run(pipeline)
    with apply_pyramid_sparse_attention(pipeline, full) as handle:
        pipeline.transformer.fuse_qkv_projections()
        assert_same_but_for_rounding(run(pipeline), expected)
        assert handle.stats().dense_steps() == []
