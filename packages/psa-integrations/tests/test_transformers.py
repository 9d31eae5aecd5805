"""`register_pyramid_attention` on tiny random decoders, against transformers' own SDPA and against the oracle."""

import warnings
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)
from transformers.masking_utils import sdpa_mask

from psa_config import Preset, SimThresholds
from psa_integrations import RegisteredAttention, UnsupportedError, register_pyramid_attention
from psa_integrations.build import mask_policy
from psa_integrations.transformers.masks import dense_mask, key_roles
from psa_kernels import pyramid_attention
from psa_kernels.testing import assert_within_error_budget, make_qkv

MakePreset = Callable[..., Preset]
VIDEO_TOKEN = 101
LOOSE = SimThresholds(x2=0.0, x4=-0.05, x8=-0.1)  # of keys that are random, so hardly alike
GRID = (4, 12, 12)  # patches; four of a frame make a token
PADDING = {
    "none": (),
    "left": ((0, slice(0, 37)),),
    "right": ((1, slice(113, 150)),),
    "both, and a hole": ((0, slice(0, 10)), (0, slice(50, 61)), (1, slice(147, 150))),
    "all of a sample": ((0, slice(0, 150)),),
}


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def text_config(**changes: Any) -> dict[str, Any]:
    return {
        "vocab_size": 120,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    } | changes


def random_model(model_class: type, config: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return model_class(config).eval()


def qwen() -> Qwen2_5_VLForConditionalGeneration:
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_heads": 2,
        "out_hidden_size": 64,
        "window_size": 112,
        "fullatt_block_indexes": [1],
    }
    config = Qwen2_5_VLConfig(
        text_config=text_config(rope_parameters=rope),
        vision_config=vision,
        image_token_id=100,
        video_token_id=VIDEO_TOKEN,
        vision_start_token_id=102,
        vision_end_token_id=103,
    )
    return random_model(Qwen2_5_VLForConditionalGeneration, config)


def llama() -> LlamaForCausalLM:
    return random_model(LlamaForCausalLM, LlamaConfig(**text_config()))


def prompts(padding: str = "none", length: int = 150) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 99, (2, length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    for sample, tokens in PADDING[padding]:
        mask[sample, tokens] = 0
    return {"input_ids": ids, "attention_mask": mask}


def video_prompt() -> dict[str, torch.Tensor]:
    frames, height, width = GRID
    generator = torch.Generator().manual_seed(2)
    tokens = frames * height * width // 4
    ids = torch.tensor([[5, 6, 102, *[VIDEO_TOKEN] * tokens, 103, 7, 8, 9]])
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == VIDEO_TOKEN) * 2,
        "pixel_values_videos": torch.randn(frames * height * width, 3 * 2 * 14 * 14, generator=generator),
        "video_grid_thw": torch.tensor([GRID]),
    }


@pytest.fixture
def text_preset(make_preset: MakePreset) -> MakePreset:
    def text_preset(*bounds: float, **changes: Any) -> Preset:
        return make_preset(bounds, use_rearrange=False, importance_method="antidiagonal", **changes)

    return text_preset


@pytest.fixture
def level_1(text_preset: MakePreset) -> RegisteredAttention:
    return register_pyramid_attention(text_preset(1.0, 1.0, 1.0, 1.0))


@pytest.fixture
def sparse_preset(text_preset: MakePreset) -> Preset:
    return text_preset(0.1, 0.3, 0.5, 0.7, use_sim_mask=True, sim_thresholds=LOOSE)


def both(model: Any, call: Callable[[Any], Any]) -> tuple[Any, Any]:
    """The result with SDPA and with "psa" in the text model."""
    results = []
    for implementation in ("sdpa", "psa"):
        model.set_attn_implementation({"text_config": implementation} if hasattr(model, "visual") else implementation)
        results.append(call(model))
    return results[0], results[1]


