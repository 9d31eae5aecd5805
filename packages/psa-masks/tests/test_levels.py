from fractions import Fraction
from math import ceil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from psa_masks import levels_by_quota, levels_by_threshold

seeds = st.integers(0, 2**32)
shapes = st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 4), st.integers(1, 40))
thousandths = st.lists(st.integers(0, 1000), min_size=1, max_size=8).map(sorted)
bound_lists = thousandths.map(lambda ends: [end / 1000 for end in ends])
rules = pytest.mark.parametrize("rule", [levels_by_threshold, levels_by_quota])


def scores(shape: tuple[int, ...], seed: int) -> Tensor:
    """A few blocks of a row hold most of it, as attention scores do."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(shape, generator=generator) ** 4


def whole_scores(shape: tuple[int, ...], seed: int) -> Tensor:
    """Whole numbers with ties and zeros, whose sums are exact."""
    return torch.randint(0, 30, shape, generator=torch.Generator().manual_seed(seed)).float()


def row_by_threshold(row: list[float], ends: list[Fraction]) -> list[int]:
    """The rule as its documentation states it, in exact arithmetic."""
    total = sum(map(Fraction, row))
    if total == 0:
        return [1] * len(row)
    levels, before = [0] * len(row), Fraction(0)
    for rank, block in enumerate(sorted(range(len(row)), key=lambda block: -row[block])):
        upto = before + Fraction(row[block]) / total
        reached = [t for t, end in enumerate(ends, 1) if before < end or upto <= end]
        levels[block] = 1 if rank == 0 else reached[0] if reached else 0
        before = upto
    return levels


@given(shape=shapes, ends=thousandths, seed=seeds)
def test_threshold_is_the_documented_rule(shape: tuple[int, ...], ends: list[int], seed: int) -> None:
    importance = whole_scores(shape, seed)
    levels = levels_by_threshold(importance, [end / 1000 for end in ends])
    exact = [Fraction(end, 1000) for end in ends]
    expected = [row_by_threshold(row, exact) for row in importance.flatten(0, -2).tolist()]
    assert levels.dtype == torch.int8
    assert levels.flatten(0, -2).tolist() == expected


@given(shape=shapes, ends=thousandths, seed=seeds)
def test_quota_counts_are_exact(shape: tuple[int, ...], ends: list[int], seed: int) -> None:
    levels = levels_by_quota(scores(shape, seed), [end / 1000 for end in ends])
    for level, end in enumerate(ends, 1):
        kept = ((levels >= 1) & (levels <= level)).sum(dim=-1)
        assert (kept == max(1, ceil(Fraction(end, 1000) * shape[-1]))).all()
    assert levels.dtype == torch.int8
    assert levels.max() <= len(ends)


@rules
@given(shape=shapes, bounds=bound_lists, seed=seeds)
def test_levels_are_the_same_by_another_implementation(rule, shape, bounds, seed) -> None:
    importance = scores(shape, seed)
    assert torch.equal(rule(importance, bounds, impl="reference"), rule(importance, bounds))


@rules
def test_refuses_an_unknown_implementation(rule) -> None:
    with pytest.raises(ValueError, match=r"impl must be one of .* got 'sort'"):
        rule(torch.ones(4), [0.5], impl="sort")


@pytest.mark.parametrize(("num_blocks", "bound", "kept"), [(100, 0.07, 7), (10, 0.1 + 0.2, 3), (3, 1 / 3, 1)])
def test_quota_ignores_binary_rounding(num_blocks: int, bound: float, kept: int) -> None:
    assert (levels_by_quota(torch.rand(num_blocks), [bound]) > 0).sum() == kept


@rules
@given(shape=shapes, bounds=bound_lists, seed=seeds)
def test_largest_block_of_every_row_is_level_1(rule, shape, bounds, seed) -> None:
    importance = scores(shape, seed)
    levels = rule(importance, bounds)
    assert (levels.gather(-1, importance.argmax(dim=-1, keepdim=True)) == 1).all()


@rules
@given(shape=shapes, bounds=bound_lists, seed=seeds)
def test_more_important_blocks_are_no_coarser(rule, shape, bounds, seed) -> None:
    importance = scores(shape, seed)
    by_rank = rule(importance, bounds).gather(-1, importance.argsort(dim=-1, descending=True, stable=True))
    cost = torch.where(by_rank == 0, 9, by_rank)
    assert (cost.diff(dim=-1) >= 0).all()


@rules
@given(shape=shapes, bounds=bound_lists, widen=st.integers(0, 7), seed=seeds)
def test_a_higher_bound_refines_no_less(rule, shape, bounds, widen, seed) -> None:
    importance = scores(shape, seed)
    wider = [max(bound, bounds[min(widen, len(bounds) - 1)]) for bound in bounds]
    narrow, wide = (
        torch.where(levels == 0, 9, levels) for levels in (rule(importance, bounds), rule(importance, wider))
    )
    assert (wide <= narrow).all()


@rules
@given(shape=shapes, bounds=bound_lists, seed=seeds)
def test_order_of_keys_does_not_matter(rule, shape, bounds, seed) -> None:
    generator = torch.Generator().manual_seed(seed)
    distinct = torch.rand(shape, generator=generator).argsort(dim=-1).float() + 0.5
    keys = torch.randperm(shape[-1], generator=generator)
    assert torch.equal(rule(distinct[..., keys], bounds), rule(distinct, bounds)[..., keys])


@rules
def test_equal_scores_prefer_the_earlier_block(rule) -> None:
    assert rule(torch.ones(8), [0.25, 0.5]).tolist() == [1, 1, 2, 2, 0, 0, 0, 0]


@rules
@given(shape=shapes, bounds=bound_lists, seed=seeds)
def test_repeats_itself_and_touches_nothing(rule, shape, bounds, seed) -> None:
    importance = scores(shape, seed)
    before, given_bounds, state = importance.clone(), list(bounds), torch.get_rng_state()
    assert torch.equal(rule(importance, bounds), rule(importance, bounds))
    assert torch.equal(importance, before)
    assert bounds == given_bounds
    assert torch.equal(torch.get_rng_state(), state)


@rules
def test_a_level_left_out_is_an_empty_range(rule) -> None:
    importance = scores((50,), 0)
    levels = rule(importance, [0.3, 0.3, 0.7])
    assert not (levels == 2).any()
    assert torch.equal(levels == 3, rule(importance, [0.3, 0.7]) == 2)


@given(shape=shapes, bounds=bound_lists, seed=seeds)
def test_threshold_keeps_its_share_of_the_row(shape, bounds, seed) -> None:
    importance = scores(shape, seed)
    levels = levels_by_threshold(importance, bounds)
    exact = importance.double()
    share = (exact * (levels > 0)).sum(dim=-1) / exact.sum(dim=-1)
    # Each of n blocks, none of them more than the row, counts for up to 2**-30 of the largest less than it is. Other
    # rounding is in float64.
    slack = (shape[-1] + 1) * 2**-30
    assert (share >= bounds[-1] - slack).all()


@given(shape=shapes, seed=seeds)
def test_threshold_of_1_keeps_every_block(shape, seed) -> None:
    importance = scores(shape, seed) * (scores(shape, seed + 1) > 0.1)
    assert (levels_by_threshold(importance, [0.5, 1.0]) > 0).all()


def test_threshold_keeps_a_block_that_is_nearly_the_whole_row() -> None:
    assert levels_by_threshold(torch.tensor([0.03, 0.95, 0.02]), [0.5, 0.8]).tolist() == [0, 1, 0]


def test_threshold_takes_a_row_of_zeros_as_all_important() -> None:
    assert levels_by_threshold(torch.zeros(2, 5), [0.0, 0.1]).tolist() == [[1] * 5] * 2


@given(shape=shapes, bounds=bound_lists, full=st.integers(0, 1000), seed=seeds)
def test_min_full_adds_level_1_blocks_and_changes_no_other(shape, bounds, full, seed) -> None:
    importance = scores(shape, seed)
    plain = levels_by_threshold(importance, bounds)
    levels = levels_by_threshold(importance, bounds, min_full=full / 1000)
    least = ceil(Fraction(full, 1000) * shape[-1])
    assert torch.equal((levels == 1).sum(dim=-1), (plain == 1).sum(dim=-1).clamp(min=least))
    assert torch.equal(torch.where(levels == 1, plain, levels), plain)


@rules
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_float_types_are_read_in_float32(rule, dtype) -> None:
    importance = scores((3, 20), 1).to(dtype)
    assert torch.equal(rule(importance, [0.3, 0.6]), rule(importance.float(), [0.3, 0.6]))


@rules
@pytest.mark.parametrize(
    ("bounds", "error", "message"),
    [
        ([], ValueError, r"bounds must hold 1 to 9 numbers, got 0"),
        ([0.1] * 10, ValueError, r"bounds must hold 1 to 9 numbers, got 10"),
        ([0.5, 0.4], ValueError, r"bounds .* must not decrease, got \[0.5, 0.4\]"),
        ([0.5, 1.5], ValueError, r"bounds\[1\] must be in \[0, 1\], got 1.5"),
        ([float("nan")], ValueError, r"bounds\[0\] must be in \[0, 1\], got nan"),
        (["0.5"], TypeError, r"bounds\[0\] must be a number, got '0.5'"),
        ([True], TypeError, r"bounds\[0\] must be a number, got True"),
        (0.5, TypeError, r"bounds must be a sequence, got 0.5"),
    ],
)
def test_refuses_bounds(rule, bounds, error, message) -> None:
    with pytest.raises(error, match=message):
        rule(torch.ones(4), bounds)


@rules
def test_refuses_importance(rule) -> None:
    with pytest.raises(TypeError, match=r"importance must be float16, .* got torch.int64"):
        rule(torch.ones(4, dtype=torch.int64), [0.5])
    with pytest.raises(ValueError, match=r"importance must have shape .*, got \[2, 0\]"):
        rule(torch.ones(2, 0), [0.5])
    with pytest.raises(TypeError, match=r"importance must be a torch.Tensor, got list"):
        rule([0.5], [0.5])


@pytest.mark.parametrize("min_full", [-0.1, 1.1])
def test_refuses_min_full(min_full: float) -> None:
    with pytest.raises(ValueError, match=r"min_full must be in \[0, 1\]"):
        levels_by_threshold(torch.ones(4), [0.5], min_full=min_full)


@rules
@given(shape=shapes, blocks=st.tuples(*[st.integers(0, 40)] * 2), bounds=bound_lists, seed=seeds)
def test_of_blocks_that_do_not_exist_nothing_counts(rule, shape, blocks, bounds, seed) -> None:
    importance = torch.stack([scores(shape, seed), scores(shape, seed + 1)])
    levels = rule(importance, bounds, num_blocks=torch.tensor(blocks))
    for sample, existing in enumerate(blocks):
        assert not levels[sample, ..., existing:].any()
        if existing:
            assert torch.equal(levels[sample, ..., :existing], rule(importance[sample, ..., :existing], bounds))


@rules
@pytest.mark.parametrize(
    ("num_blocks", "error", "message"),
    [
        ([4], TypeError, "num_blocks must be an int32 or int64 tensor or None, got list"),
        (torch.ones(2), TypeError, "num_blocks must be an int32 or int64 tensor or None, got torch.float32"),
        (torch.tensor([4]), ValueError, r"num_blocks must have shape \[B\] for .*\[2, 4\], got \[1\]"),
        (torch.ones(2, dtype=torch.int32, device="meta"), ValueError, "must be on importance's device cpu, got meta"),
    ],
)
def test_refuses_num_blocks(rule, num_blocks, error, message) -> None:
    with pytest.raises(error, match=message):
        rule(torch.ones(2, 4), [0.5], num_blocks=num_blocks)
