"""The pipeline: sampling, determinism, saving and loading, and what it refuses."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from psa_integrations.tiny_wan import TinyWanPipeline, build_random_pipeline, load_pipeline
from psa_integrations.tiny_wan.captions import encode_captions
from psa_integrations.tiny_wan.model import with_motion

SMALL: dict[str, Any] = {"num_attention_heads": 1, "num_layers": 1, "ffn_dim": 32}
CALL: dict[str, Any] = {"num_frames": 3, "height": 16, "width": 24, "num_inference_steps": 2}
# A matrix product of other alignment or batch rounds its last bit differently, and each step passes that on.
VIDEO_ROUNDING = 256 * np.finfo(np.float32).eps


@pytest.fixture
def pipeline() -> TinyWanPipeline:
    built = build_random_pipeline(**SMALL)
    built.set_progress_bar_config(disable=True)
    return built


def generate(pipeline: TinyWanPipeline, prompt: str | list[str] = "a red ring", seed: int = 0, **call: Any) -> Any:
    generator = torch.Generator().manual_seed(seed)
    return pipeline(prompt, generator=generator, **{**CALL, **call}).frames


def assert_same_pipeline(left: TinyWanPipeline, right: TinyWanPipeline) -> None:
    """Weights bit for bit; videos up to rounding, as weights mapped from a file may be aligned otherwise."""
    for part in ("transformer", "text_encoder"):
        expected = getattr(right, part).state_dict()
        for name, tensor in getattr(left, part).state_dict().items():
            assert torch.equal(tensor, expected.pop(name)), name
        assert not expected
    assert np.abs(generate(left) - generate(right)).max() < VIDEO_ROUNDING


def test_output_types_agree(pipeline: TinyWanPipeline) -> None:
    array = generate(pipeline)
    assert array.shape == (1, 3, 16, 24, 3)
    assert array.dtype == np.float32
    assert array.min() >= 0
    assert array.max() <= 1
    tensor = generate(pipeline, output_type="pt")
    assert np.array_equal(tensor.permute(0, 1, 3, 4, 2).numpy(), array)
    images = generate(pipeline, output_type="pil")
    assert np.array_equal(np.asarray(images[0][2]), (array[0, 2] * 255).round().astype(np.uint8))
    latent = generate(pipeline, output_type="latent")
    assert torch.equal((latent / 2 + 0.5).clamp(0, 1).transpose(1, 2), tensor)


def test_the_generator_decides_and_the_global_state_is_left_alone(pipeline: TinyWanPipeline) -> None:
    before = torch.get_rng_state()
    first = generate(pipeline)
    assert np.array_equal(generate(pipeline), first)
    assert not np.array_equal(generate(pipeline, seed=1), first)
    assert torch.equal(torch.get_rng_state(), before)


def test_prompt_negative_prompt_and_guidance_matter(pipeline: TinyWanPipeline) -> None:
    first = generate(pipeline)
    assert not np.array_equal(generate(pipeline, "a blue ring"), first)
    assert not np.array_equal(generate(pipeline, negative_prompt="a blue ring"), first)
    assert not np.array_equal(generate(pipeline, guidance_scale=1.0), first)
    assert np.array_equal(generate(pipeline, negative_prompt=""), first)


def test_guidance_away_from_the_prompt_itself_is_no_guidance(pipeline: TinyWanPipeline) -> None:
    plain = generate(pipeline, guidance_scale=1.0)
    assert np.array_equal(generate(pipeline, negative_prompt="a red ring"), plain)


def test_a_batch_is_its_prompts_one_by_one(pipeline: TinyWanPipeline) -> None:
    prompts = ["a red ring", "a blue square"]
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    both = pipeline(prompts, generator=generators, **CALL).frames
    for i, prompt in enumerate(prompts):
        alone = generate(pipeline, prompt, seed=3 + i)[0]
        assert np.abs(both[i] - alone).max() < VIDEO_ROUNDING


def test_one_euler_step_is_noise_minus_the_predicted_flow(pipeline: TinyWanPipeline) -> None:
    noise = torch.randn((1, 3, 3, 16, 24), generator=torch.Generator().manual_seed(0))
    seen: list[torch.Tensor] = []
    hook = pipeline.transformer.register_forward_hook(lambda _module, _args, output: seen.append(output[0]))
    result = pipeline(
        "a red ring",
        latents=noise,
        guidance_scale=1.0,
        output_type="latent",
        **{**CALL, "num_inference_steps": 1},
    ).frames
    hook.remove()
    assert torch.equal(result, noise - seen[0])


def test_the_transformer_sees_which_way_the_caption_points() -> None:
    video = torch.randn((5, 3, 3, 8, 12), generator=torch.Generator().manual_seed(0))
    seen = with_motion(video, encode_captions(["left", "right", "up", "down", "a red ring"]))
    assert seen.shape == (5, 4, 3, 8, 12)
    assert torch.equal(seen[:, :3], video)
    motion, time = seen[:, 3], torch.tensor([-1.0, 0, 1])[:, None, None]
    y, x = torch.linspace(-1, 1, 8)[:, None], torch.linspace(-1, 1, 12)
    expected = [-time * x + 0 * y, time * x + 0 * y, -time * y + 0 * x, time * y + 0 * x, 0 * time * y * x]
    for field, field_expected in zip(motion, expected, strict=True):
        assert torch.equal(field, field_expected)


def test_the_step_is_told_to_the_transformer(pipeline: TinyWanPipeline) -> None:
    told = []
    enter = pipeline.transformer.cache_context

    def spy(name: str, **where: Any) -> Any:
        told.append((name, where["step_index"], where["num_inference_steps"], round(where["sigma"], 3)))
        return enter(name, **where)

    pipeline.transformer.cache_context = spy
    generate(pipeline)
    sigma = round(float(pipeline.scheduler.sigmas[1]), 3)
    assert told == [
        ("cond", 0, 2, 1.0),
        ("uncond", 0, 2, 1.0),
        ("cond", 1, 2, sigma),
        ("uncond", 1, 2, sigma),
    ]


def test_an_older_transformer_is_told_the_name_alone(pipeline: TinyWanPipeline) -> None:
    expected, names = generate(pipeline), []
    enter = pipeline.transformer.cache_context

    def older(name: str) -> Any:
        names.append(name)
        return enter(name)

    pipeline.transformer.cache_context = older
    assert np.array_equal(generate(pipeline), expected)
    assert names == ["cond", "uncond"] * 2


def test_the_callback_sees_and_replaces_the_latents(pipeline: TinyWanPipeline) -> None:
    steps = []

    def callback(_pipeline: Any, step: int, _timestep: torch.Tensor, state: dict[str, Any]) -> dict[str, Any]:
        steps.append(step)
        return {"latents": torch.zeros_like(state["latents"])}

    video = generate(pipeline, callback_on_step_end=callback, output_type="latent")
    assert steps == [0, 1]
    assert not video.any()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"height": 30}, "height must be a positive multiple of 4, got 30"),
        ({"width": 0}, "width must be a positive multiple of 4, got 0"),
        ({"num_frames": 0}, "num_frames must be a positive multiple of 1, got 0"),
        ({"num_frames": 129}, "num_frames must be at most 128, got 129"),
        ({"height": 516}, "height must be at most 512, got 516"),
        ({"negative_prompt": "a zebra"}, "negative_prompt has the word 'zebra'"),
        ({"num_inference_steps": 0}, "num_inference_steps must be at least 1, got 0"),
        ({"output_type": "gif"}, "output_type must be .* got 'gif'"),
        ({"negative_prompt": ["a", "b"]}, r"negative_prompt must hold one caption a prompt \(1\), got 2"),
        ({"latents": torch.zeros(1)}, r"latents must have shape \(1, 3, 3, 16, 24\), got \(1,\)"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_calls_are_refused(pipeline: TinyWanPipeline, call: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate(pipeline, **call)


def test_an_empty_list_of_prompts_is_refused(pipeline: TinyWanPipeline) -> None:
    with pytest.raises(ValueError, match="prompt must hold at least one caption"):
        generate(pipeline, [])


def test_saving_and_loading(pipeline: TinyWanPipeline, tmp_path: Path) -> None:
    pipeline.save_pretrained(tmp_path)
    assert not list(tmp_path.rglob("*.bin"))
    assert len(list(tmp_path.rglob("*.safetensors"))) == 2
    loaded = load_pipeline(folder=tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert loaded.scheduler.config.shift == pipeline.scheduler.config.shift
    assert_same_pipeline(loaded, pipeline)

    half = load_pipeline(dtype=torch.bfloat16, folder=tmp_path)
    half.set_progress_bar_config(disable=True)
    assert half.transformer.dtype == torch.bfloat16
    assert np.isfinite(generate(half)).all()


def test_diffusers_loads_it_too(pipeline: TinyWanPipeline, tmp_path: Path) -> None:
    pipeline.save_pretrained(tmp_path)
    loaded = TinyWanPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert_same_pipeline(loaded, pipeline)


def test_a_folder_without_weights_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no tiny-wan weights"):
        load_pipeline(folder=tmp_path)


def test_random_pipelines_follow_their_seed_and_leave_the_global_state() -> None:
    before = torch.get_rng_state()
    first, same, other = (build_random_pipeline(seed=seed, **SMALL) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    weights = [pipeline.transformer.proj_out.weight for pipeline in (first, same, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