@pytest.mark.parametrize("build", [qwen, llama])
@pytest.mark.parametrize("padding", PADDING)
def test_level_1_is_sdpa(build: Callable[[], Any], padding: str, level_1: RegisteredAttention) -> None:
    model, inputs = build(), prompts(padding)
    exists = inputs["attention_mask"].bool()
    dense, ours = both(model, lambda model: model(**inputs).logits[exists])
    exact, _ = both(model.double(), lambda model: model(**inputs).logits[exists])
    assert_within_error_budget(ours, exact, dense)
    assert level_1.stats().density == 1.0
    assert level_1.stats().dense_layers() == []


@pytest.mark.parametrize("build", [qwen, llama])
@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("chunk", [None, 48])
@pytest.mark.parametrize("cache", [None, "static"])
def test_greedy_generation_is_that_of_sdpa_token_for_token(
    build: Callable[[], Any], padding: str, chunk: int | None, cache: str | None, level_1: RegisteredAttention
) -> None:
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    options |= {"prefill_chunk_size": chunk, "cache_implementation": cache}
    dense, ours = both(build(), lambda model: model.generate(**prompts(padding), **options))
    assert torch.equal(dense, ours)
    # Chunks of 48, 48, 48 and 6 of which the last is too short; samples of unlike padding are computed alone.
    chunks = 1 if chunk is None else 3
    assert level_1.stats().calls == 2 * chunks * (1 if padding == "none" else 2)
    assert level_1.stats().dense_layers() == []


def test_a_second_turn_reads_the_cache_of_the_first(level_1: RegisteredAttention) -> None:
    inputs = prompts("left")

    def two_turns(model: Any) -> torch.Tensor:
        first = model(input_ids=inputs["input_ids"][:, :90], attention_mask=inputs["attention_mask"][:, :90])
        rest = {"input_ids": inputs["input_ids"][:, 90:], "attention_mask": inputs["attention_mask"]}
        logits: torch.Tensor = model(**rest, past_key_values=first.past_key_values).logits
        return logits

    model = llama()
    dense, ours = both(model, two_turns)
    exact, _ = both(model.double(), two_turns)
    assert_within_error_budget(ours, exact, dense)


def test_a_video_prompt_is_sparse_in_the_text_model_alone(sparse_preset: Preset) -> None:
    handle = register_pyramid_attention(sparse_preset)
    model, inputs = qwen(), video_prompt()
    seen: list[torch.Tensor] = []
    model.model.visual.register_forward_hook(lambda *call: seen.append(call[2].pooler_output.clone()))
    model.set_attn_implementation("sdpa")
    dense = model(**inputs).logits
    model.set_attn_implementation({"text_config": "psa"})
    config = model.config
    assert (config.text_config._attn_implementation, config.vision_config._attn_implementation) == ("psa", "sdpa")
    ours = model(**inputs).logits
    model.set_attn_implementation("psa")  # the vision tower too, whose attention is not causal
    assert config.vision_config._attn_implementation == "psa"
    assert torch.equal(model(**inputs).logits, ours)
    assert all(torch.equal(output, seen[0]) for output in seen)
    assert len(seen) == 3
    assert not torch.allclose(ours, dense)
    assert ours.isfinite().all()
    stats = handle.stats()
    assert stats.calls == 4
    assert stats.density < 0.95
    assert set(stats.density_per_layer()) == {0, 1}
    handle.reset_stats()
    assert handle.stats().calls == 0


