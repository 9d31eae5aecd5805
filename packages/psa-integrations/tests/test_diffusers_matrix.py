"""Every feature on every form of every model. The README's table of what is supported is made of these tests."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import accelerate
import diffusers
import pytest
import torch
from accelerate.hooks import remove_hook_from_module
from diffusers import FirstBlockCacheConfig
from feature_matrix import feature, forms_where, with_table
from packaging.version import Version
from peft import LoraConfig
from tiny_pipelines import FORMS, build, sample

from psa_config import Preset
from psa_integrations import apply_pyramid_sparse_attention
from psa_integrations.diffusers import site
from psa_integrations.diffusers.adapter import Processor

MakePreset = Callable[..., Preset]

SPARSE = (0.25, 0.4, 0.6, 0.75)
TOKENS = (3, 6, 8)
FUSES_NOTHING = forms_where(
    lambda form: form.model in ("HunyuanVideo", "Mochi"), "diffusers has no fused projections for this model"
)


def run(pipeline: Any, form: str, tokens: tuple[int, int, int] = TOKENS, **options: Any) -> torch.Tensor:
    return sample(pipeline, **FORMS[form].size(*tokens), **options)


def transformers(pipeline: Any) -> list[Any]:
    return [part for name in ("transformer", "transformer_2") if (part := getattr(pipeline, name, None)) is not None]


def distance(out: torch.Tensor, expected: torch.Tensor) -> float:
    return float((out - expected).abs().max() / expected.abs().max())


def assert_same_but_for_rounding(out: torch.Tensor, expected: torch.Tensor) -> None:
    """Sums in another order: within 1e-5 of the largest value, some hundred times float32's rounding unit."""
    assert out.shape == expected.shape
    assert distance(out, expected) <= 1e-5


def assert_full_run_is_as(
    expected: torch.Tensor, pipeline: Any, form: str, full: Preset, tokens: tuple[int, int, int] = TOKENS
) -> None:
    """With `full` on it, all of it sparse, the pipeline gives `expected`."""
    with apply_pyramid_sparse_attention(pipeline, full) as handle:
        assert_same_but_for_rounding(run(pipeline, form, tokens), expected)
        assert handle.stats().calls > 0
        assert handle.stats().dense_steps() == []


@feature("every block at level 1, tokens reordered: the untouched output to 1e-5")
def test_every_block_at_level_1(form: str, full: Preset) -> None:
    pipeline = build(form)
    expected = run(pipeline, form, batch=2)
    with apply_pyramid_sparse_attention(pipeline, full) as handle:
        assert_same_but_for_rounding(run(pipeline, form, batch=2), expected)
        assert handle.stats().density == 1.0
        assert handle.stats().dense_steps() == []


@feature("a sparse preset changes the output; `remove()` gives back its bits")
def test_sparse_and_removed(form: str, sparse: Preset) -> None:
    pipeline = build(form)
    expected = run(pipeline, form)
    attributes = [set(vars(transformer)) for transformer in transformers(pipeline)]
    processors = [module.processor for module in modules(pipeline) if hasattr(module, "processor")]
    handle = apply_pyramid_sparse_attention(pipeline, sparse)
    out = run(pipeline, form)
    assert out.isfinite().all()
    # The untouched pipeline and the one at level 1 differ by rounding only, see above.
    assert distance(out, expected) > 1e-4
    assert 0.3 < handle.stats().density < 0.8
    handle.remove()
    assert torch.equal(run(pipeline, form), expected)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in modules(pipeline))
    assert [set(vars(transformer)) for transformer in transformers(pipeline)] == attributes
    after = [module.processor for module in modules(pipeline) if hasattr(module, "processor")]
    assert all(one is other for one, other in zip(after, processors, strict=True))


def modules(pipeline: Any) -> Iterator[torch.nn.Module]:
    for transformer in transformers(pipeline):
        yield from transformer.modules()


@feature(
    "padded text is not read, whatever stands in it",
    but=forms_where(lambda form: not form.masked_text, "the transformer is not told which text tokens are padding"),
)
def test_padding_is_not_read(form: str, sparse: Preset) -> None:
    pipeline = build(form)
    with apply_pyramid_sparse_attention(pipeline, sparse):
        expected = run(pipeline, form, batch=2)
        assert torch.equal(run(pipeline, form, batch=2, noise_in_padding=True), expected)
        assert not torch.equal(run(pipeline, form, batch=2, noise_in_text=True), expected)


