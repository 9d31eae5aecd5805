"""Exactly the configured steps run dense, whatever the run looks like."""

import warnings
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from diffusers import WanVideoToVideoPipeline
from packaging.version import Version

from psa_config import Preset
from psa_integrations import StepError, apply_pyramid_sparse_attention
from psa_integrations.diffusers import site

# wan21 opens cache contexts that carry the step; wan22_5b_i2v and CogVideoX leave it to the schedule.
PIPELINES = ["wan21", "wan22_5b_i2v", "cogvideox_5b"]


class SparseSteps:
    """Notes at which steps sparse attention really ran, by the pipeline's own callback."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.step = 0
        self.seen: list[int] = []
        attend = site.attend_by

        def note(*args: Any, **options: Any) -> Any:
            self.seen.append(self.step)
            return attend(*args, **options)

        monkeypatch.setattr(site, "attend_by", note)

    def of_run(self, run: Callable[..., torch.Tensor], pipeline: Any, **options: Any) -> list[int]:
        self.step, self.seen = 0, []
        run(pipeline, callback_on_step_end=self.next_step, **options)
        return sorted(set(self.seen))

    def next_step(self, pipe: Any, step: int, timestep: Any, tensors: Any) -> dict[str, Any]:
        self.step = step + 1
        return {}


@pytest.fixture
def sparse_steps(monkeypatch: pytest.MonkeyPatch) -> SparseSteps:
    return SparseSteps(monkeypatch)


def test_a_run_after_one_that_failed_in_a_sparse_step(
    build: Callable[[str], Any],
    run: Callable[..., torch.Tensor],
    make_preset: Callable[..., Preset],
    sparse_steps: SparseSteps,
) -> None:
    pipeline = build("wan21")
    block = pipeline.transformer.blocks[1]

    def break_block(pipe: Any, step: int, timestep: Any, tensors: Any) -> dict[str, Any]:
        block.ffn.forward = None
        return {}

    with apply_pyramid_sparse_attention(pipeline, make_preset((0.25, 0.4, 0.6, 0.75), warmup_steps=1)):
        expected = run(pipeline)
        with pytest.raises(TypeError):
            run(pipeline, callback_on_step_end=break_block)
        del block.ffn.forward
        assert sparse_steps.of_run(run, pipeline) == [1, 2]
        assert torch.equal(run(pipeline), expected)


@pytest.mark.parametrize("name", PIPELINES)
def test_a_run_without_a_sparse_step_is_said_once(
    build: Callable[[str], Any],
    run: Callable[..., torch.Tensor],
    make_preset: Callable[..., Preset],
    sparse_steps: SparseSteps,
    name: str,
) -> None:
    pipeline, preset = build(name), make_preset((0.25, 0.4, 0.6, 0.75), warmup_steps=1, cooldown_steps=1)
    said = []
    with apply_pyramid_sparse_attention(pipeline, preset), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for steps, sparse in ((3, [1]), (2, []), (1, [])):
            assert sparse_steps.of_run(run, pipeline, steps=steps) == sparse
            said.append([str(warning.message) for warning in caught if "is sparse" in str(warning.message)])
    message = (
        "pyramid sparse attention on transformer: no step of this run is sparse: its steps are 2, and test/test has "
        "warmup_steps 1 and cooldown_steps 1"
    )
    assert said == [[], [message], [message]]


def test_a_preset_that_is_dense_is_no_surprise(build: Callable[[str], Any], run: Callable[..., torch.Tensor]) -> None:
    pipeline = build("wan21")
    with apply_pyramid_sparse_attention(pipeline, "Wan2.1_1.3b/baseline"), warnings.catch_warnings():
        warnings.filterwarnings("error", message="pyramid sparse attention")
        run(pipeline, steps=1)


def test_steps_count_over_both_transformers(
    build: Callable[[str], Any],
    run: Callable[..., torch.Tensor],
    make_preset: Callable[..., Preset],
    sparse_steps: SparseSteps,
) -> None:
    pipeline = build("wan22_a14b")
    boundary = 0.875 * 1000
    pipeline.scheduler.set_timesteps(6)
    high_noise = [i for i, t in enumerate(pipeline.scheduler.timesteps) if t >= boundary]
    low_noise = [i for i, t in enumerate(pipeline.scheduler.timesteps) if t < boundary]
    assert high_noise
    assert len(low_noise) > 1
    preset = make_preset((0.25, 0.4, 0.6, 0.75), warmup_steps=1, cooldown_steps=1)
    with apply_pyramid_sparse_attention(pipeline, preset) as handle:
        assert sparse_steps.of_run(run, pipeline, steps=6) == [1, 2, 3, 4]
        stats = handle.stats()
    assert sorted(stats.density_per_step("transformer")) == high_noise
    assert sorted(stats.density_per_step("transformer_2")) == low_noise
    assert stats.dense_steps("transformer") == [0]
    assert stats.dense_steps("transformer_2") == [5]


def test_each_transformer_can_have_its_own_preset(
    build: Callable[[str], Any],
    run: Callable[..., torch.Tensor],
    sparse: Preset,
    make_preset: Callable[..., Preset],
) -> None:
    pipeline = build("wan22_a14b")
    second = make_preset((0.25, 0.4, 0.6, 0.75), warmup_steps=100)
    with apply_pyramid_sparse_attention(pipeline, sparse, preset_2=second) as handle:
        assert handle.presets == {"transformer": sparse, "transformer_2": second}
        run(pipeline, steps=6)
        stats = handle.stats()
    assert stats.dense_steps("transformer") == []
    assert stats.dense_steps("transformer_2") == sorted(stats.density_per_step("transformer_2"))


def test_video_to_video_counts_the_steps_it_executes(
    build: Callable[[str], Any], make_preset: Callable[..., Preset], sparse_steps: SparseSteps
) -> None:
    text_to_video = build("wan21")
    pipeline = WanVideoToVideoPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=text_to_video.vae,
        scheduler=text_to_video.scheduler,
        transformer=text_to_video.transformer,
    )
    pipeline.set_progress_bar_config(disable=True)

    def run(pipe: Any, **options: Any) -> torch.Tensor:
        latents: torch.Tensor = pipe(
            video=torch.rand(1, 9, 3, 64, 64),
            prompt_embeds=torch.zeros(1, 16, 32),
            negative_prompt_embeds=torch.zeros(1, 16, 32),
            height=64,
            width=64,
            strength=0.5,
            num_inference_steps=8,
            output_type="latent",
            **options,
        ).frames
        return latents

    preset = make_preset((0.25, 0.4, 0.6, 0.75), warmup_steps=1, cooldown_steps=1)
    with apply_pyramid_sparse_attention(pipeline, preset):
        assert sparse_steps.of_run(run, pipeline) == [1, 2]


@torch.no_grad()
def test_a_transformer_alone_needs_to_be_told_the_step(
    build: Callable[[str], Any], make_preset: Callable[..., Preset], wan_call: dict[str, torch.Tensor]
) -> None:
    transformer = build("wan21").transformer
    preset = make_preset((0.25, 0.4, 0.6, 0.75), warmup_steps=1, cooldown_steps=1)
    with apply_pyramid_sparse_attention(transformer, preset) as handle:
        with pytest.raises(StepError, match="at_step"):
            transformer(**wan_call)
        for step in range(3):
            with handle.at_step(step, 3):
                transformer(**wan_call)
        with pytest.raises(StepError):
            transformer(**wan_call)
        assert handle.stats().dense_steps() == [0, 2]
        assert sorted(handle.stats().density_per_step()) == [0, 1, 2]


@torch.no_grad()
def test_a_step_that_the_pipeline_does_not_tell_has_advice_that_helps(
    build: Callable[[str], Any], make_preset: Callable[..., Preset], wan_call: dict[str, torch.Tensor]
) -> None:
    pipeline = build("wan21")
    preset = make_preset((0.25, 0.4, 0.6, 0.75), warmup_steps=1)
    with apply_pyramid_sparse_attention(pipeline, preset) as handle:
        with pytest.raises(StepError, match=r"pipeline's UniPCMultistepScheduler does not tell it, .*at_step") as error:
            pipeline.transformer(**wan_call)
        assert "give apply_pyramid_sparse_attention the pipeline" not in str(error.value)
        with handle.at_step(0):
            pipeline.transformer(**wan_call)


@torch.no_grad()
def test_a_transformer_alone_runs_sparse_where_no_step_is_dense(
    build: Callable[[str], Any], sparse: Preset, wan_call: dict[str, torch.Tensor]
) -> None:
    transformer = build("wan21").transformer
    with apply_pyramid_sparse_attention(transformer, sparse) as handle:
        transformer(**wan_call)
        assert list(handle.stats().density_per_step()) == [None]
        assert handle.stats().dense_steps() == []


@pytest.mark.skipif(
    Version(diffusers.__version__) < Version("0.41"), reason="cache contexts carry the step since diffusers 0.41"
)
@torch.no_grad()
def test_a_cache_context_that_carries_the_step_is_enough(
    build: Callable[[str], Any], make_preset: Callable[..., Preset], wan_call: dict[str, torch.Tensor]
) -> None:
    transformer = build("wan21").transformer
    preset = make_preset((0.25, 0.4, 0.6, 0.75), warmup_steps=1, cooldown_steps=1)
    with apply_pyramid_sparse_attention(transformer, preset) as handle:
        for step in range(4):
            with transformer.cache_context("cond", step_index=step, num_inference_steps=4):
                transformer(**wan_call)
        assert handle.stats().dense_steps() == [0, 3]
