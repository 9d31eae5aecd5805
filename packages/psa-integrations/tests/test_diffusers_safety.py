"""What is touched, what is refused, and what survives."""

import copy
import io
import threading
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import ContextParallelConfig, FirstBlockCacheConfig, WanTransformer3DModel
from diffusers.hooks import apply_first_block_cache
from diffusers.models.attention_dispatch import AttentionBackendName
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from peft import LoraConfig, get_peft_model
from torch import nn

from psa_config import Preset
from psa_integrations import UnsupportedError, apply_pyramid_sparse_attention
from psa_integrations.diffusers.cogvideox import CogVideoXAdapter
from psa_integrations.diffusers.wan import WanAdapter
from psa_masks import VideoGrid

Build = Callable[..., Any]
Run = Callable[..., torch.Tensor]
MakePreset = Callable[..., Preset]
Call = dict[str, torch.Tensor]


def assert_same_but_for_rounding(out: torch.Tensor, expected: torch.Tensor) -> None:
    error = (out - expected).abs().max() / expected.abs().max()
    assert error <= 1e-5, f"relative error {error:.2e}"


@pytest.mark.parametrize("name", ["wan22_a14b", "cogvideox_5b"])
def test_only_self_attention_processors_change(name: str, build: Build, sparse: Preset) -> None:
    pipeline = build(name)
    before = dict(pipeline.transformer.attn_processors)
    with apply_pyramid_sparse_attention(pipeline, sparse):
        after = pipeline.transformer.attn_processors
        changed = {key for key in before if after[key] is not before[key]}
        assert changed == {key for key in before if ".attn1." in key}
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in pipeline.vae.modules())


@pytest.mark.parametrize("name", ["wan22_a14b", "cogvideox_5b"])
def test_remove_leaves_no_hook_and_no_attribute(name: str, build: Build, sparse: Preset) -> None:
    pipeline = build(name)
    attributes = set(vars(pipeline.transformer))
    with apply_pyramid_sparse_attention(pipeline, sparse) as handle:
        assert any(m._forward_hooks for m in pipeline.transformer.modules())
    assert handle.presets == {}
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in pipeline.transformer.modules())
    assert set(vars(pipeline.transformer)) == attributes


def test_applying_twice_is_refused_until_removed(build: Build, sparse: Preset) -> None:
    pipeline = build("wan22_a14b")
    handle = apply_pyramid_sparse_attention(pipeline, sparse)
    with pytest.raises(RuntimeError, match="already has pyramid sparse attention"):
        apply_pyramid_sparse_attention(pipeline.transformer_2, sparse)
    handle.remove()
    apply_pyramid_sparse_attention(pipeline, sparse).remove()


def test_a_handle_is_used_up_by_its_removal(build: Build, sparse: Preset) -> None:
    with apply_pyramid_sparse_attention(build("wan21"), sparse) as handle:
        pass
    handle.remove()
    with pytest.raises(RuntimeError, match="has been removed: call apply_pyramid_sparse_attention again"), handle:
        pass


def test_one_transformer_in_both_places_is_served_once(build: Build, run: Run, full: Preset) -> None:
    pipeline = build("wan22_a14b")
    pipeline.transformer_2 = pipeline.transformer
    expected = run(pipeline)
    with pytest.raises(ValueError, match="preset_2 is for a second transformer"):
        apply_pyramid_sparse_attention(pipeline, full, preset_2=full)
    with apply_pyramid_sparse_attention(pipeline, full) as handle:
        assert_same_but_for_rounding(run(pipeline), expected)
        assert list(handle.presets) == ["transformer"]
    assert torch.equal(run(pipeline), expected)


def test_copies_and_pickles_are_refused_until_removed(build: Build, run: Run, sparse: Preset) -> None:
    pipeline = build("wan21")
    expected = run(pipeline)
    transformer = pipeline.transformer
    with apply_pyramid_sparse_attention(pipeline, sparse):
        for take in (copy.deepcopy, lambda module: torch.save(module, io.BytesIO())):
            for module in (transformer, transformer.blocks[0], transformer.attn_processors):
                with pytest.raises(RuntimeError, match=r"cannot be copied or pickled with it: call remove\(\)"):
                    take(module)
    pipeline.transformer = copy.deepcopy(transformer)
    assert torch.equal(run(pipeline), expected)