class SparseSteps:
    """Notes at which steps sparse attention really ran, by the pipeline's own callback."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.step = 0
        self.seen: set[int] = set()
        attend = site.attend_by

        def note(*args: Any, **options: Any) -> Any:
            self.seen.add(self.step)
            return attend(*args, **options)

        monkeypatch.setattr(site, "attend_by", note)

    def of_run(self, pipeline: Any, form: str, **options: Any) -> list[int]:
        self.step, self.seen = 0, set()
        run(pipeline, form, callback_on_step_end=self.next_step, **options)
        return sorted(self.seen)

    def next_step(self, pipe: Any, step: int, timestep: Any, tensors: Any) -> dict[str, Any]:
        self.step = step + 1
        return {}


def interrupt(pipe: Any, step: int, timestep: Any, tensors: Any) -> dict[str, Any]:
    if step == 1:
        raise KeyboardInterrupt
    return {}


@feature("exactly the configured dense steps: guidance on, off, batched, run after run, other lengths, interrupted")
def test_dense_steps(form: str, make_preset: MakePreset, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = build(form)
    steps = SparseSteps(monkeypatch)
    preset = make_preset(SPARSE, warmup_steps=2, cooldown_steps=1)
    with apply_pyramid_sparse_attention(pipeline, preset) as handle:
        assert steps.of_run(pipeline, form, steps=5) == [2, 3]
        with pytest.raises(KeyboardInterrupt):
            run(pipeline, form, steps=5, callback_on_step_end=interrupt)
        for options, expected in (
            ({"steps": 5}, [2, 3]),
            ({"steps": 4, "guidance": 1.0}, [2]),
            ({"steps": 5, "guidance": 1.0, "batch": 2}, [2, 3]),
            ({"steps": 3}, []),
        ):
            handle.reset_stats()
            assert steps.of_run(pipeline, form, **options) == expected
            stats = handle.stats()
            dense = {step for name in stats.transformers for step in stats.dense_steps(name)}
            assert dense == set(range(options["steps"])) - set(expected)


@feature("dense steps and a dense preset keep the untouched bits; dense layers change nothing")
def test_dense_parts(form: str, make_preset: MakePreset) -> None:
    pipeline = build(form)

    def latents_of_steps() -> list[torch.Tensor]:
        seen = []

        def keep(pipe: Any, step: int, timestep: Any, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
            seen.append(tensors["latents"])
            return {}

        run(pipeline, form, callback_on_step_end=keep)
        return seen

    untouched = latents_of_steps()
    with apply_pyramid_sparse_attention(pipeline, make_preset(SPARSE, warmup_steps=2)):
        latents = latents_of_steps()
    assert [torch.equal(*pair) for pair in zip(latents, untouched, strict=True)] == [True, True, False]
    with apply_pyramid_sparse_attention(pipeline, "Wan2.1_1.3b/baseline"):
        assert torch.equal(latents_of_steps()[-1], untouched[-1])
    with apply_pyramid_sparse_attention(pipeline, make_preset(SPARSE, dense_layers=(0, 1))) as handle:
        assert_same_but_for_rounding(latents_of_steps()[-1], untouched[-1])
        assert handle.stats().dense_layers() == [0, 1]


@feature("odd, portrait, one-frame and one-column sizes, even frame counts of tokens")
def test_sizes(form: str, full: Preset) -> None:
    pipeline = build(form)
    # The pipeline that concatenates latents gives away all frames but the first.
    least = 2 if form == "hunyuan_latent_concat" else 1
    for tokens in ((3, 5, 7), (2, 9, 4), (least, 6, 8), (4, 9, 1)):
        assert_full_run_is_as(run(pipeline, form, tokens), pipeline, form, full, tokens)


@feature("LoRA (peft) loaded before or after")
def test_lora(form: str, full: Preset) -> None:
    pipeline = build(form)
    plain = run(pipeline, form)

    def load() -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            for transformer in transformers(pipeline):
                transformer.add_adapter(
                    LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False)
                )

    with apply_pyramid_sparse_attention(pipeline, full) as handle:
        load()
        after = run(pipeline, form)
        assert handle.stats().dense_steps() == []
    expected = run(pipeline, form)
    assert distance(expected, plain) > 1e-4
    assert_same_but_for_rounding(after, expected)
    assert_full_run_is_as(expected, pipeline, form, full)


@feature(
    "`fuse_qkv_projections` before",
    but=FUSES_NOTHING,
)
def test_fused_before(form: str, full: Preset) -> None:
    pipeline = build(form)
    expected = run(pipeline, form)
    for transformer in transformers(pipeline):
        transformer.fuse_qkv_projections()
    assert_full_run_is_as(expected, pipeline, form, full)


@feature(
    "`fuse_qkv_projections` after",
    but=FUSES_NOTHING
    | forms_where(
        lambda form: form.model.startswith("CogVideoX"),
        "diffusers replaces the processors, which is an error that says so: remove, fuse, apply",
    ),
)
def test_fused_after(form: str, full: Preset) -> None:
    pipeline = build(form)
    expected = run(pipeline, form)
    with apply_pyramid_sparse_attention(pipeline, full) as handle:
        for transformer in transformers(pipeline):
            transformer.fuse_qkv_projections()
        assert_same_but_for_rounding(run(pipeline, form), expected)
        assert handle.stats().dense_steps() == []


@feature("model offload: accelerate's hooks installed anew after each run")
def test_model_offload(form: str, full: Preset) -> None:
    pipeline = build(form)
    expected = run(pipeline, form)

    def install() -> None:
        for transformer in transformers(pipeline):
            remove_hook_from_module(transformer, recurse=True)
            accelerate.cpu_offload_with_hook(transformer, torch.device("cpu"))

    with apply_pyramid_sparse_attention(pipeline, full) as handle:
        for _ in range(2):
            # What pipelines do at the end of a run with model offload, which itself wants a GPU.
            install()
            handle.reset_stats()
            assert_same_but_for_rounding(run(pipeline, form), expected)
            assert handle.stats().calls > 0
            assert handle.stats().dense_steps() == []


@feature("sequential offload: weights on the meta device between calls")
def test_sequential_offload(form: str, full: Preset) -> None:
    pipeline = build(form)
    expected = run(pipeline, form)
    with apply_pyramid_sparse_attention(pipeline, full) as handle:
        # What the pipeline's own method does, which itself wants a GPU.
        for part in pipeline.components.values():
            if isinstance(part, torch.nn.Module):
                accelerate.cpu_offload(part, execution_device=torch.device("cpu"))
        assert {parameter.device.type for parameter in pipeline.transformer.parameters()} == {"meta"}
        assert_same_but_for_rounding(run(pipeline, form), expected)
        assert handle.stats().dense_steps() == []


@pytest.mark.skipif(
    Version(diffusers.__version__) < Version("0.41"), reason="diffusers below 0.41 offloads groups with a GPU only"
)
@feature("group offload by block and by leaf, before or after")
def test_group_offload(form: str, full: Preset) -> None:
    for offload in ({"offload_type": "block_level", "num_blocks_per_group": 1}, {"offload_type": "leaf_level"}):
        before, after = build(form), build(form)
        expected = run(before, form)
        for transformer in transformers(before):
            transformer.enable_group_offload(onload_device=torch.device("cpu"), **offload)
        assert_full_run_is_as(expected, before, form, full)
        with apply_pyramid_sparse_attention(after, full) as handle:
            for transformer in transformers(after):
                transformer.enable_group_offload(onload_device=torch.device("cpu"), **offload)
            assert_same_but_for_rounding(run(after, form), expected)
            assert handle.stats().dense_steps() == []


@feature("layerwise casting: weights kept in float8")
def test_layerwise_casting(form: str, full: Preset) -> None:
    pipeline = build(form)
    for transformer in transformers(pipeline):
        transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert any(parameter.dtype == torch.float8_e4m3fn for parameter in pipeline.transformer.parameters())
    assert_full_run_is_as(run(pipeline, form), pipeline, form, full)


@feature(
    "FirstBlockCache, with no dense step or no reordering",
    but=forms_where(
        lambda form: form.model == "HunyuanVideo" and form.image,
        "the pipeline opens no cache context, so diffusers' caches do not run in it",
    ),
)
def test_first_block_cache(form: str, full: Preset) -> None:
    plain = run(build(form), form)
    pipeline = build(form)  # anew: diffusers below 0.41 overlooks a cache enabled after the first run
    for transformer in transformers(pipeline):
        transformer.enable_cache(FirstBlockCacheConfig(threshold=1e9))
    expected = run(pipeline, form)
    assert distance(expected, plain) > 1e-4
    with apply_pyramid_sparse_attention(pipeline, full) as handle:
        assert_same_but_for_rounding(run(pipeline, form), expected)
        calls = {layer.layer: 0 for layer in handle.stats().layers}
        for layer in handle.stats().layers:
            calls[layer.layer] += layer.calls
        assert calls[1] < calls[0]
        assert handle.stats().dense_steps() == []


@feature("bfloat16, and query and key in float32 beside it")
def test_mixed_dtypes(form: str, sparse: Preset) -> None:
    pipeline = build(form).to(torch.bfloat16)
    for transformer in transformers(pipeline):
        if hasattr(transformer, "rope"):
            transformer.rope.float()  # as `from_pretrained` leaves its tables
    with apply_pyramid_sparse_attention(pipeline, sparse) as handle:
        expected = run(pipeline, form, dtype=torch.bfloat16)
        assert expected.isfinite().all()
        served = [module for module in modules(pipeline) if isinstance(getattr(module, "processor", None), Processor)]
        assert len(served) == 2 * len(transformers(pipeline))
        for attention in served:
            for norm in (attention.norm_q, attention.norm_k):
                norm.register_forward_hook(lambda module, args, output: output.float())
        # Cast behind the rotary embedding, whose own arithmetic is in float32: the same numbers.
        assert torch.equal(run(pipeline, form, dtype=torch.bfloat16), expected)
        assert handle.stats().dense_steps() == []


TEXT_ONLY = forms_where(lambda form: form.image, "compiled models are tested with text to video alone")
MOCHI_BREAKS = forms_where(
    lambda form: form.model == "Mochi",
    "without dense steps: in them diffusers' own attention of this model breaks the graph, with and without PSA",
)


class Graphs:
    """A backend of torch.compile that runs graphs as they are, and counts them."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        self.count += 1
        return graph.forward


