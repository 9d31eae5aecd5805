"""``block_importance(..., method="antidiagonal")`` against the oracle, and the oracle against the definition."""

import math
from itertools import cycle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from psa_kernels import block_importance
from psa_kernels.block_importance.antidiagonal import torch_impl
from psa_kernels.testing import VIEWS, assert_within_error_budget, make_qkv

CASES = {
    "one block": {"q_len": 32},
    "ragged": {"q_len": 201, "kv_len": 333},
    "GQA": {"batch": 2, "heads": 4, "kv_heads": 2, "q_len": 65, "kv_len": 130, "head_dim": 40},
    "causal": {"q_len": 100, "kv_len": 140, "is_causal": True},
    "causal at an odd offset": {"q_len": 67, "kv_len": 138, "is_causal": True},
    "kv_lengths": {"batch": 3, "q_len": 70, "kv_len": 200, "kv_lengths": (131, 5, 0)},
    "causal kv_lengths": {"batch": 2, "q_len": 70, "kv_len": 99, "kv_lengths": (87, 98), "is_causal": True},
    "one query": {"q_len": 1, "kv_len": 200},
    "one key": {"q_len": 70, "kv_len": 1},
}
IMPLS = ["torch", "reference", pytest.param("triton", marks=pytest.mark.interpreter)]
METHOD = {"method": "antidiagonal"}
BLOCKS = METHOD | {"block_q": 32, "block_kv": 32}


def score(query, key, **options):
    return block_importance(query, key, **(BLOCKS | {"samples_q": 8, "samples_kv": 8} | options))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("reduction", ["max", "mean"])
