"""``block_importance`` on every backend against the oracle, and what the draw of samples promises."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from psa_kernels import block_importance
from psa_kernels.block_importance.sampling import KEY_STREAM, QUERY_STREAM, draw_positions, sample_positions
from psa_kernels.testing import assert_within_error_budget, make_qkv

CASES = {
    "one block": {"q_len": 32},
    "ragged": {"q_len": 201, "kv_len": 333},
    "GQA": {"batch": 2, "heads": 4, "kv_heads": 2, "q_len": 65, "kv_len": 130, "head_dim": 40},
    "causal": {"q_len": 100, "kv_len": 140, "is_causal": True},
    "kv_lengths": {"batch": 2, "q_len": 70, "kv_len": 200, "kv_lengths": (131, 5)},
    "one query": {"q_len": 1, "kv_len": 200},
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("reduction", ["max", "mean", "error"])
@pytest.mark.parametrize("samples", [(8, 8), (5, 3), (32, 32)])
def test_case_equals_oracle(backend, name, reduction, samples):
    case = dict(CASES[name])
    options = {key: case.pop(key) for key in ("is_causal", "kv_lengths") if key in case}
    if "kv_lengths" in options:
        options["kv_lengths"] = torch.tensor(options["kv_lengths"], device=backend.device)
    options |= {"samples_q": samples[0], "samples_kv": samples[1], "reduction": reduction}
    for dtype in backend.dtypes:
        query, key, _ = make_qkv(**case, dtype=dtype, device=backend.device)
        exact = block_importance(query.double(), key.double(), block_q=32, block_kv=32, impl="reference", **options)
        low = block_importance(query, key, block_q=32, block_kv=32, impl="reference", **options)
        got = block_importance(query, key, block_q=32, block_kv=32, impl=backend.impl, **options)
        assert got.dtype == torch.float32
        assert_within_error_budget(got, exact, low, input_dtype=dtype)


def test_all_tokens_sampled_is_exact_attention():
    query, key, _ = make_qkv(q_len=70, kv_len=100, dtype=torch.float64)
    weights = (query @ key.mT / 32**0.5).softmax(-1)
    full = torch.nn.functional.pad(weights, (0, 28, 0, 26)).view(1, 2, 3, 32, 4, 32)
    options = {"block_q": 32, "block_kv": 32, "samples_q": 32, "samples_kv": 32}
    got = block_importance(query, key, **options)
    assert_within_error_budget(got, full.amax((3, 5)), full.float().amax((3, 5)))
    tokens = torch.tensor([32, 32, 6])[:, None] * torch.tensor([32, 32, 32, 4])
    got = block_importance(query, key, reduction="mean", **options)
    assert_within_error_budget(got, full.sum((3, 5)) / tokens, (full.sum((3, 5)) / tokens).float())


def test_error_is_what_the_mean_of_a_block_gets_wrong():
    """By the oracle of attention: a block's weight when it is read as it is, and when it is read as its mean."""
    query, key, _ = make_qkv(q_len=70, kv_len=96, dtype=torch.float64)
    options = {"block_q": 32, "block_kv": 32, "samples_q": 32, "samples_kv": 32}
    got = block_importance(query, key, reduction="error", **options)
    logits = query @ key.mT / 32**0.5
    true = logits.softmax(-1).view(1, 2, 70, 3, 32).sum(-1)
    means = key.view(1, 2, 3, 32, 32).mean(3)
    of_mean = 32 * (query @ means.mT / 32**0.5 - logits.logsumexp(-1, keepdim=True)).exp()
    square = torch.nn.functional.pad((true - of_mean).square(), (0, 0, 0, 26)).view(1, 2, 3, 32, 3).sum(3)
    expected = (square / torch.tensor([32, 32, 6])[:, None]).sqrt() / 32
    assert_within_error_budget(got, expected, expected.float())


def test_a_block_of_equal_keys_has_no_error(backend):
    for dtype in backend.dtypes:
        query, key, _ = make_qkv(q_len=64, kv_len=96, dtype=dtype, device=backend.device)
        key[:, :, :32] = 4 * query[:, :, :1]  # most of what queries see, and all alike
        options = {"block_q": 32, "block_kv": 32, "samples_q": 8, "samples_kv": 8, "impl": backend.impl}
        error = block_importance(query, key, reduction="error", **options)
        mass = block_importance(query, key, reduction="mean", **options)
        assert (error[..., 0] <= 8 * torch.finfo(dtype).eps * mass[..., 0]).all()
        assert (error[..., 1:] > error[..., :1]).all()