def graphs_of_untouched(form: str, compile_it: Callable[[Any, Graphs], None]) -> int:
    """How many graphs the model has without us: layers may differ, in their strides for example."""
    if form in MOCHI_BREAKS:
        return len(build(form).transformer.transformer_blocks)
    graphs, pipeline = Graphs(), build(form)
    compile_it(pipeline, graphs)
    run(pipeline, form)
    torch._dynamo.reset()
    return graphs.count


def assert_compiled_as_eager(form: str, preset: Preset, compile_it: Callable[[Any, Graphs], None]) -> None:
    """The eager output and statistics from at most twice the model's own graphs, however many steps and runs."""
    torch._dynamo.reset()
    most = graphs_of_untouched(form, compile_it)
    graphs, pipeline = Graphs(), build(form)
    with apply_pyramid_sparse_attention(pipeline, preset) as handle:
        expected = {steps: run(pipeline, form, steps=steps) for steps in (3, 5)}
        statistics = handle.stats()
        handle.reset_stats()
        compile_it(pipeline, graphs)
        assert_same_but_for_rounding(run(pipeline, form, steps=3), expected[3])
        seen = graphs.count
        # The hook in front of the transformer is a graph of its own where it reorders an argument.
        assert 0 < seen <= 2 * most + len(transformers(build(form)))
        assert_same_but_for_rounding(run(pipeline, form, steps=5), expected[5])
        assert graphs.count == seen
        assert handle.stats() == statistics
    torch._dynamo.reset()