@torch.no_grad()
def test_a_second_thread_is_refused_while_the_first_is_in_a_forward(
    build: Build, sparse: Preset, wan_call: Call
) -> None:
    transformer = build("wan21").transformer
    with apply_pyramid_sparse_attention(transformer, sparse):
        expected = transformer(**wan_call).sample
        started, refused = threading.Event(), threading.Event()

        def wait(module: nn.Module, args: Any) -> None:
            started.set()
            assert refused.wait(timeout=60)

        found = []
        first = threading.Thread(target=lambda: found.append(transformer(**wan_call).sample))
        hook = transformer.blocks[0].register_forward_pre_hook(wait)
        first.start()
        assert started.wait(timeout=60)
        with pytest.raises(RuntimeError, match="transformer is called from two threads at once"):
            transformer(**wan_call)
        refused.set()
        first.join()
        hook.remove()
        assert torch.equal(found[0], expected)
        # One after the other they may, after a failure too.
        failed = []

        def fail() -> None:
            with pytest.raises(TypeError) as error:
                transformer(**wan_call | {"encoder_hidden_states": None})
            failed.append(error)

        second = threading.Thread(target=fail)
        second.start()
        second.join()
        assert failed
        assert torch.equal(transformer(**wan_call).sample, expected)


class PassesOn(WanTransformer3DModel):
    """Names no argument itself."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


class NamesSome(WanTransformer3DModel):
    """Has the rest as keywords."""

    def forward(self, hidden_states: Any, timestep: Any, *, own: int = 0, **kwargs: Any) -> Any:
        return super().forward(hidden_states, timestep, **kwargs)


@pytest.mark.parametrize("subclass", [PassesOn, NamesSome])
@torch.no_grad()
def test_subclasses_with_a_signature_of_their_own(
    subclass: type, build: Build, full: Preset, sparse: Preset, wan_call: Call
) -> None:
    transformer = build("wan21").transformer
    expected = transformer(**wan_call).sample
    transformer.__class__ = subclass
    with apply_pyramid_sparse_attention(transformer, full):
        assert_same_but_for_rounding(transformer(**wan_call, return_dict=False)[0], expected)
    with apply_pyramid_sparse_attention(transformer, sparse):
        assert not torch.equal(transformer(**wan_call, return_dict=False)[0], expected)


def test_a_refusal_of_one_transformer_leaves_both_untouched(build: Build, run: Run, sparse: Preset) -> None:
    pipeline = build("wan22_a14b")
    expected = run(pipeline)
    pipeline.transformer_2.blocks[1].attn1.set_processor(OwnProcessor())
    with pytest.raises(UnsupportedError):
        apply_pyramid_sparse_attention(pipeline, sparse)
    assert torch.equal(run(pipeline), expected)


class OwnProcessor(WanAttnProcessor):
    """A processor that may compute something else."""


def test_an_unknown_processor_is_refused_or_left_alone(build: Build, run: Run, sparse: Preset) -> None:
    pipeline = build("wan21")
    pipeline.transformer.blocks[1].attn1.set_processor(OwnProcessor())
    expected = run(pipeline)
    with pytest.raises(UnsupportedError, match=r"layer 1 of transformer .* got OwnProcessor"):
        apply_pyramid_sparse_attention(pipeline, sparse)
    with pytest.warns(UserWarning, match="this transformer stays dense"):
        handle = apply_pyramid_sparse_attention(pipeline, sparse, on_unsupported="dense")
    assert torch.equal(run(pipeline), expected)
    assert handle.presets == {}


def test_a_head_dim_beyond_the_kernel_is_refused_at_once(build_transformer: Build, sparse: Preset) -> None:
    transformer = build_transformer("wan", num_attention_heads=1, attention_head_dim=264)
    with pytest.raises(UnsupportedError, match=r"head_dim must be at most 256 .* got 264 in layer 0"):
        apply_pyramid_sparse_attention(transformer, sparse)
    apply_pyramid_sparse_attention(transformer, sparse, impl="torch").remove()


def test_processors_replaced_by_fusing_cogvideox_are_noticed(build: Build, run: Run, sparse: Preset) -> None:
    pipeline = build("cogvideox_5b")
    expected = run(pipeline)
    handle = apply_pyramid_sparse_attention(pipeline, sparse)
    pipeline.transformer.fuse_qkv_projections()
    with pytest.raises(RuntimeError, match="fuse_qkv_projections"):
        run(pipeline)
    handle.remove()
    assert_same_but_for_rounding(run(pipeline), expected)
    # Puts back what was there when the projections were fused: the removed handle's processors.
    pipeline.transformer.unfuse_qkv_projections()
    assert torch.equal(run(pipeline), expected)
    with apply_pyramid_sparse_attention(pipeline, sparse) as again:
        assert not torch.equal(run(pipeline), expected)
        assert again.stats().dense_steps() == []


def test_a_processor_set_later_is_not_overwritten(build: Build, sparse: Preset) -> None:
    transformer = build("wan21").transformer
    handle = apply_pyramid_sparse_attention(transformer, sparse)
    own = OwnProcessor()
    transformer.blocks[0].attn1.set_processor(own)
    handle.remove()
    assert transformer.blocks[0].attn1.processor is own
    assert type(transformer.blocks[1].attn1.processor) is WanAttnProcessor


@torch.no_grad()
def test_an_attention_mask_is_refused_or_followed(build: Build, sparse: Preset) -> None:
    transformer = build("cogvideox_2b").transformer
    tokens = 16 + 3 * 8 * 12
    generator = torch.Generator().manual_seed(4)
    mask = torch.zeros(2, 1, tokens).masked_fill_(torch.arange(tokens) >= 64, -10000.0)
    call = {
        "hidden_states": torch.randn(1, 3, 4, 16, 24, generator=generator),
        "encoder_hidden_states": torch.randn(1, 16, 32, generator=generator),
        "timestep": torch.tensor([500]),
        "attention_kwargs": {"attention_mask": mask},
    }
    expected = transformer(**call).sample
    with (
        apply_pyramid_sparse_attention(transformer, sparse),
        pytest.raises(UnsupportedError, match="attention mask"),
    ):
        transformer(**call)
    with (
        apply_pyramid_sparse_attention(transformer, sparse, on_unsupported="dense") as handle,
        warnings.catch_warnings(record=True) as caught,
    ):
        warnings.simplefilter("always")
        for _ in range(2):
            assert torch.equal(transformer(**call).sample, expected)
        assert handle.stats().density == 1.0
    assert len([w for w in caught if "attention mask" in str(w.message)]) == 1


@torch.no_grad()
def test_a_mask_that_appears_inside_a_sparse_step_is_refused(
    build: Build, make_preset: MakePreset, wan_call: Call
) -> None:
    transformer = build("wan21").transformer
    mask = torch.zeros(1, 1, 128, 128)
    transformer.blocks[0].attn1.register_forward_pre_hook(lambda module, args: (*args[:2], mask, *args[3:]))
    preset = make_preset((0.25, 0.4, 0.6, 0.75), dense_layers=(0,))
    with (
        apply_pyramid_sparse_attention(transformer, preset, on_unsupported="dense"),
        pytest.raises(UnsupportedError, match="layer 0 of transformer was given an attention mask"),
    ):
        transformer(**wan_call)


@torch.no_grad()
@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"ring_degree": 2}, r"context parallelism by ring attention \(ring_degree 2\) never has a whole sequence"),
        ({"ulysses_degree": 2, "ulysses_anything": True}, "with ulysses_anything cuts heads and tokens into unequal"),
        ({"ulysses_degree": 4}, "must divide the heads, got 2 for ulysses_degree 4"),
    ],
)
def test_context_parallelism_that_cannot_be_served_is_refused_or_run_dense(
    changes: dict[str, Any], problem: str, build: Build, sparse: Preset, wan_call: Call
) -> None:
    transformer = build("wan21").transformer
    expected = transformer(**wan_call).sample
    # As enable_parallelism leaves it, without the processes that it needs.
    transformer._parallel_config = SimpleNamespace(context_parallel_config=ContextParallelConfig(**changes))
    with (
        apply_pyramid_sparse_attention(transformer, sparse),
        pytest.raises(UnsupportedError, match=problem),
    ):
        transformer(**wan_call)
    with (
        apply_pyramid_sparse_attention(transformer, sparse, on_unsupported="dense"),
        pytest.warns(UserWarning, match="context parallelism"),
    ):
        out = transformer(**wan_call).sample
    assert torch.equal(out, expected)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("cogvideox_5b", "no plan to cut it"),
        ("mochi", "no plan to cut it"),
        ("hunyuan", "no plan to cut it"),
        ("ltx", "fails under it where there is a text mask"),
    ],
)
def test_context_parallelism_of_other_models_is_refused_with_the_reason(
    name: str, reason: str, build: Build, run: Run, make_preset: MakePreset
) -> None:
    pipeline = build(name)
    pipeline.transformer._parallel_config = SimpleNamespace(
        context_parallel_config=ContextParallelConfig(ulysses_degree=2)
    )
    assert ("no plan" in reason) == (getattr(pipeline.transformer, "_cp_plan", None) is None)
    with apply_pyramid_sparse_attention(pipeline, make_preset((1.0,) * 4, warmup_steps=3)):
        assert steps_before_the_error(run, pipeline, UnsupportedError, f"context parallelism.*{reason}") == 0


def test_settings_of_the_dense_attention_reach_the_models_own_processor(build: Build, sparse: Preset) -> None:
    transformer = build("wan21").transformer
    attention = transformer.blocks[0].attn1
    original = attention.processor
    with apply_pyramid_sparse_attention(transformer, sparse):
        attention.set_attention_backend("_native_math")
        attention.processor._parallel_config = "as diffusers sets it"
        assert attention.processor._attention_backend == AttentionBackendName("_native_math")
    assert original._attention_backend == AttentionBackendName("_native_math")
    assert original._parallel_config == "as diffusers sets it"


@torch.no_grad()
def test_a_cache_works_unless_the_token_order_changes_under_it(
    build: Build, full: Preset, make_preset: MakePreset, wan_call: Call
) -> None:
    transformer = build("wan21").transformer
    expected = transformer(**wan_call).sample
    transformer.enable_cache(FirstBlockCacheConfig(threshold=0.0))
    with apply_pyramid_sparse_attention(transformer, full) as handle, transformer.cache_context("cond"):
        assert_same_but_for_rounding(transformer(**wan_call).sample, expected)
        assert handle.stats().dense_steps() == []
    with (
        apply_pyramid_sparse_attention(transformer, make_preset((1.0,) * 4, warmup_steps=1)) as handle,
        handle.at_step(2, 4),
        transformer.cache_context("cond"),
        pytest.raises(UnsupportedError, match="cache"),
    ):
        transformer(**wan_call)


def steps_before_the_error(run: Run, pipeline: Any, error: type[Exception], match: str) -> int:
    done: list[int] = []

    def note(pipe: Any, step: int, timestep: Any, tensors: Any) -> dict[str, Any]:
        done.append(step)
        return {}

    with pytest.raises(error, match=match):
        run(pipeline, steps=5, callback_on_step_end=note)
    return len(done)


@pytest.mark.parametrize("by_function", [False, True])
def test_a_cache_is_refused_before_the_dense_steps(
    by_function: bool, build: Build, run: Run, make_preset: MakePreset
) -> None:
    pipeline = build("wan21")
    config = FirstBlockCacheConfig(threshold=0.0)
    if by_function:
        apply_first_block_cache(pipeline.transformer, config)
    else:
        pipeline.transformer.enable_cache(config)
    with apply_pyramid_sparse_attention(pipeline, make_preset((1.0,) * 4, warmup_steps=3)):
        assert steps_before_the_error(run, pipeline, UnsupportedError, "cache") == 0


@pytest.mark.parametrize("name", ["wan21", "cogvideox_5b"])
def test_triton_without_a_gpu_is_refused_before_the_dense_steps(
    name: str, build: Build, run: Run, make_preset: MakePreset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    pipeline = build(name)
    with apply_pyramid_sparse_attention(pipeline, make_preset((1.0,) * 4, warmup_steps=3), impl="triton"):
        assert steps_before_the_error(run, pipeline, ValueError, "impl='triton' needs tensors on a GPU") == 0


@pytest.mark.parametrize("compiled", [False, True])
def test_more_clusters_than_tokens_are_refused_before_the_dense_steps(
    compiled: bool, build: Build, make_preset: MakePreset, wan_call: Call
) -> None:
    transformer = build("wan21").transformer
    sparse = make_preset((0.25, 0.4, 0.6, 0.75), warmup_steps=1, rearrange_method="Semantic", num_clusters=129)
    with apply_pyramid_sparse_attention(transformer, sparse) as handle:
        if compiled:
            transformer.compile(backend="eager")
        with (
            handle.at_step(0, 2),
            pytest.raises(ValueError, match=r"num_clusters must be at most the 128 video tokens of .*, got 129"),
        ):
            transformer(**wan_call)
        assert handle.stats().calls == 0
    torch._dynamo.reset()  # what raised while it was traced would run uncompiled from now on


def test_compiled_models_are_refused(build: Build, sparse: Preset) -> None:
    transformer = build("wan21").transformer
    with pytest.raises(RuntimeError, match="compiled"):
        apply_pyramid_sparse_attention(torch.compile(transformer), sparse)
    transformer.compile()
    with pytest.raises(RuntimeError, match="compiled"):
        apply_pyramid_sparse_attention(transformer, sparse)


@pytest.mark.parametrize("method", ["Gilbert", "Semantic"])
@torch.no_grad()
def test_a_transformer_compiled_in_place_is_told_the_step(
    method: str, build: Build, make_preset: MakePreset, wan_call: Call
) -> None:
    transformer = build("wan21").transformer
    sparse = make_preset((0.25, 0.4, 0.6, 0.75), warmup_steps=1, rearrange_method=method, num_clusters=9)
    with apply_pyramid_sparse_attention(transformer, sparse) as handle:
        expected = []
        for step in range(3):
            with handle.at_step(step, 3):
                expected.append(transformer(**wan_call).sample)
        transformer.compile(backend="eager", fullgraph=True)
        for step in range(3):
            with handle.at_step(step, 3):
                assert_same_but_for_rounding(transformer(**wan_call).sample, expected[step])
        assert handle.stats().dense_steps() == [0]
        assert handle.stats().calls == 2 * 3 * 2
        with pytest.raises(torch._dynamo.exc.Unsupported, match=r"denoising step outside of the graph.*at_step"):
            transformer(**wan_call)


def test_a_step_found_outside_of_the_graph_breaks_it(build: Build, run: Run, make_preset: MakePreset) -> None:
    # This pipeline opens no cache context.
    pipeline = build("hunyuan_token_replace")
    preset = make_preset((0.25, 0.4, 0.6, 0.75), warmup_steps=1)
    with apply_pyramid_sparse_attention(pipeline, preset) as handle:
        expected = run(pipeline)
        pipeline.transformer.compile(backend="eager")
        assert_same_but_for_rounding(run(pipeline), expected)
        assert handle.stats().dense_steps() == [0]


@torch.no_grad()
def test_more_tokens_than_the_input_has_are_refused(build: Build, make_preset: MakePreset, wan_call: Call) -> None:
    transformer = build("wan21").transformer
    transformer.blocks[1].attn1.register_forward_pre_hook(
        lambda module, args: (torch.cat((args[0], args[0]), dim=1), None, None, None)
    )
    with (
        apply_pyramid_sparse_attention(transformer, make_preset((1.0,) * 4)),
        pytest.raises(ValueError, match=r"layer 1 must get the 128 tokens of VideoGrid.*got 256"),
    ):
        transformer(**wan_call)


@torch.no_grad()
def test_timesteps_that_are_not_one_a_token_are_refused(build: Build, full: Preset, wan_call: Call) -> None:
    transformer = build("wan21").transformer
    wan_call["timestep"] = torch.zeros(1, 127)
    with (
        apply_pyramid_sparse_attention(transformer, full),
        pytest.raises(ValueError, match="timestep must have one entry for each of the 128 video tokens, got 127"),
    ):
        transformer(**wan_call)


@torch.no_grad()
def test_outside_of_a_forward_nothing_is_reordered(build: Build, sparse: Preset, wan_call: Call) -> None:
    transformer = build("wan21").transformer
    expected = transformer.rope(wan_call["hidden_states"])
    with apply_pyramid_sparse_attention(transformer, sparse):
        transformer(**wan_call)
        tables = transformer.rope(wan_call["hidden_states"])
    assert all(torch.equal(*pair) for pair in zip(tables, expected, strict=True))


def test_a_grid_that_is_not_that_of_the_tokens_is_refused_before_the_dense_steps(
    build: Build, make_preset: MakePreset
) -> None:
    transformer = build("ltx").transformer
    with apply_pyramid_sparse_attention(transformer, make_preset((1.0,) * 4, warmup_steps=3)) as handle:
        call = {
            "hidden_states": torch.zeros(1, 24, 8),
            "encoder_hidden_states": torch.zeros(1, 16, 32),
            "timestep": torch.tensor([500]),
            "encoder_attention_mask": None,
            "num_frames": 2,
            "height": 3,
            "width": 5,
        }
        with handle.at_step(0, 5), pytest.raises(ValueError, match=r"24 tokens of hidden_states, got 2 x 3 x 5"):
            transformer(**call)


@torch.no_grad()
def test_tokens_whose_grid_is_not_told_are_refused_or_run_dense(build: Build, sparse: Preset) -> None:
    transformer = build("ltx").transformer
    generator = torch.Generator().manual_seed(4)
    call = {
        "hidden_states": torch.randn(1, 70, 8, generator=generator),
        "encoder_hidden_states": torch.randn(1, 16, 32, generator=generator),
        "timestep": torch.tensor([500]),
        "encoder_attention_mask": None,
        "video_coords": torch.rand(1, 3, 70, generator=generator),
    }
    expected = transformer(**call).sample
    with apply_pyramid_sparse_attention(transformer, sparse), pytest.raises(UnsupportedError, match="how many frames"):
        transformer(**call)
    with (
        apply_pyramid_sparse_attention(transformer, sparse, on_unsupported="dense") as handle,
        pytest.warns(UserWarning, match="how many frames"),
    ):
        assert torch.equal(transformer(**call).sample, expected)
    assert handle.stats().density == 1.0


@pytest.mark.parametrize("patch_size_t", [None, 2])
def test_grids_are_read_from_the_input(build_transformer: Build, patch_size_t: int | None) -> None:
    wan = build_transformer("wan")
    call = {"hidden_states": torch.zeros(2, 16, 5, 14, 18)}
    assert WanAdapter().grid(wan, call) == VideoGrid(frames=5, height=7, width=9)
    cogvideox = build_transformer("cogvideox", patch_size_t=patch_size_t, sample_frames=17)
    call = {"hidden_states": torch.zeros(2, 4, 4, 14, 18), "encoder_hidden_states": torch.zeros(2, 11, 32)}
    assert CogVideoXAdapter().grid(cogvideox, call) == VideoGrid(
        frames=4 // (patch_size_t or 1), height=7, width=9, text=11, text_first=True
    )


def test_what_a_wrapper_holds_is_named_and_served(build: Build, run: Run, sparse: Preset) -> None:
    pipeline = build("wan21")
    with apply_pyramid_sparse_attention(pipeline.transformer, sparse):
        expected = run(pipeline)
    wrapped = get_peft_model(pipeline.transformer, LoraConfig(target_modules=["to_q"]))
    with pytest.raises(TypeError, match=r"PeftModel, which holds a WanTransformer3DModel: .* `\.base_model\.model`"):
        apply_pyramid_sparse_attention(wrapped, sparse)
    with pytest.raises(TypeError, match=r"Sequential, which holds a WanTransformer3DModel: .* `\.1`"):
        apply_pyramid_sparse_attention(nn.Sequential(nn.Identity(), pipeline.transformer), sparse)
    # A fresh LoRA adds nothing.
    with apply_pyramid_sparse_attention(wrapped.base_model.model, sparse):
        assert_same_but_for_rounding(run(pipeline), expected)


def test_wrong_arguments(build: Build, sparse: Preset, make_preset: MakePreset) -> None:
    pipeline = build("wan21")
    for model in (object(), nn.Linear(2, 2), None):
        with pytest.raises(TypeError, match="transformer"):
            apply_pyramid_sparse_attention(model, sparse)
    with pytest.raises(ValueError, match=r"on_unsupported must be one of .* got 'ignore'"):
        apply_pyramid_sparse_attention(pipeline, sparse, on_unsupported="ignore")
    with pytest.raises(ValueError, match=r"impl must be one of 'triton', .* got 'tritn'"):
        apply_pyramid_sparse_attention(pipeline, sparse, impl="tritn")
    with pytest.raises(ValueError, match="preset_2 is for a second transformer"):
        apply_pyramid_sparse_attention(pipeline, sparse, preset_2=sparse)
    with pytest.raises(ValueError, match=r"dense_layers must be below the 2 layers .* got \[2, 7\]"):
        apply_pyramid_sparse_attention(pipeline, make_preset((1.0,) * 4, dense_layers=(0, 2, 7)))
    with pytest.raises(ValueError, match=r"preset must name its model, as 'Model/preset'.* got 'psa_balanced'"):
        apply_pyramid_sparse_attention(pipeline, "psa_balanced")
    with pytest.raises(TypeError, match=r"preset must be a psa_config.Preset or a str, got dict"):
        apply_pyramid_sparse_attention(pipeline, {})
    apply_pyramid_sparse_attention(pipeline, sparse).remove()
