import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from psa_kernels import BlockLayout
from psa_kernels.testing import random_levels
from psa_masks import cap_by_similarity, keep_full, skip_to_mean

seeds = st.integers(0, 2**32)


def similarities(levels: Tensor, kv_heads: int, thresholds: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (levels.shape[0], kv_heads, levels.shape[3], thresholds)
    return torch.rand(shape, generator=generator) * 2 - 1


def cap_of(similarity: list[float], thresholds: list[float]) -> int:
    passing = [h for h, (s, limit) in enumerate(zip(similarity, thresholds, strict=False), 2) if s > limit]
    return max(passing, default=1)


@given(
    thresholds=st.lists(st.integers(-9, 9), min_size=1, max_size=4),
    kv_heads=st.integers(1, 2),
    group=st.integers(1, 2),
    seed=seeds,
)
def test_cap_is_the_documented_rule(thresholds: list[int], kv_heads: int, group: int, seed: int) -> None:
    limits = [limit / 10 for limit in thresholds]
    layout = BlockLayout(20, 50, block_q=8, block_kv=16)
    levels = random_levels(layout, batch=2, heads=kv_heads * group, seed=seed)
    similarity = similarities(levels, kv_heads, 4, seed)
    before = levels.clone(), similarity.clone()
    capped = cap_by_similarity(levels, similarity, limits)
    for b, h, i, j in torch.cartesian_prod(*map(torch.arange, levels.shape)).tolist():
        cap = cap_of(similarity[b, h // group, j].tolist(), limits)
        assert capped[b, h, i, j] == min(int(levels[b, h, i, j]), cap)
    assert capped.dtype == torch.int8
    assert torch.equal(levels, before[0])
    assert torch.equal(similarity, before[1])


@pytest.mark.parametrize("value", [-1.0, 0.3, 1.0, 1.0000001, float("nan")])
def test_cap_all_minus_one_is_off_and_all_one_is_full(value: float) -> None:
    levels = random_levels(BlockLayout(40, 40, block_q=8, block_kv=8), seed=3)
    similarity = torch.full((1, 2, 5, 3), value)
    assert torch.equal(cap_by_similarity(levels, similarity, [-1, -1, -1]), levels)
    assert torch.equal(cap_by_similarity(levels, similarity, [1, 1, 1]), levels.clamp(max=1))


def test_cap_threshold_of_minus_one_passes_whatever_the_similarity() -> None:
    levels = torch.tensor([[[[1, 2, 3, 4]]]], dtype=torch.int8)
    similarity = torch.full((1, 1, 4, 3), -1.0)
    assert cap_by_similarity(levels, similarity, [0.5, -1, 0.5]).tolist() == [[[[1, 2, 3, 3]]]]


@pytest.mark.parametrize(
    ("similarity", "thresholds", "message"),
    [
        (torch.zeros(1, 2, 5, 2), [0.1, 0.2, 0.3], r"similarity must have shape \[1, H_kv, 5, >= 3\]"),
        (torch.zeros(1, 2, 4, 3), [0.1], r"similarity must have shape .* got \[1, 2, 4, 3\]"),
        (torch.zeros(1, 3, 5, 3), [0.1], r"similarity's heads must divide levels' 2 heads, got 3"),
        (torch.zeros(1, 2, 5, 3), [1.5], r"thresholds\[0\] must be in \[-1, 1\], got 1.5"),
        (torch.zeros(1, 2, 5, 3), [], r"thresholds must hold at least one number"),
        (torch.zeros(1, 2, 5, 3, device="meta"), [0.1], r"similarity must be on levels' device cpu, got meta"),
    ],
)
def test_cap_refuses(similarity: Tensor, thresholds: list[float], message: str) -> None:
    levels = random_levels(BlockLayout(40, 40, block_q=8, block_kv=8))
    with pytest.raises(ValueError, match=message):
        cap_by_similarity(levels, similarity, thresholds)


def test_cap_refuses_other_types() -> None:
    levels = random_levels(BlockLayout(40, 40, block_q=8, block_kv=8))
    with pytest.raises(TypeError, match=r"similarity must be a float32 or float64 tensor, got torch.float16"):
        cap_by_similarity(levels, torch.zeros(1, 2, 5, 3, dtype=torch.float16), [0.5])
    with pytest.raises(TypeError, match=r"thresholds must be a sequence, got 0.5"):
        cap_by_similarity(levels, torch.zeros(1, 2, 5, 3), 0.5)


@st.composite
def keeps(draw: st.DrawFn) -> tuple[BlockLayout, list[tuple[int, int]], bool, int]:
    layout = BlockLayout(
        draw(st.integers(1, 60)),
        draw(st.integers(1, 60)),
        block_q=draw(st.sampled_from([1, 4, 16])),
        block_kv=draw(st.sampled_from([1, 8, 16])),
    )
    position = st.integers(0, layout.kv_len)
    ranges = draw(st.lists(st.tuples(position, position).map(lambda pair: (min(pair), max(pair))), max_size=2))
    return layout, ranges, draw(st.booleans()), draw(st.integers(0, 70))


@given(case=keeps(), seed=seeds)
def test_keep_full_is_the_documented_rule(case, seed: int) -> None:
    layout, ranges, diagonal, sinks = case
    levels = random_levels(layout, seed=seed)
    before = levels.clone()
    full = keep_full(levels, layout, protected=ranges, diagonal=diagonal, sinks=sinks)

    # Token by token: which pairs must be read in full, then which blocks hold one.
    query = torch.arange(layout.q_len)[:, None] + layout.kv_len - layout.q_len
    key = torch.arange(layout.kv_len)[None, :]
    must = (key < sinks).expand(layout.q_len, -1).clone()
    for start, stop in ranges:
        must |= ((key >= start) & (key < stop)) | ((query >= start) & (query < stop))
    if diagonal:
        must |= query == key
    expected = before.clone()
    for i, j in torch.cartesian_prod(torch.arange(layout.num_q_blocks), torch.arange(layout.num_kv_blocks)).tolist():
        rows = slice(i * layout.block_q, (i + 1) * layout.block_q)
        if must[rows, j * layout.block_kv : (j + 1) * layout.block_kv].any():
            expected[:, :, i, j] = 1
    assert torch.equal(full, expected)
    assert torch.equal(levels, before)


def test_keep_full_protects_text_at_either_end() -> None:
    layout = BlockLayout(40, 40, block_q=8, block_kv=8)
    nothing = torch.zeros(1, 1, 5, 5, dtype=torch.int8)
    first = keep_full(nothing, layout, protected=[(0, 5)])[0, 0]
    last = keep_full(nothing, layout, protected=[(31, 40)])[0, 0]
    assert first.tolist() == [[1] * 5] + [[1, 0, 0, 0, 0]] * 4
    assert last.tolist() == [[0, 0, 0, 1, 1]] * 3 + [[1] * 5] * 2


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"protected": [(3, 41)]}, ValueError, r"protected ranges must end by kv_len 40, got \(3, 41\)"),
        ({"protected": [(3, 2)]}, ValueError, r"protected\[0\] stop must be at least 3, got 2"),
        ({"protected": [(-1, 2)]}, ValueError, r"protected\[0\] start must be at least 0, got -1"),
        ({"protected": [(1, 2, 3)]}, ValueError, r"protected\[0\] must be a pair"),
        ({"protected": [3]}, TypeError, r"protected\[0\] must be a sequence, got 3"),
        ({"protected": [(0.0, 2)]}, TypeError, r"protected\[0\] start must be an int, got 0.0"),
        ({"sinks": -1}, ValueError, r"sinks must be at least 0, got -1"),
    ],
)
def test_keep_full_refuses(options: dict[str, object], error: type[Exception], message: str) -> None:
    layout = BlockLayout(40, 40, block_q=8, block_kv=8)
    with pytest.raises(error, match=message):
        keep_full(random_levels(layout), layout, **options)


@pytest.mark.parametrize(("block_kv", "coarsest"), [(1, 1), (16, 5), (128, 8), (256, 9)])
def test_skip_to_mean_gives_skipped_blocks_one_row(block_kv: int, coarsest: int) -> None:
    levels = torch.tensor([[[[0, 1, 0, 1]]]], dtype=torch.int8)
    assert skip_to_mean(levels, block_kv).tolist() == [[[[coarsest, 1, coarsest, 1]]]]
    assert levels.tolist() == [[[[0, 1, 0, 1]]]]


@pytest.mark.parametrize("block_kv", [96, 512])
def test_skip_to_mean_refuses_a_block_that_is_none(block_kv: int) -> None:
    with pytest.raises(ValueError, match=rf"block_kv must be a power of two of at most 256, got {block_kv}"):
        skip_to_mean(torch.zeros(1, 1, 1, 1, dtype=torch.int8), block_kv)


def test_skip_to_mean_refuses_levels_that_the_block_has_not() -> None:
    with pytest.raises(ValueError, match=r"levels must lie in 0..num_levels = 4, got values from 5 to 5"):
        skip_to_mean(torch.full((1, 1, 1, 1), 5, dtype=torch.int8), 8)