@pytest.mark.parametrize("skip", ["drop", "mean"])
@pytest.mark.parametrize(("past", "padding"), [(0, "none"), (0, "both, and a hole"), (50, "none"), (50, "left")])
def test_a_sparse_call_is_the_oracle_on_the_tokens_that_exist(
    past: int, padding: str, skip: str, text_preset: MakePreset
) -> None:
    from transformers import AttentionInterface

    preset = text_preset(0.1, 0.3, 0.5, 0.7, use_sim_mask=True, sim_thresholds=LOOSE, skip=skip)
    register_pyramid_attention(preset)
    length, scale, heads = 310, 0.3, {"heads": 4, "kv_heads": 2}
    query, key, value = make_qkv(batch=2, q_len=length - past, kv_len=length, head_dim=16, **heads)
    exists = prompts(padding, length)["attention_mask"]
    roles = key_roles(2, length - past, length, past, exists)
    assert (roles is None) == (past == 0 and padding == "none")
    module = SimpleNamespace(is_causal=True, layer_idx=0, num_key_value_groups=2)
    out, _ = AttentionInterface()["psa"](module, query, key, value, roles, scaling=scale)
    policy = mask_policy(preset.attention, is_causal=True)
    options = {"block_q": 32, "block_kv": 32, "is_causal": True, "scale": scale, "impl": "reference"}
    for b in range(2):
        keys, queries = exists[b].nonzero().flatten(), exists[b, past:].nonzero().flatten()
        q, k, v = query[b : b + 1, :, queries], key[b : b + 1, :, keys], value[b : b + 1, :, keys]
        levels = policy(q, k, scale=scale)
        assert set(levels.unique().tolist()) >= {1, 2, 3, 4, 0 if skip == "drop" else 6}
        exact = pyramid_attention(q.double(), k.double(), v.double(), levels, **options)
        low = pyramid_attention(q, k, v, levels, **options)
        assert_within_error_budget(out[b : b + 1, queries].transpose(1, 2), exact, low)
        assert (out[b, exists[b, past:] == 0] == 0).all()


def test_short_calls_are_left_to_sdpa_to_the_bit(sparse_preset: Preset) -> None:
    handle = register_pyramid_attention(sparse_preset, min_queries=151)
    dense, ours = both(qwen(), lambda model: model(**prompts("left")).logits)
    assert torch.equal(dense, ours)
    assert handle.stats().calls == 0


def test_layers_and_presets_that_stay_dense(text_preset: MakePreset) -> None:
    handle = register_pyramid_attention(text_preset(0.1, 0.1, 0.1, 0.3, dense_layers=(1,)))
    dense, ours = both(llama(), lambda model: model(**prompts("left")).logits)
    assert not torch.equal(dense, ours)
    assert handle.stats().dense_layers() == [1]
    handle = register_pyramid_attention("Qwen2.5-VL_7b/baseline")
    dense, ours = both(llama(), lambda model: model(**prompts("left")).logits)
    assert torch.equal(dense, ours)
    assert handle.stats().dense_layers() == [0, 1]


def test_a_decoding_step_compiles_whole(level_1: RegisteredAttention) -> None:
    model = llama()
    model.set_attn_implementation("psa")
    cache = model(**prompts()).past_key_values
    run = torch.compile(lambda **inputs: model(**inputs).logits, fullgraph=True, backend="aot_eager")
    inputs = {"input_ids": torch.tensor([[4], [5]]), "attention_mask": torch.ones(2, 151, dtype=torch.int64)}
    assert run(**inputs, past_key_values=cache).shape == (2, 1, 120)


@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize(("past", "room"), [(0, 0), (50, 0), (0, 30), (50, 30)])
def test_roles_say_what_a_mask_of_sdpa_says(padding: str, past: int, room: int) -> None:
    given = prompts(padding)["attention_mask"].bool()
    roles = key_roles(2, 150 - past, 150 + room, past, given)
    if roles is None:
        assert (padding, past) == ("none", 0)
        return
    expected = sdpa_mask(2, 150 - past, 150 + room, q_offset=past, attention_mask=given, allow_is_causal_skip=False)
    if padding == "all of a sample":  # of whose queries, none of which exists, each sees nothing
        assert not expected[0].any()
    assert torch.equal(dense_mask(roles, 150 - past, torch.device("cpu")), expected)


def mistral(window: int | None) -> MistralForCausalLM:
    return random_model(MistralForCausalLM, MistralConfig(**text_config(sliding_window=window)))


