"""``pool_pyramid`` and ``key_similarity`` on every backend against their oracles."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from psa_kernels import key_similarity, pool_pyramid
from psa_kernels.testing import assert_within_error_budget, make_qkv

LENGTHS = [(1, None), (37, None), (128, None), (291, None), (150, (150, 65)), (150, (3, 0))]


@pytest.mark.parametrize(("kv_len", "lengths"), LENGTHS)
@pytest.mark.parametrize(("block_kv", "num_levels"), [(32, 6), (64, 1), (64, 4), (128, 8)])
def test_pooling_equals_oracle(backend, kv_len, lengths, block_kv, num_levels):
    for dtype in backend.dtypes:
        key = make_qkv(batch=2, kv_len=kv_len, head_dim=40, dtype=dtype, device=backend.device)[1]
        kv_lengths = None if lengths is None else torch.tensor(lengths, device=backend.device)
        options = {"block_kv": block_kv, "num_levels": num_levels, "kv_lengths": kv_lengths}
        got = pool_pyramid(key, impl=backend.impl, **options)
        exact = pool_pyramid(key.double(), impl="reference", **options)
        low = pool_pyramid(key, impl="reference", **options)
        for level in range(1, num_levels + 1):
            assert got.level(level).dtype == dtype
            assert_within_error_budget(got.level(level), exact.level(level), low.level(level))


@given(kv_len=st.integers(1, 300), num_levels=st.integers(1, 8), seed=st.integers(0, 2**16))
def test_rows_are_means_over_the_tokens_they_count(kv_len, num_levels, seed):
    key = make_qkv(heads=1, kv_len=kv_len, head_dim=3, dtype=torch.float64, seed=seed)[1]
    pyramid = pool_pyramid(key, block_kv=128, num_levels=num_levels)
    total = key.sum(dim=2)
    for level in range(1, num_levels + 1):
        counts = pyramid.counts(level)
        assert counts.sum() == kv_len
        weighted = (pyramid.level(level) * counts[..., None]).sum(dim=2)
        assert_within_error_budget(weighted, total, key.float().sum(dim=2))


def test_level_1_is_the_sequence_itself():
    key = make_qkv(q_len=50)[1]
    assert pool_pyramid(key, block_kv=64, num_levels=3).level(1) is key


def test_an_unknown_level_is_refused():
    pyramid = pool_pyramid(make_qkv(q_len=50)[1], block_kv=64, num_levels=3)
    with pytest.raises(ValueError, match=r"level must lie in 1\.\.3, got 4"):
        pyramid.level(4)


@pytest.mark.parametrize(("kv_len", "lengths"), LENGTHS)
@pytest.mark.parametrize(("block_kv", "num_levels"), [(32, 6), (64, 1), (64, 4), (128, 8)])
def test_similarity_equals_oracle(backend, kv_len, lengths, block_kv, num_levels):
    for dtype in backend.dtypes:
        key = make_qkv(batch=2, kv_len=kv_len, head_dim=40, dtype=dtype, device=backend.device)[1]
        kv_lengths = None if lengths is None else torch.tensor(lengths, device=backend.device)
        options = {"block_kv": block_kv, "num_levels": num_levels, "kv_lengths": kv_lengths}
        got = key_similarity(key, impl=backend.impl, **options)
        assert got.dtype == torch.float32
        exact = key_similarity(key.double(), impl="reference", **options)
        low = key_similarity(key, impl="reference", **options)
        if num_levels > 1:
            assert_within_error_budget(got, exact, low, input_dtype=dtype)


def test_similarity_of_known_keys(backend):
    """Keys that alternate in sign: unlike at stride 1, alike at every even stride."""
    sign = torch.tensor([1.0, -1.0]).repeat(32)
    key = (sign[:, None] * torch.ones(64, 16)).view(1, 1, 64, 16).to(backend.device)
    similarity = key_similarity(key, block_kv=64, num_levels=7, impl=backend.impl)
    # The last level compares the first and the last token, 63 apart.
    expected = torch.tensor([1.0, 1, 1, 1, 1, -1], device=backend.device)
    assert_within_error_budget(similarity[0, 0, 0], expected.double(), expected)


@settings(max_examples=25)
@given(kv_len=st.integers(1, 200), seed=st.integers(0, 2**16))
def test_similarity_is_a_mean_of_cosines(kv_len, seed):
    key = make_qkv(heads=1, kv_len=kv_len, head_dim=5, seed=seed)[1]
    similarity = key_similarity(key, block_kv=32, num_levels=6)
    slack = 1 + 8 * torch.finfo(torch.float32).eps  # a normalised key's length is 1 to within a few roundings
    assert similarity.abs().max() <= slack
    scaled = key_similarity(key * 2, block_kv=32, num_levels=6)
    assert torch.equal(similarity, scaled)
