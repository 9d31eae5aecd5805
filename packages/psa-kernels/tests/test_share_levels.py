"""``share_levels`` on every backend against its rule in exact arithmetic."""

from fractions import Fraction
from math import ceil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from psa_kernels import share_levels

# Zeros of both signs are equal, the least and the largest number differ by more than any sum holds, some are denormal,
# and the last two differ by the least bit.
SPECIAL = [0.0, -0.0, 1e-45, 1e-40, 2**-126, 6e-8, 65504.0, 2.0**127, 1.0, 1 + 2**-23]


def by_the_rule(row, shares, least):
    """The levels of one row, from the documentation, in fractions."""
    highest = max(row, default=0.0)
    unit = Fraction(2) ** -156
    while unit * 2**31 <= highest:
        unit *= 2
    total = sum(Fraction(score) // unit for score in row)
    levels = [0] * len(row)
    for rank, i in enumerate(sorted(range(len(row)), key=lambda i: -row[i])):
        before = sum(Fraction(row[j]) // unit for j in range(len(row)) if (row[j], -j) > (row[i], -i))
        for level in range(len(shares), 0, -1):
            if shares[level - 1] == 1 or before < shares[level - 1] * total:
                levels[i] = level
        if rank < max(1, ceil(len(row) * least)) or total == 0:
            levels[i] = 1
    return levels


def make_scores(shape, values, seed):
    """Random numbers, steep as attention's scores; or only as many different ones as ``values`` says, for ties."""
    generator = torch.Generator().manual_seed(seed)
    if values == 0:
        return torch.randn(shape, generator=generator).mul(4).exp()
    few = torch.cat([torch.tensor(SPECIAL), torch.rand(values, generator=generator)])
    few = few[torch.randperm(len(few), generator=generator)[:values]]
    return few[torch.randint(values, shape, generator=generator)]


thousandths = st.integers(0, 1000).map(lambda part: Fraction(part, 1000))
share_lists = st.lists(thousandths, min_size=1, max_size=9).map(sorted)


@st.composite
def cases(draw, row_len=100):
    shape = [*draw(st.lists(st.integers(0, 3), max_size=2)), draw(st.integers(1, row_len))]
    least = draw(st.sampled_from([Fraction(0), Fraction(7, 100), Fraction(1, 2), Fraction(1)]))
    values = draw(st.sampled_from([0, 1, 2, 4, 15]))
    return make_scores(shape, values, draw(st.integers(0, 2**32))), draw(share_lists), least


def floats(shares):
    return [float(share) for share in shares]


@given(case=cases(row_len=25), dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]))
def test_oracle_is_the_documented_rule(case, dtype):
    scores, shares, least = case[0].nan_to_num().to(dtype).clamp(max=65504), *case[1:]
    levels = share_levels(scores, floats(shares), min_first=float(least), impl="reference")
    expected = [by_the_rule(row, shares, least) for row in scores.float().reshape(-1, scores.shape[-1]).tolist()]
    assert levels.reshape(-1, scores.shape[-1]).tolist() == expected


def test_levels_are_those_of_the_oracle(backend):
    @settings(max_examples=backend.examples)
    @given(case=cases(), dtype=st.sampled_from([*backend.dtypes, torch.float64]))
    def check(case, dtype):
        scores, shares, least = case
        scores = scores.clamp(max=torch.finfo(torch.float16).max) if dtype == torch.float16 else scores
        scores = scores.to(backend.device, dtype)
        options = {"shares": floats(shares), "min_first": float(least)}
        levels = share_levels(scores, impl=backend.impl, **options)
        assert levels.dtype == torch.int8
        assert levels.is_contiguous()
        assert torch.equal(levels.cpu(), share_levels(scores.cpu(), impl="reference", **options))

    check()


def test_samples_of_any_length_are_as_if_alone(backend):
    @settings(max_examples=backend.examples // 2)
    @given(
        lengths=st.lists(st.integers(-1, 35), min_size=1, max_size=3),
        middle=st.lists(st.integers(1, 2), max_size=2),
        wide=st.booleans(),
        shares=share_lists,
        least=st.sampled_from([0.0, 0.07, 0.5]),
        values=st.sampled_from([0, 2]),
        seed=st.integers(0, 2**32),
    )
    def check(lengths, middle, wide, shares, least, values, seed):
        scores = make_scores([len(lengths), *middle, 30], values, seed).to(backend.device)
        options = {"shares": floats(shares), "min_first": least}
        given_lengths = torch.tensor(lengths, dtype=torch.int64 if wide else torch.int32)
        levels = share_levels(scores, lengths=given_lengths.to(backend.device), impl=backend.impl, **options).cpu()
        oracle = share_levels(scores.cpu(), lengths=given_lengths, impl="reference", **options)
        assert torch.equal(levels, oracle)
        for sample, length in enumerate(lengths):
            assert not levels[sample, ..., max(length, 0) :].any()
            if length > 0:
                alone = share_levels(scores[sample, ..., :length].cpu(), impl="reference", **options)
                assert torch.equal(levels[sample, ..., :length], alone)

    check()


@pytest.mark.parametrize(
    ("row_len", "values"), [(128, 0), (129, 3), (1025, 0), (2500, 3), (8192, 3), (8193, 3), (17_000, 0)]
)
def test_long_rows(backend, row_len, values):
    scores = make_scores((2, row_len), values, seed=row_len).to(backend.device)
    lengths = torch.tensor([row_len, row_len - 100], device=backend.device)
    options = {"shares": [0.3, 1.0], "min_first": 0.01}
    levels = share_levels(scores, lengths=lengths, impl=backend.impl, **options)
    oracle = share_levels(scores.cpu(), lengths=lengths.cpu(), impl="reference", **options)
    assert torch.equal(levels.cpu(), oracle)


@pytest.mark.parametrize("share", [0.07, 0.1 + 0.2, 0.29, 0.57])
def test_binary_rounding_in_a_share_adds_nothing(backend, share):
    scores = torch.ones(100, device=backend.device)
    for options in ({"shares": [share]}, {"shares": [0.0], "min_first": share}):
        assert share_levels(scores, impl=backend.impl, **options).sum() == round(100 * share)


def test_small_scores_add_up_beside_a_large_one(backend):
    """In float32 the sum would stay that of the first."""
    scores = torch.full((4097,), 2.0**-26, device=backend.device)
    scores[0] = 1.0
    levels = share_levels(scores, [(1 + 2**-15) / (1 + 2**-14)], impl=backend.impl)
    assert (levels > 0).sum() == 1 + 2**11


def test_any_strides(backend):
    scores = torch.rand(3, 2, 4, generator=torch.Generator().manual_seed(0)).to(backend.device)
    for view in (scores.mT, scores[::2, :, ::3], scores[:1].expand(4, -1, -1)):
        lengths = torch.tensor([2, 5] * 4, device=backend.device)[::2][: view.shape[0]]
        options = {"shares": [0.3, 0.7], "lengths": lengths, "impl": backend.impl}
        assert torch.equal(share_levels(view, **options), share_levels(view.clone(), **options))


def test_nothing_flows_back():
    scores = torch.rand(3, 8, requires_grad=True)
    assert not share_levels(scores, [0.5]).requires_grad


@pytest.mark.parametrize("impl", ["torch", "triton", "reference"])
def test_scores_past_the_range_of_float32(impl):
    scores = torch.tensor([1e300, 1.0, 1e39], dtype=torch.float64)
    assert share_levels(scores, [0.4], impl=impl).tolist() == [1, 0, 0]
