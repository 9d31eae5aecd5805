"""The module on its own."""

from collections.abc import Callable

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from psa_config import Preset, load_presets
from psa_integrations import PyramidAttention
from psa_kernels.testing import assert_within_error_budget, error_budget, make_qkv
from psa_masks import TokenOrder, VideoGrid

MakePreset = Callable[..., Preset]

GRID = VideoGrid(frames=3, height=7, width=9)
WITH_TEXT = VideoGrid(frames=3, height=7, width=9, text=16, text_first=True)


@pytest.mark.parametrize("method", ["Semantic", "Hybrid", "KdTree"])
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_every_block_at_level_1_is_sdpa_by_clusters(method: str, kv_heads: int, make_preset: MakePreset) -> None:
    query, key, value = make_qkv(batch=2, kv_heads=kv_heads, q_len=WITH_TEXT.seq_len)
    attention = PyramidAttention(make_preset((1.0,) * 4, rearrange_method=method, num_clusters=20), WITH_TEXT)
    exact = scaled_dot_product_attention(query.double(), key.double(), value.double(), enable_gqa=True)
    low = scaled_dot_product_attention(query, key, value, enable_gqa=True)
    for step in (None, 0, 1):
        assert_within_error_budget(attention(query, key, value, step=step), exact, low)


@pytest.mark.parametrize("grid", [None, GRID, WITH_TEXT], ids=["no grid", "video", "text and video"])
@pytest.mark.parametrize("rearrange", [True, False])
def test_every_block_at_level_1_is_sdpa(grid: VideoGrid | None, rearrange: bool, make_preset: MakePreset) -> None:
    query, key, value = make_qkv(batch=2, q_len=GRID.seq_len if grid is None else grid.seq_len)
    attention = PyramidAttention(make_preset((1.0,) * 4, use_rearrange=rearrange), grid)
    exact = scaled_dot_product_attention(query.double(), key.double(), value.double())
    low = scaled_dot_product_attention(query, key, value)
    assert_within_error_budget(attention(query, key, value), exact, low)


def test_levels_follow_the_token_order(sparse: Preset, make_preset: MakePreset) -> None:
    query, key, value = make_qkv(batch=2, q_len=GRID.seq_len)
    ordered = PyramidAttention(sparse, GRID)(query, key, value)
    dense = scaled_dot_product_attention(query, key, value)
    exact = scaled_dot_product_attention(query.double(), key.double(), value.double())
    rounding = error_budget(exact, dense, torch.finfo(dense.dtype).eps)
    assert (ordered - dense).abs().max() > 100 * rounding
    unordered = PyramidAttention(make_preset((0.25, 0.4, 0.6, 0.75), use_rearrange=False), GRID)
    assert (ordered - unordered(query, key, value)).abs().max() > 100 * rounding
    # Without a grid the tokens are taken as already in order.
    assert torch.equal(PyramidAttention(sparse)(query, key, value), unordered(query, key, value))


@pytest.mark.parametrize("method", ["Gilbert", "Semantic", "Hybrid", "KdTree"])
def test_text_of_the_grid_attends_exactly(method: str, make_preset: MakePreset) -> None:
    query, key, value = make_qkv(batch=2, q_len=WITH_TEXT.seq_len)
    start, stop = WITH_TEXT.text_range
    chosen = make_preset((0.25, 0.4, 0.6, 0.75), rearrange_method=method, num_clusters=20)
    out = PyramidAttention(chosen, WITH_TEXT)(query, key, value)[:, :, start:stop]
    exact = scaled_dot_product_attention(query.double(), key.double(), value.double())[:, :, start:stop]
    low = scaled_dot_product_attention(query, key, value)[:, :, start:stop]
    assert_within_error_budget(out, exact, low)


def test_values_of_one_stay_one(sparse: Preset) -> None:
    query, key, value = make_qkv(batch=2, q_len=GRID.seq_len)
    out = PyramidAttention(sparse, GRID)(query, key, torch.ones_like(value))
    # Two sums of as many positive numbers, each off by half an eps a term at most, divided.
    assert (out - 1).abs().max() <= GRID.seq_len * torch.finfo(torch.float32).eps


def test_a_dense_preset_is_sdpa_itself() -> None:
    query, key, value = make_qkv(batch=2, q_len=GRID.seq_len, heads=4, kv_heads=2)
    out = PyramidAttention("tiny-wan/baseline", GRID)(query, key, value)
    assert torch.equal(out, scaled_dot_product_attention(query, key, value, enable_gqa=True))


@pytest.mark.parametrize("name", ["tiny-wan/psa_balanced", "tiny-wan/baseline"])
def test_mixed_dtypes_compute_in_that_of_the_values(name: str) -> None:
    query, key, value = make_qkv(batch=2, q_len=GRID.seq_len)
    attention = PyramidAttention(name, GRID)
    mixed = attention(query, key, value.bfloat16())
    assert mixed.dtype == torch.bfloat16
    assert torch.equal(mixed, attention(query.bfloat16(), key.bfloat16(), value.bfloat16()))