def other_mask() -> dict[str, torch.Tensor]:
    return prompts() | {"attention_mask": torch.ones(2, 1, 150, 150, dtype=torch.bool)}


def packed() -> dict[str, torch.Tensor]:
    position = torch.cat((torch.arange(60), torch.arange(90)))[None]
    return {"input_ids": prompts()["input_ids"][:1], "position_ids": position, "use_cache": False}


def in_training(model: Any) -> Any:
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5
    return model.train()


UNSUPPORTED = {
    "a sliding window of 64 keys": lambda: (mistral(64), prompts()),
    r"an attention mask other than causal with padding, torch.bool \[2, 1, 150, 150\]": lambda: (llama(), other_mask()),
    r"an attention mask other than causal with padding, torch.bool \[1, 1, 150, 150\]": lambda: (llama(), packed()),
    "head_dim 288, above 256 only impl 'torch' and 'reference' have": lambda: (
        random_model(LlamaForCausalLM, LlamaConfig(**text_config(head_dim=288))),
        prompts(),
    ),
}


@pytest.mark.parametrize("problem", UNSUPPORTED)
def test_the_unsupported_is_refused_or_dense_as_chosen(problem: str, sparse_preset: Preset) -> None:
    model, inputs = UNSUPPORTED[problem]()
    register_pyramid_attention(sparse_preset)
    model.set_attn_implementation("psa")
    with pytest.raises(UnsupportedError, match=f"in layer 0: {problem}; on_unsupported='dense' runs such calls dense"):
        model(**inputs)
    handle = register_pyramid_attention(sparse_preset, on_unsupported="dense")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        dense, ours = both(model, lambda model: model(**inputs).logits)
    assert torch.equal(dense, ours)
    assert [str(warning.message) for warning in caught if "pyramid" in str(warning.message)][1:] == []
    assert any("such calls run dense" in str(warning.message) for warning in caught)
    assert handle.stats().dense_layers() == [0, 1]


def test_dropout_is_refused_or_dense_as_chosen(sparse_preset: Preset) -> None:
    register_pyramid_attention(sparse_preset)
    model = in_training(llama())
    model.set_attn_implementation("psa")
    with pytest.raises(UnsupportedError, match=r"in layer 0: dropout 0\.5;"):
        model(**prompts())
    register_pyramid_attention(sparse_preset, on_unsupported="dense")
    with pytest.warns(UserWarning, match=r"dropout 0\.5; such calls run dense"):
        model(**prompts())


def test_attention_weights_are_refused_or_left_to_sdpa(sparse_preset: Preset) -> None:
    model = llama()
    for choice in ("raise", "dense"):
        register_pyramid_attention(sparse_preset, on_unsupported=choice)
        model.set_attn_implementation("psa")
        if choice == "raise":
            with pytest.raises(UnsupportedError, match="output_attentions, whose weights are never computed"):
                model(**prompts(), output_attentions=True)
        else:
            with pytest.warns(UserWarning, match="output_attentions"):
                model(**prompts(), output_attentions=True)


def test_a_window_longer_than_the_keys_hides_none(level_1: RegisteredAttention) -> None:
    model = mistral(4096)
    dense, ours = both(model, lambda model: model(**prompts()).logits)
    exact, _ = both(model.double(), lambda model: model(**prompts()).logits)
    assert_within_error_budget(ours, exact, dense)
    assert level_1.stats().dense_layers() == []


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"softcap": 30.0}, "logits capped at 30.0"),
        ({"position_bias": torch.zeros(1, 4, 64, 64)}, "position_bias, which changes the softmax"),
        ({"s_aux": torch.zeros(4)}, "s_aux, which changes the softmax"),
    ],
)
def test_other_softmaxes_are_refused(options: dict[str, Any], problem: str, sparse_preset: Preset) -> None:
    from transformers import AttentionInterface

    register_pyramid_attention(sparse_preset)
    query, key, value = make_qkv(heads=4, kv_heads=2, q_len=64, head_dim=16)
    module = SimpleNamespace(is_causal=True, layer_idx=3, num_key_value_groups=2)
    with pytest.raises(UnsupportedError, match=f"in layer 3: {problem}"):
        AttentionInterface()["psa"](module, query, key, value, None, **options)
    with pytest.raises(UnsupportedError, match="64 queries of 32 keys, which is no causal self-attention"):
        AttentionInterface()["psa"](module, query, key[:, :, :32], value[:, :, :32], None)
    with pytest.raises(UnsupportedError, match="values of head_dim 8 with keys of 16"):
        AttentionInterface()["psa"](module, query, key, value[..., :8], None)


