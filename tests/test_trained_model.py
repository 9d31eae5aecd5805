"""The trained model that ships: pyramid attention in its sampling loop, from noise to video."""

import pytest
import torch
from lib.presets import FULL, SPARSE, make_preset

from psa_integrations import apply_pyramid_sparse_attention
from psa_integrations.tiny_wan import load_pipeline
from psa_kernels.testing import assert_within_error_budget, error_budget

PROMPT = "a red circle moving right"


@pytest.fixture(scope="module")
def pipeline():
    pipeline = load_pipeline()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sample(pipeline, preset=None, *, seed=0):
    """The video as a tensor, 4 frames of 32x32 pixels or 256 tokens, and the density it was made with."""

    def run():
        return pipeline(
            PROMPT,
            num_frames=4,
            height=32,
            width=32,
            num_inference_steps=2,
            guidance_scale=3.0,
            generator=torch.Generator().manual_seed(seed),
            output_type="latent",
        ).frames

    if preset is None:
        return run(), 1.0
    with apply_pyramid_sparse_attention(pipeline, preset) as handle:
        return run(), handle.stats().density


@pytest.fixture(scope="module")
def dense(pipeline):
    video, _ = sample(pipeline)
    return video


@pytest.fixture(scope="module")
def exact():
    """Dense sampling in the highest precision that diffusers keeps: its norms and residual sums are float32."""
    pipeline = load_pipeline(dtype=torch.float64)
    pipeline.set_progress_bar_config(disable=True)
    video, _ = sample(pipeline)
    return video.double()


@pytest.mark.parametrize("method", ["Gilbert", "Cube", "Semantic", "Hybrid"])
@pytest.mark.parametrize("mode", ["thresholdbound", "topk"])
def test_every_block_at_level_1_is_dense_sampling(pipeline, dense, exact, method, mode):
    full = make_preset(FULL, rearrange_method=method, mask_mode=mode)
    video, density = sample(pipeline, full)
    assert density == 1
    assert_within_error_budget(video, exact, dense)


@pytest.mark.parametrize("skip", ["drop", "mean"])
def test_a_sparse_preset_is_not_dense_sampling(pipeline, dense, exact, skip):
    video, density = sample(pipeline, make_preset(SPARSE, skip=skip))
    assert density < 0.6
    assert video.isfinite().all()
    # Beyond what rounding explains.
    assert (video - exact).abs().max() > error_budget(exact, dense, torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("method", ["Semantic", "Hybrid"])
def test_clusters_carry_over_from_step_to_step(pipeline, method):
    """What the second step starts from shows in the video; a later run starts as the first did."""
    chosen = make_preset(SPARSE, rearrange_method=method, num_clusters=9, cluster_iterations=1)
    with apply_pyramid_sparse_attention(pipeline, chosen) as handle:
        video, again = (sample(pipeline) for _ in range(2))
        with handle.at_step(0):  # every step is taken for the first
            anew, _ = sample(pipeline)
    assert torch.equal(video[0], again[0])
    assert video[0].isfinite().all()
    assert not torch.equal(video[0], anew)


@pytest.mark.parametrize("preset", [None, make_preset(SPARSE)], ids=["dense", "sparse"])
def test_one_seed_gives_one_video(pipeline, preset):
    first, again, other = (sample(pipeline, preset, seed=seed)[0] for seed in (5, 5, 6))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_removing_the_preset_gives_the_dense_video_again(pipeline, dense):
    sample(pipeline, make_preset(SPARSE))
    assert torch.equal(sample(pipeline)[0], dense)