def test_strided_views_and_grouped_heads(sparse: Preset) -> None:
    query, key, value = make_qkv(batch=2, q_len=GRID.seq_len, heads=4, kv_heads=2)
    attention = PyramidAttention(sparse, GRID)
    views = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (query, key, value)]
    assert torch.equal(attention(*views), attention(query, key, value))


@pytest.mark.parametrize(("model", "name"), [(m, n) for m in load_presets().models for n in load_presets().presets(m)])
def test_every_shipped_preset_runs(model: str, name: str) -> None:
    query, key, value = make_qkv(batch=2, q_len=WITH_TEXT.seq_len)
    out = PyramidAttention(f"{model}/{name}", WITH_TEXT)(query, key, value)
    assert out.shape == query.shape
    assert out.isfinite().all()


def test_triton_without_a_gpu_is_refused_before_work(sparse: Preset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(TokenOrder, "apply", lambda *_: pytest.fail("tokens were reordered"))
    with pytest.raises(ValueError, match="impl='triton' needs tensors on a GPU, got cpu"):
        PyramidAttention(sparse, GRID, impl="triton")(*make_qkv(batch=2, q_len=GRID.seq_len))


def test_triton_on_an_old_gpu_is_an_error(sparse: Preset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("psa_kernels.checks.gpu_capability", lambda device: (7, 5))
    with pytest.raises(ValueError, match=r"impl='triton': .*capability 8\.0 or higher, and cpu has 7\.5"):
        PyramidAttention(sparse, GRID, impl="triton")(*make_qkv(batch=2, q_len=GRID.seq_len))


def test_wrong_arguments(sparse: Preset, make_preset: MakePreset) -> None:
    with pytest.raises(TypeError, match=r"grid must be a psa_masks.VideoGrid or None, got tuple"):
        PyramidAttention(sparse, (3, 7, 9))
    with pytest.raises(ValueError, match=r"num_clusters must be at most the 189 video tokens of VideoGrid.*got 190"):
        PyramidAttention(make_preset((1.0,) * 4, rearrange_method="Hybrid", num_clusters=190), WITH_TEXT)
    with pytest.raises(ValueError, match="preset must name its model"):
        PyramidAttention("psa_balanced")
    with pytest.raises(ValueError, match="no_such_preset"):
        PyramidAttention("tiny-wan/no_such_preset")
    with pytest.raises(ValueError, match=r"impl must be one of 'triton', .* got 'tritn'"):
        PyramidAttention(sparse, impl="tritn")
    query, key, value = make_qkv(batch=2, q_len=GRID.seq_len + 1)
    with pytest.raises(ValueError, match=r"query must have the 189 tokens of VideoGrid.*got 190"):
        PyramidAttention(sparse, GRID)(query, key, value)
    with pytest.raises(ValueError, match="key must have the 189 tokens"):
        PyramidAttention("tiny-wan/baseline", GRID)(query[:, :, 1:], key, value)


@pytest.mark.parametrize("impl", [None, "torch", "reference"])
def test_antidiagonal_importance(impl: str | None, make_preset: MakePreset) -> None:
    query, key, value = make_qkv(batch=2, q_len=GRID.seq_len)
    bounds = (0.25, 0.4, 0.6, 0.75)
    chosen = make_preset(bounds, importance_method="antidiagonal")
    out = PyramidAttention(chosen, GRID, impl=impl)(query, key, value)
    exact = PyramidAttention(chosen, GRID, impl="reference")(query.double(), key.double(), value.double())
    low = PyramidAttention(chosen, GRID, impl="reference")(query, key, value)
    assert_within_error_budget(out, exact, low)
    assert not torch.equal(out, PyramidAttention(make_preset(bounds), GRID, impl=impl)(query, key, value))


@pytest.mark.parametrize("preset", ["tiny-wan/psa_balanced", "tiny-wan/baseline"])
def test_tensors_and_steps_of_another_kind(preset: str) -> None:
    attention = PyramidAttention(preset, GRID)
    query, key, value = make_qkv(batch=2, q_len=GRID.seq_len)
    with pytest.raises(TypeError, match="query must be a tensor, got ndarray"):
        attention(*(x.numpy() for x in (query, key, value)))
    with pytest.raises(TypeError, match="value must be a tensor, got list"):
        attention(query, key, [value])
    with pytest.raises(ValueError, match=r"query must have shape \[B, H, L, D\], got \[2, 189, 32\]"):
        attention(query[:, 0], key[:, 0], value[:, 0])
    for step, error, message in (
        ("a", TypeError, "step must be an integer, got str 'a'"),
        (1.0, TypeError, "step must be an integer, got float 1.0"),
        (-1, ValueError, "step must be 0 or more, got -1"),
    ):
        with pytest.raises(error, match=message):
            attention(query, key, value, step=step)
