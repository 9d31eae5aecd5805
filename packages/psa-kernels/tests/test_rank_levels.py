"""``rank_levels`` on every backend against a stable sort."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from psa_kernels import rank_levels

# Zeros of both signs are equal, NaN of any kind is above infinity, and the last two differ by the least bit.
SPECIAL = [0.0, -0.0, float("inf"), -float("inf"), float("nan"), -float("nan"), 1e-45, -1e-45, 65504.0, 1.0, 1 + 2**-23]


def by_sorting(scores, counts):
    """Levels by position in the row's stable falling order."""
    order = scores.cpu().argsort(dim=-1, descending=True, stable=True)
    rank = order.argsort(dim=-1)
    level = torch.full(rank.shape, len(counts) + 1)
    for count in counts:
        level -= (rank < count).long()
    return level.where(level <= len(counts), 0).to(torch.int8)


def make_scores(shape, values, seed):
    """Random numbers; or only as many different ones as ``values`` says, so that ties abound."""
    generator = torch.Generator().manual_seed(seed)
    if values == 0:
        return torch.randn(shape, generator=generator)
    few = torch.cat([torch.tensor(SPECIAL), torch.randn(values, generator=generator)])
    few = few[torch.randperm(len(few), generator=generator)[:values]]
    return few[torch.randint(values, shape, generator=generator)]


@st.composite
def cases(draw):
    """Scores and counts, some of them 0, alike, or more than the row has."""
    shape = [*draw(st.lists(st.integers(0, 3), max_size=2)), draw(st.integers(1, 150))]
    counts = draw(st.lists(st.integers(0, shape[-1] + 5), min_size=1, max_size=9).map(sorted))
    return make_scores(shape, draw(st.sampled_from([0, 1, 2, 5, 15])), draw(st.integers(0, 2**32))), counts


def test_levels_are_those_of_a_stable_sort(backend):
    @settings(max_examples=2 * backend.examples)
    @given(case=cases(), dtype=st.sampled_from(backend.dtypes))
    def check(case, dtype):
        scores, counts = case[0].to(backend.device, dtype), case[1]
        levels = rank_levels(scores, counts, impl=backend.impl)
        assert levels.dtype == torch.int8
        assert levels.is_contiguous()
        assert torch.equal(levels.cpu(), by_sorting(scores, counts))

    check()


def test_samples_have_counts_of_their_own(backend):
    """A batch of rows of the same length gets what each sample gets alone."""

    @settings(max_examples=backend.examples // 2)
    @given(
        row_len=st.integers(1, 30),
        data=st.data(),
        dtype=st.sampled_from(backend.dtypes),
        seed=st.integers(0, 2**32),
    )
    def check(row_len, data, dtype, seed):
        middle = data.draw(st.lists(st.integers(1, 2), max_size=2))
        num_counts = data.draw(st.sampled_from([1, 2, 9]))
        lists = st.lists(st.integers(0, row_len + 5), min_size=num_counts, max_size=num_counts).map(sorted)
        counts = data.draw(st.lists(lists, min_size=1, max_size=3))
        scores = make_scores([len(counts), *middle, row_len], data.draw(st.sampled_from([0, 2])), seed)
        scores = scores.to(backend.device, dtype)
        levels = rank_levels(scores, torch.tensor(counts, dtype=torch.int32, device=backend.device), impl=backend.impl)
        alone = [rank_levels(one, own, impl="reference") for one, own in zip(scores.cpu(), counts, strict=True)]
        assert torch.equal(levels.cpu(), torch.stack(alone))
        oracle = rank_levels(scores.cpu(), torch.tensor(counts, dtype=torch.int32), impl="reference")
        assert torch.equal(oracle, torch.stack(alone))

    check()


def test_samples_of_long_rows_have_counts_of_their_own(backend):
    scores = make_scores((2, 2, 9000), 3, seed=1).to(backend.device)
    counts = [[1, 20, 9000], [0, 300, 300]]
    levels = rank_levels(scores, torch.tensor(counts, dtype=torch.int32, device=backend.device), impl=backend.impl)
    for sample in range(2):
        assert torch.equal(levels[sample].cpu(), by_sorting(scores[sample], counts[sample]))


@given(case=cases(), dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]))
def test_oracle_is_a_stable_sort(case, dtype):
    scores, counts = case[0].to(dtype), case[1]
    assert torch.equal(rank_levels(scores, counts, impl="reference"), by_sorting(scores, counts))


@pytest.mark.parametrize("row_len", [128, 129, 1024, 1025, 2500, 8192, 8193, 20_000])
@pytest.mark.parametrize("values", [0, 3])
def test_long_rows(backend, row_len, values):
    counts = [1, row_len // 10, row_len // 10, row_len // 3, row_len - 1]
    scores = make_scores((2, row_len), values, seed=row_len).to(backend.device)
    assert torch.equal(rank_levels(scores, counts, impl=backend.impl).cpu(), by_sorting(scores, counts))


def test_neighbouring_floats_are_told_apart(backend):
    """Every bit of a score counts, in each binade and of either sign."""
    bits = torch.arange(0, 0x7F800000, 0x7F800000 // 99, dtype=torch.int32)
    pairs = torch.stack([bits, bits + 1]).view(torch.float32)
    scores = torch.cat([pairs, -pairs]).flatten()
    scores = scores[torch.randperm(len(scores), generator=torch.Generator().manual_seed(0))].to(backend.device)
    for count in range(1, len(scores), 13):
        assert torch.equal(rank_levels(scores, [count], impl=backend.impl).cpu(), by_sorting(scores, [count]))


def test_any_strides(backend):
    scores = torch.randn(3, 2, 7, generator=torch.Generator().manual_seed(0)).to(backend.device)
    for view in (scores.mT, scores[::2, :, ::3], scores[:1].expand(4, -1, -1)):
        assert torch.equal(
            rank_levels(view, [2, 4], impl=backend.impl), rank_levels(view.clone(), [2, 4], impl=backend.impl)
        )


def test_float64_goes_to_torch_by_itself():
    near = torch.tensor([1.0, 1 + 2**-50], dtype=torch.float64)
    assert rank_levels(near, [1]).tolist() == [0, 1]


def test_a_count_of_more_than_64_bits_is_the_whole_row(backend):
    scores = torch.ones(5, device=backend.device)
    assert rank_levels(scores, [0, 2**70], impl=backend.impl).tolist() == [2] * 5


def test_nothing_flows_back():
    scores = torch.rand(3, 8, requires_grad=True)
    assert not rank_levels(scores, [2]).requires_grad