def test_large_logits_do_not_overflow(backend):
    for dtype in backend.dtypes:
        query, key, _ = make_qkv(q_len=64, dtype=dtype, device=backend.device)
        options = {"block_q": 32, "block_kv": 32, "samples_q": 8, "samples_kv": 8, "impl": backend.impl}
        importance = block_importance(query * 200, key * 200, **options)
        assert importance.isfinite().all()
        assert importance.max() > 0.9  # the softmax has all but collapsed onto one key


@given(
    length=st.integers(1, 300),
    block=st.sampled_from([16, 32, 128]),
    samples=st.integers(1, 16),
    seed=st.integers(-(2**40), 2**40),
)
def test_samples_are_distinct_tokens_of_their_block(length, block, samples, seed):
    num_blocks = -(-length // block)
    positions = sample_positions(torch.tensor([length]), num_blocks, block, samples, seed, QUERY_STREAM)[0]
    for j, row in enumerate(positions.tolist()):
        tokens = range(j * block, min((j + 1) * block, length))
        drawn = [token for token in row if token >= 0]
        assert len(drawn) == len(set(drawn)) == min(samples, len(tokens))
        assert set(drawn) <= set(tokens)


@pytest.mark.parametrize(
    "device",
    [
        pytest.param("cpu", id="interpreter", marks=pytest.mark.interpreter),
        pytest.param("cuda", id="gpu", marks=pytest.mark.gpu),
    ],
)
@settings(max_examples=40)
@given(
    q_len=st.integers(1, 700),
    kv_len=st.integers(1, 700),
    blocks=st.tuples(*[st.sampled_from([1, 2, 16, 64, 256])] * 2),
    samples=st.tuples(*[st.integers(1, 20)] * 2),
    lengths=st.none() | st.lists(st.integers(0, 900), min_size=1, max_size=3),
    dtype=st.sampled_from([torch.int32, torch.int64]),
    seed=st.integers(-(2**80), 2**80),
)
def test_the_kernel_draws_the_same_tokens(device, q_len, kv_len, blocks, samples, lengths, dtype, seed):
    from psa_kernels.block_importance import triton_fwd
    from psa_kernels.triton_device import on_device

    kv_lengths = None if lengths is None else torch.tensor(lengths, dtype=dtype, device=device)
    samples = [min(pair) for pair in zip(samples, blocks, strict=True)]
    call = (q_len, kv_len, kv_lengths, *blocks, *samples, seed, torch.device(device))
    with on_device(torch.empty(0, device=device)):
        drawn = triton_fwd.draw_positions(*call)
    assert torch.equal(drawn, torch.cat([positions.flatten() for positions in draw_positions(*call)]))


def test_lengths_past_the_keys_count_as_all_of_them(backend):
    query, key, _ = make_qkv(batch=3, q_len=70, kv_len=90, device=backend.device)
    options = {"block_q": 32, "block_kv": 32, "samples_q": 8, "samples_kv": 8, "impl": backend.impl}
    whole = block_importance(query, key, **options)
    for dtype in (torch.int32, torch.int64):
        lengths = torch.tensor([2**31 - 1, 90, 0], dtype=dtype, device=backend.device)
        got = block_importance(query, key, kv_lengths=lengths, **options)
        assert torch.equal(got[:2], whole[:2])
        assert not got[2].any()


def test_samples_spread_over_the_block():
    """Each token of a block is drawn about equally often: a chi-squared statistic within five deviations."""
    blocks, block, samples = 4000, 16, 4
    positions = sample_positions(torch.tensor([blocks * block]), blocks, block, samples, 0, KEY_STREAM)
    counts = torch.bincount(positions.flatten() % block, minlength=block).double()
    expected = blocks * samples / block
    freedom = block - samples  # each stratum's counts add up to the number of blocks
    statistic = ((counts - expected) ** 2 / expected).sum().item()
    assert statistic < freedom + 5 * (2 * freedom) ** 0.5


def test_the_draw_is_named_by_its_seed():
    query, key, _ = make_qkv(q_len=256)
    options = {"block_q": 64, "block_kv": 64, "samples_q": 8, "samples_kv": 8}
    state = torch.get_rng_state()
    torch.manual_seed(5)
    first = block_importance(query, key, seed=3, **options)
    torch.manual_seed(6)
    assert torch.equal(first, block_importance(query, key, seed=3, **options))
    assert not torch.equal(first, block_importance(query, key, seed=4, **options))
    torch.set_rng_state(state)
    block_importance(query, key, **options)
    assert torch.equal(torch.get_rng_state(), state)