def test_names_stand_for_presets_of_their_own_and_are_taken_over(
    sparse_preset: Preset, level_1: RegisteredAttention
) -> None:
    register_pyramid_attention(sparse_preset, name="psa_sparse")
    model = llama()
    model.set_attn_implementation("psa_sparse")
    sparse = model(**prompts()).logits
    model.set_attn_implementation("psa")
    assert not torch.equal(model(**prompts()).logits, sparse)
    register_pyramid_attention(sparse_preset)
    assert torch.equal(model(**prompts()).logits, sparse)


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (TypeError, "name must be a str, got int", {"name": 3}),
        (ValueError, "name must not be empty or hold one of .*got 'my_sdpa'", {"name": "my_sdpa"}),
        (ValueError, "name must not be empty or hold one of .*got ''", {"name": ""}),
        (ValueError, "on_unsupported must be one of .*got 'skip'", {"on_unsupported": "skip"}),
        (ValueError, "impl must be one of", {"impl": "cuda"}),
        (TypeError, "min_queries must be an int or None, got float", {"min_queries": 2.5}),
        (ValueError, "min_queries must be at least 2, as one query is decoding, got 1", {"min_queries": 1}),
        (TypeError, "preset must be a psa_config.Preset or a str, got int", {"preset": 3}),
        (ValueError, "must have no use_rearrange for a text model", {"preset": "Wan2.2_5B/psa_tail", "change": True}),
        (ValueError, "must have no warmup_steps for a text model, got 15", {"preset": "Wan2.1_1.3b/psa_balanced"}),
    ],
)
def test_bad_arguments(error: type[Exception], message: str, options: dict[str, Any], make_preset: MakePreset) -> None:
    if options.pop("change", False):
        options["preset"] = make_preset((0.5, 0.5, 0.5, 0.5), use_rearrange=True)
    with pytest.raises(error, match=message):
        register_pyramid_attention(**options)


def test_an_older_transformers_is_named(sparse_preset: Preset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.masking_utils.sdpa_mask", lambda batch_size, cache_position, **options: None)
    with pytest.raises(RuntimeError, match=r"transformers must be as new as its mask functions .* got \d"):
        register_pyramid_attention(sparse_preset)


@pytest.mark.gpu
@pytest.mark.parametrize("padding", ["none", "both, and a hole"])
def test_on_a_gpu_level_1_is_sdpa(padding: str, level_1: RegisteredAttention) -> None:
    model = random_model(LlamaForCausalLM, LlamaConfig(**text_config(head_dim=64))).cuda().bfloat16()
    inputs = {name: x.cuda() for name, x in prompts(padding).items()}
    exists = inputs["attention_mask"].bool()
    dense, ours = both(model, lambda model: model(**inputs).logits[exists])
    model.set_attn_implementation("sdpa")
    exact = model.double()(**inputs).logits[exists]
    assert_within_error_budget(ours, exact, dense)
    assert level_1.stats().density == 1.0


def test_triton_by_name_needs_a_gpu(sparse_preset: Preset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("triton.knobs.runtime.interpret", False)
    register_pyramid_attention(sparse_preset, impl="triton")
    model = llama()
    model.set_attn_implementation("psa")
    with pytest.raises(ValueError, match="impl='triton' needs tensors on a GPU"):
        model(**prompts())