@pytest.mark.parametrize(("block_q", "block_kv", "stride"), [(32, 32, 4), (64, 16, 16), (16, 32, 1), (32, 32, 32)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_case_equals_oracle(name, reduction, block_q, block_kv, stride, dtype):
    case = dict(CASES[name])
    options = {key: case.pop(key) for key in ("is_causal", "kv_lengths") if key in case}
    if "kv_lengths" in options:
        options["kv_lengths"] = torch.tensor(options["kv_lengths"])
    options |= {"block_q": block_q, "samples_q": block_q // stride, "reduction": reduction}
    options |= {"block_kv": block_kv, "samples_kv": block_kv // stride}
    query, key, _ = make_qkv(**case, dtype=dtype)
    exact = score(query.double(), key.double(), impl="reference", **options)
    low = score(query, key, impl="reference", **options)
    got = score(query, key, impl="torch", **options)
    assert got.dtype == torch.float32
    assert (got >= 0).all()
    assert_within_error_budget(got, exact, low, input_dtype=dtype)


def by_hand(query, key, block_q, block_kv, stride, reduction, is_causal, kv_length, scale):
    """The definition for one head, token by token; float64 ``[q_len, D]`` and ``[kv_len, D]``."""
    q_len, kv_len = len(query), len(key)
    existing = min(kv_length, kv_len)
    q_groups = [list(range(first, min(first + stride, q_len))) for first in range(0, q_len, stride)]
    kv_groups = [list(range(first, min(first + stride, existing))) for first in range(0, existing, stride)]
    found = {}
    for q_group in q_groups:
        logits = {}
        for kv_group in kv_groups:
            if is_causal and kv_group[-1] > q_group[-1] + kv_len - q_len:
                continue
            pairs = list(zip(reversed(q_group), kv_group, strict=False))
            logits[kv_group[0]] = sum(scale * float(query[i] @ key[j]) for i, j in pairs) / len(pairs)
        highest = max(logits.values(), default=0.0)
        weights = {first: math.exp(logit - highest) for first, logit in logits.items()}
        for kv_group in kv_groups:
            weight = weights[kv_group[0]] / sum(weights.values()) if kv_group[0] in weights else 0.0
            found.setdefault((q_group[0] // block_q, kv_group[0] // block_kv), []).append(weight)
    scores = torch.zeros(-(-q_len // block_q), -(-kv_len // block_kv), dtype=torch.float64)
    for pair, weights in found.items():
        scores[pair] = max(weights) if reduction == "max" else sum(weights) / len(weights)
    return scores


@st.composite
def calls(draw, *, most=70):
    """Shapes, options and a seed of a call; lengths shrink to one token."""
    stride = draw(st.sampled_from([1, 2, 4, 8]))
    samples_q, samples_kv = draw(st.sampled_from([1, 2, 4])), draw(st.sampled_from([1, 2, 4]))
    q_len = draw(st.integers(1, most))
    is_causal = draw(st.booleans())
    kv_len = draw(st.integers(q_len if is_causal else 1, most))
    batch, kv_heads, group = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 2))
    lengths = draw(st.none() | st.lists(st.integers(0, kv_len + 5), min_size=batch, max_size=batch))
    tensors = make_qkv(
        batch=batch,
        heads=kv_heads * group,
        kv_heads=kv_heads,
        q_len=q_len,
        kv_len=kv_len,
        head_dim=draw(st.integers(1, 9)),
        dtype=torch.float64,
        seed=draw(st.integers(0, 2**32)),
    )
    options = {
        "block_q": stride * samples_q,
        "block_kv": stride * samples_kv,
        "samples_q": samples_q,
        "samples_kv": samples_kv,
        "reduction": draw(st.sampled_from(["max", "mean"])),
        "is_causal": is_causal,
        "kv_lengths": None if lengths is None else torch.tensor(lengths),
        "scale": draw(st.none() | st.floats(-2, 2)),
    }
    return tensors[0], tensors[1], options


@settings(max_examples=60)
@given(call=calls(most=30))
def test_the_oracle_is_the_definition_token_by_token(call):
    query, key, options = call
    lengths, stride = options["kv_lengths"], options["block_q"] // options["samples_q"]
    scale = query.shape[3] ** -0.5 if options["scale"] is None else options["scale"]
    group = query.shape[1] // key.shape[1]
    sizes = (options["block_q"], options["block_kv"], stride, options["reduction"], options["is_causal"])
    expected = [
        by_hand(q, key[b, h // group], *sizes, key.shape[2] if lengths is None else int(lengths[b]), scale)
        for b, heads in enumerate(query)
        for h, q in enumerate(heads)
    ]
    got = score(query, key, impl="reference", **options)
    expected = torch.stack(expected).view_as(got)
    low = score(query.float(), key.float(), impl="reference", **options)
    assert_within_error_budget(got, expected, low)


@settings(max_examples=80)
@given(call=calls())
def test_torch_equals_oracle_and_scores_are_shares(call):
    query, key, options = call
    exact = score(query, key, impl="reference", **options)
    low = score(query.float(), key.float(), impl="reference", **options)
    got = score(query.float(), key.float(), impl="torch", **options)
    assert_within_error_budget(got, exact, low)
    double = score(query, key, impl="torch", **options)
    assert double.dtype == torch.float64
    assert_within_error_budget(double, exact, low)
    assert ((exact >= 0) & (exact <= 1)).all()
    # A group attends with a weight of 1 in all, so that the means, each times its groups of keys, sum to 1.
    if options["reduction"] == "mean" and options["kv_lengths"] is None:
        block_kv, samples_kv = options["block_kv"], options["samples_kv"]
        left = key.shape[2] - torch.arange(exact.shape[-1]) * block_kv
        groups = (left.clamp(max=block_kv) / (block_kv // samples_kv)).ceil()
        ones = torch.ones(exact.shape[:-1], dtype=torch.float64)
        assert_within_error_budget((exact * groups).sum(-1), ones, (low * groups.float()).sum(-1))


@given(call=calls(), at_once=st.integers(1, 300))
@settings(max_examples=30)
def test_how_many_logits_are_held_changes_no_score(call, at_once):
    query, key, options = call
    whole = score(query, key, impl="torch", **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_impl, "_LOGITS_AT_ONCE", at_once)
        parts = score(query, key, impl="torch", **options)
    low = score(query.float(), key.float(), impl="torch", **options)
    assert_within_error_budget(parts, whole, low)


@pytest.mark.parametrize("impl", IMPLS)
def test_keys_that_do_not_exist_are_not_read(impl):
    query, key, _ = make_qkv(batch=2, q_len=70, kv_len=90)
    lengths = torch.tensor([61, 90])
    clean = score(query, key, kv_lengths=lengths, impl=impl)
    key[0, :, 61:] = torch.nan
    assert torch.equal(score(query, key, kv_lengths=lengths, impl=impl), clean)
    alone = score(query[:1], key[:1, :, :61], impl=impl)
    padded = torch.nn.functional.pad(alone, (0, 1))
    low = score(query[:1].bfloat16(), key[:1, :, :61].bfloat16(), impl="reference")
    assert_within_error_budget(clean[:1], padded, torch.nn.functional.pad(low, (0, 1)), input_dtype=torch.float32)


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_a_group_of_one_token_is_sampled_attention_to_all(impl):
    """With stride 1 groups are tokens, and both methods are attention itself."""
    query, key, _ = make_qkv(q_len=70, kv_len=100, dtype=torch.float64)
    options = {"samples_q": 32, "samples_kv": 32, "is_causal": True, "impl": impl}
    exact = score(query, key, method="sampled", **options)
    low = score(query.float(), key.float(), method="sampled", **options)
    assert_within_error_budget(score(query, key, **options), exact, low)


@pytest.mark.parametrize("impl", IMPLS)
def test_finds_vertical_and_diagonal_lines(impl):
    """What antidiagonals are for: they cross an important key, and a diagonal an odd number of tokens off."""
    query = torch.ones(1, 1, 128, 16)
    for token in (64, 77, 95):
        key = torch.zeros(1, 1, 128, 16)
        key[:, :, token] = 20
        assert (score(query, key, impl=impl).argmax(-1) == 2).all()
    code = torch.eye(128)[None, None] * 20
    order = (torch.arange(128) + 33) % 128
    scores = score(code, code[:, :, order], scale=1.0, reduction="mean", impl=impl)
    assert scores.argmax(-1).tolist() == [[[3, 0, 1, 2]]]


@pytest.mark.parametrize("impl", IMPLS)
def test_large_logits_do_not_overflow(impl):
    for dtype in (torch.float32, torch.float16):
        query, key, _ = make_qkv(q_len=64, dtype=dtype)
        importance = score(query * 200, key * 200, impl=impl)
        assert importance.isfinite().all()
        assert importance.max() > 0.9


@pytest.mark.parametrize("view", VIEWS)
def test_strides_do_not_matter(backend, view):
    query, key, _ = (VIEWS[view](x) for x in make_qkv(q_len=40, kv_len=75, device=backend.device))
    exact = score(query.double(), key.double(), impl="reference")
    low = score(query, key, impl="reference")
    assert_within_error_budget(score(query, key, impl=backend.impl), exact, low)


def test_no_seed_and_no_random_state_counts():
    query, key, _ = make_qkv(q_len=100)
    state = torch.get_rng_state()
    assert torch.equal(score(query, key, seed=3), score(query, key, seed=4))
    assert torch.equal(torch.get_rng_state(), state)


def test_no_gradient_flows():
    query, key, _ = make_qkv(q_len=40)
    assert not score(query.requires_grad_(), key.requires_grad_()).requires_grad


def test_the_fake_describes_the_result():
    query, key, _ = make_qkv(batch=2, heads=4, kv_heads=2, q_len=70, kv_len=100, dtype=torch.float16)
    op = torch.ops.psa_kernels.antidiagonal_importance.default
    for args in (
        (query, key, torch.tensor([100, 33]), 32, 16, 4, "max", False, 0.1, "torch"),
        (query.double(), key.double(), None, 32, 32, 8, "mean", True, 0.1, "reference"),
    ):
        torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("reduction", ["max", "mean"])
def test_compiles_whole(reduction):
    query, key, _ = make_qkv(batch=2, q_len=70, kv_len=100)
    lengths = torch.tensor([100, 33])
    options = {"reduction": reduction, "kv_lengths": lengths, "is_causal": True}
    run = torch.compile(lambda q, k: score(q, k, **options) * 2, fullgraph=True, backend="aot_eager")
    assert torch.equal(run(query, key), score(query, key, **options) * 2)


def test_fakes_on_a_gpu_need_none():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        query, key, _ = (torch.empty(1, 2, 96, 16, device="cuda") for _ in range(3))
        importance = score(query, key)
    assert importance.shape == (1, 2, 3, 3)
    assert importance.device.type == "cuda"


def assert_triton_is_the_oracle(backend, dtype, case, **options):
    case = dict(case)
    options |= {key: case.pop(key) for key in ("is_causal", "kv_lengths") if key in case}
    if "kv_lengths" in options:
        options["kv_lengths"] = torch.tensor(options["kv_lengths"], device=backend.device)
    query, key, _ = make_qkv(**case, dtype=dtype, device=backend.device)
    exact = score(query.double(), key.double(), impl="reference", **options)
    low = score(query, key, impl="reference", **options)
    got = score(query, key, impl="triton", **options)
    assert got.dtype == torch.float32
    assert_within_error_budget(got, exact, low, input_dtype=dtype)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("reduction", ["max", "mean"])
def test_triton_equals_oracle(triton_backend, name, reduction):
    sizes = ((32, 32, 4), (64, 16, 16), (16, 32, 1))
    for dtype, (block_q, block_kv, stride) in zip(cycle(triton_backend.dtypes), sizes, strict=False):
        blocks = {"block_q": block_q, "samples_q": block_q // stride, "block_kv": block_kv}
        blocks |= {"samples_kv": block_kv // stride, "reduction": reduction}
        assert_triton_is_the_oracle(triton_backend, dtype, CASES[name], **blocks)


@pytest.mark.parametrize("reduction", ["max", "mean"])
@pytest.mark.parametrize("is_causal", [False, True])
def test_triton_over_many_tiles_and_a_few_heads_at_once(triton_backend, monkeypatch, is_causal, reduction):
    """Tiles small enough for a short sequence to have masked and unmasked ones, in every place."""
    from psa_kernels.block_importance.antidiagonal import triton_fwd

    monkeypatch.setattr(triton_fwd, "_TILES", (triton_fwd._Tile(16, 16, 4, 1),))
    # A head is 6 query blocks of 8 groups, with 9 floats a group, or 13 for the mean: two or three heads at once.
    monkeypatch.setattr(triton_fwd, "_FLOATS_AT_ONCE", 6 * 8 * 30)
    case = {"batch": 2, "heads": 2, "kv_heads": 1, "q_len": 181, "kv_len": 199, "head_dim": 16}
    case |= {"is_causal": is_causal, "kv_lengths": (199, 130)}
    assert_triton_is_the_oracle(triton_backend, torch.float32, case, reduction=reduction)


def test_triton_refuses_what_it_lacks(triton_backend, monkeypatch):
    from psa_kernels.block_importance.antidiagonal import triton_fwd

    query, key, _ = make_qkv(q_len=40, dtype=torch.float64, device=triton_backend.device)
    with pytest.raises(TypeError, match=r"takes float16, bfloat16 or float32, got torch\.float64"):
        score(query, key, impl="triton")
    score(query.float(), key.float(), impl="triton")
    monkeypatch.setattr(triton_fwd, "shared_memory_limit", lambda device: 999)
    with pytest.raises(ValueError, match=r"samples_kv 8 with head_dim .* do not fit the 999 bytes"):
        score(query.float(), key.float(), impl="triton")


@pytest.mark.parametrize(
    ("message", "options"),
    [
        (r"samples_q must divide block_q 32 with method 'antidiagonal', got 7", {"samples_q": 7}),
        (r"samples_kv must divide block_kv 32 with method 'antidiagonal', got 5", {"samples_kv": 5}),
        (r"must equal block_kv / samples_kv with .*got 32 / 8 and 32 / 4", {"samples_kv": 4}),
        (r"reduction='error' of block_importance needs method 'sampled', got 'antidiag", {"reduction": "error"}),
        (r"impl must be one of", {"impl": "cuda"}),
    ],
)
def test_message(message, options):
    query, key, _ = make_qkv(q_len=40)
    with pytest.raises(ValueError, match=message):
        score(query, key, **options)