@feature(
    "compiled blocks (`fullgraph=True`): the model's graphs, once for dense and once for sparse steps",
    but=TEXT_ONLY,
    notes=MOCHI_BREAKS,
)
def test_compiled_blocks(form: str, make_preset: MakePreset) -> None:
    def compile_blocks(pipeline: Any, graphs: Graphs) -> None:
        # What compile_repeated_blocks does, which not all of these models have.
        for transformer in transformers(pipeline):
            for name in ("blocks", "transformer_blocks", "single_transformer_blocks"):
                for block in getattr(transformer, name, ()):
                    block.compile(fullgraph=True, backend=graphs)

    assert_compiled_as_eager(form, make_preset(SPARSE, warmup_steps=0 if form in MOCHI_BREAKS else 1), compile_blocks)


@feature("the whole transformer compiled (`fullgraph=True`), likewise", but=TEXT_ONLY, notes=MOCHI_BREAKS)
def test_compiled_transformer(form: str, make_preset: MakePreset) -> None:
    def compile_transformers(pipeline: Any, graphs: Graphs) -> None:
        for name in ("transformer", "transformer_2"):
            if getattr(pipeline, name, None) is not None:
                setattr(pipeline, name, torch.compile(getattr(pipeline, name), fullgraph=True, backend=graphs))

    preset = make_preset(SPARSE, warmup_steps=0 if form in MOCHI_BREAKS else 1)
    assert_compiled_as_eager(form, preset, compile_transformers)


def test_the_readme_has_the_table_of_these_tests() -> None:
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    assert with_table(readme) == readme, "run packages/psa-integrations/tests/lib/write_support_table.py"
