"""``pyramid_attention`` on every backend against the oracle, and the oracle against what it must equal."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from psa_kernels import BlockLayout, LevelPlan, key_similarity, pool_pyramid, pyramid_attention
from psa_kernels.testing import VIEWS, assert_within_error_budget, error_budget, make_qkv, random_levels


def check(backend, qkv, levels, **options):
    """Out and lse of the backend lie within the error budget of the oracle."""
    ref64 = pyramid_attention(*(x.double() for x in qkv), levels, impl="reference", return_lse=True, **options)
    low = pyramid_attention(*qkv, levels, impl="reference", return_lse=True, **options)
    got = pyramid_attention(*qkv, levels, impl=backend.impl, return_lse=True, **options)
    assert got[0].dtype == qkv[0].dtype
    assert got[1].dtype == torch.float32
    for out, exact, rounded in zip(got, ref64, low, strict=True):
        assert_within_error_budget(out, exact, rounded, input_dtype=qkv[0].dtype)


def assert_equal_in_float64(out, other, low):
    """Two float64 results differ by the error of float32, ``low``, scaled down to float64."""
    single, double = (torch.finfo(dtype).eps for dtype in (torch.float32, torch.float64))
    assert (out - other).abs().max() <= error_budget(other, low, single) * double / single


PRECISIONS = (torch.float32, torch.float16)  # on every backend; each has tiles and a pipeline of its own


def some(backend, values, few):
    """All ``values`` where a run is fast, ``few`` of them in the interpreter."""
    return few if backend.impl == "triton" and backend.device == "cpu" else values


CASES = {
    "one block": {},
    "ragged both": {"q_len": 200, "kv_len": 333},
    "one query": {"q_len": 1, "kv_len": 129},
    "one key": {"q_len": 70, "kv_len": 1},
    "tail of one": {"q_len": 129, "kv_len": 65},
    "q longer": {"q_len": 150, "kv_len": 40},
    "GQA 4": {"heads": 4, "kv_heads": 1, "q_len": 90, "kv_len": 140},
    "GQA 2, batch": {"batch": 2, "heads": 4, "kv_heads": 2, "q_len": 90, "kv_len": 140},
    "GQA 8": {"batch": 2, "heads": 8, "kv_heads": 1, "q_len": 70, "kv_len": 100},
    "head_dim 1": {"head_dim": 1, "q_len": 70},
    "head_dim 16": {"head_dim": 16, "q_len": 100},
    "head_dim 40": {"head_dim": 40, "q_len": 100},
    "head_dim 64": {"head_dim": 64, "q_len": 100},
    "head_dim 72": {"head_dim": 72, "q_len": 70},
    "head_dim 80": {"head_dim": 80, "q_len": 100},
    "head_dim 96": {"head_dim": 96, "q_len": 70},
    "head_dim 128": {"head_dim": 128, "q_len": 100},
    "head_dim 160": {"head_dim": 160, "q_len": 70},
    "head_dim 250": {"head_dim": 250, "q_len": 40},  # rows of no whole number of 16 bytes
    "head_dim 256": {"head_dim": 256, "q_len": 70},
    "kv_lengths": {"batch": 3, "q_len": 70, "kv_len": 150, "kv_lengths": (150, 67, 1)},
    "a sample with no keys": {"batch": 2, "q_len": 70, "kv_len": 150, "kv_lengths": (0, 99)},
    "causal": {"q_len": 200, "kv_len": 200, "is_causal": True},
    "causal, more keys": {"q_len": 77, "kv_len": 200, "is_causal": True},
    "causal decode": {"q_len": 1, "kv_len": 200, "is_causal": True},
    "causal, GQA, kv_lengths": {
        "batch": 2,
        "heads": 4,
        "kv_heads": 2,
        "q_len": 70,
        "kv_len": 130,
        "is_causal": True,
        "kv_lengths": (130, 100),
    },
    "own scale": {"q_len": 100, "scale": 0.3},
    "two levels": {"q_len": 100, "num_levels": 2},
    "one level": {"q_len": 100, "num_levels": 1},
}
OPTIONS = ("is_causal", "scale", "num_levels", "kv_lengths")


@pytest.mark.parametrize("name", CASES)
def test_case_equals_oracle(backend, name):
    case = dict(CASES[name])
    options = {key: case.pop(key) for key in OPTIONS if key in case}
    if "kv_lengths" in options:
        options["kv_lengths"] = torch.tensor(options["kv_lengths"], device=backend.device)
    for dtype in backend.dtypes:
        qkv = make_qkv(**case, dtype=dtype, device=backend.device, seed=1)
        layout = BlockLayout(
            qkv[0].shape[2],
            qkv[1].shape[2],
            block_q=64,
            block_kv=64,
            **{key: options[key] for key in ("num_levels", "is_causal") if key in options},
        )
        levels = random_levels(layout, batch=qkv[0].shape[0], heads=qkv[0].shape[1], device=backend.device, seed=2)
        check(backend, qkv, levels, block_q=64, block_kv=64, **options)


@pytest.mark.parametrize("block_kv", [16, 32, 64, 128])
@pytest.mark.parametrize("block_q", [16, 32, 64, 128])
def test_every_block_size(backend, block_q, block_kv):
    layout = BlockLayout(150, 279, block_q=block_q, block_kv=block_kv)
    levels = random_levels(layout, heads=1, device=backend.device)
    for dtype in PRECISIONS:
        qkv = make_qkv(heads=1, q_len=150, kv_len=279, dtype=dtype, device=backend.device)
        check(backend, qkv, levels, block_q=block_q, block_kv=block_kv)


@pytest.mark.parametrize("num_levels", range(1, 9))
def test_every_number_of_levels(backend, num_levels):
    layout = BlockLayout(70, 500, num_levels=num_levels)
    levels = random_levels(layout, device=backend.device)
    for dtype in PRECISIONS:
        qkv = make_qkv(q_len=70, kv_len=500, dtype=dtype, device=backend.device)
        check(backend, qkv, levels, num_levels=num_levels)


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("level", range(1, 9))
def test_one_level_at_every_tail(backend, level, dtype):
    for tail in some(backend, range(1, 129), (1, 7, 127, 128)):
        qkv = make_qkv(heads=1, q_len=16, kv_len=128 + tail, head_dim=16, dtype=dtype, device=backend.device, seed=tail)
        levels = torch.full((1, 1, 1, 2), level, dtype=torch.int8, device=backend.device)
        check(backend, qkv, levels, block_q=16, block_kv=128)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("dtype", PRECISIONS)
def test_every_tail_of_the_queries(backend, dtype, is_causal):
    """With ``is_causal`` also every place of the diagonal in a block."""
    for q_len in some(backend, range(1, 98), (1, 31, 32, 66, 97)):
        qkv = make_qkv(heads=1, q_len=q_len, kv_len=97, head_dim=16, dtype=dtype, device=backend.device, seed=q_len)
        layout = BlockLayout(q_len, 97, block_q=32, block_kv=32, is_causal=is_causal)
        levels = random_levels(layout, heads=1, device=backend.device, seed=q_len)
        check(backend, qkv, levels, block_q=32, block_kv=32, is_causal=is_causal)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("dtype", PRECISIONS)
def test_every_length_of_a_sample(backend, dtype, is_causal):
    lengths = some(backend, range(131), (0, 1, 33, 63, 64, 126, 130))
    qkv = make_qkv(batch=len(lengths), heads=1, q_len=20, kv_len=130, head_dim=16, dtype=dtype, device=backend.device)
    layout = BlockLayout(20, 130, block_q=16, block_kv=64, is_causal=is_causal)
    levels = random_levels(layout, batch=len(lengths), heads=1, device=backend.device)
    kv_lengths = torch.tensor(lengths, device=backend.device)
    check(backend, qkv, levels, block_q=16, block_kv=64, is_causal=is_causal, kv_lengths=kv_lengths)


def test_drawn_shapes_and_levels(backend):
    @settings(max_examples=backend.examples)
    @given(
        q_len=st.integers(1, 150),
        kv_len=st.integers(1, 300),
        batch=st.integers(1, 2),
        kv_heads=st.integers(1, 2),
        group=st.sampled_from([1, 2, 4]),
        head_dim=st.integers(1, 128),
        block_q=st.sampled_from([16, 32, 64, 128]),
        block_kv=st.sampled_from([16, 32, 64, 128]),
        is_causal=st.booleans(),
        lengths=st.none() | st.tuples(st.integers(0, 310), st.integers(0, 310)),
        dtype=st.sampled_from(backend.dtypes),
        seed=st.integers(0, 2**16),
    )
    def run(q_len, kv_len, batch, kv_heads, group, head_dim, block_q, block_kv, is_causal, lengths, dtype, seed):
        kv_len = max(kv_len, q_len) if is_causal else kv_len
        heads = kv_heads * group
        qkv = make_qkv(
            batch=batch,
            heads=heads,
            kv_heads=kv_heads,
            q_len=q_len,
            kv_len=kv_len,
            head_dim=head_dim,
            dtype=dtype,
            device=backend.device,
            seed=seed,
        )
        layout = BlockLayout(q_len, kv_len, block_q=block_q, block_kv=block_kv, is_causal=is_causal)
        levels = random_levels(layout, batch=batch, heads=heads, device=backend.device, seed=seed)
        kv_lengths = None if lengths is None else torch.tensor(lengths[:batch], device=backend.device)
        options = {"block_q": block_q, "block_kv": block_kv, "is_causal": is_causal}
        check(backend, qkv, levels, kv_lengths=kv_lengths, **options)

    run()


@pytest.mark.parametrize("is_causal", [False, True])
def test_oracle_at_level_1_is_dense_attention(is_causal):
    qkv = make_qkv(batch=2, heads=4, kv_heads=2, q_len=150, dtype=torch.float64)
    levels = torch.ones(2, 4, 2, 2, dtype=torch.int8)
    out = pyramid_attention(*qkv, levels, is_causal=is_causal, impl="reference")
    dense, low = (
        scaled_dot_product_attention(*(x.to(dtype) for x in qkv), is_causal=is_causal, enable_gqa=True)
        for dtype in (torch.float64, torch.float32)
    )
    assert_equal_in_float64(out, dense, low)


def test_level_1_is_dense_attention(backend):
    query, key, value = make_qkv(q_len=150, kv_len=203, device=backend.device)
    levels = torch.ones(1, 2, 2, 2, dtype=torch.int8, device=backend.device)
    out = pyramid_attention(query, key, value, levels, impl=backend.impl)
    exact = scaled_dot_product_attention(query.double(), key.double(), value.double())
    low = scaled_dot_product_attention(query.cpu(), key.cpu(), value.cpu())
    assert_within_error_budget(out, exact, low)


def test_values_of_one_give_one(backend):
    query, key, value = make_qkv(q_len=100, kv_len=333, device=backend.device)
    levels = random_levels(BlockLayout(100, 333, block_q=32, block_kv=64), device=backend.device)
    levels[..., 0] = 7
    out = pyramid_attention(query, key, torch.ones_like(value), levels, block_q=32, block_kv=64, impl=backend.impl)
    ones = torch.ones_like(out, dtype=torch.float64)
    assert_within_error_budget(out, ones, ones.to(out.dtype))


def test_constant_groups_make_pooling_exact(backend):
    """Where the tokens that a row merges are alike, pooling loses nothing, the ragged tail included."""
    query, key, value = make_qkv(q_len=70, kv_len=150, device=backend.device)
    key, value = (x[:, :, ::8].repeat_interleave(8, dim=2)[:, :, :150] for x in (key, value))
    levels = torch.tensor([[4, 3, 4]], dtype=torch.int8, device=backend.device).expand(1, 2, 2, 3)
    out = pyramid_attention(query, key, value, levels, block_q=64, block_kv=64, impl=backend.impl)
    exact = scaled_dot_product_attention(query.double(), key.double(), value.double())
    low = scaled_dot_product_attention(query.cpu(), key.cpu(), value.cpu())
    assert_within_error_budget(out, exact, low)


def test_blocks_may_be_cut_finer(backend):
    """The same pattern over tokens gives the same result, whatever the blocks it is written in."""
    qkv = make_qkv(q_len=130, kv_len=290, device=backend.device)
    coarse = random_levels(BlockLayout(130, 290, block_q=64, block_kv=128, num_levels=5), device=backend.device)
    exact = pyramid_attention(*(x.double() for x in qkv), coarse, block_q=64, impl="reference")
    low = pyramid_attention(*qkv, coarse, block_q=64, impl="reference")
    for block_q, block_kv in ((64, 128), (32, 64), (16, 16)):
        finer = coarse.repeat_interleave(64 // block_q, dim=2).repeat_interleave(128 // block_kv, dim=3)
        finer = finer[:, :, : -(-130 // block_q), : -(-290 // block_kv)]
        out = pyramid_attention(*qkv, finer, block_q=block_q, block_kv=block_kv, impl=backend.impl)
        assert_within_error_budget(out, exact, low)


def test_nothing_to_read_gives_zero(backend):
    qkv = make_qkv(q_len=100, device=backend.device)
    levels = torch.ones(1, 2, 4, 4, dtype=torch.int8, device=backend.device)
    levels[:, :, 1] = 0
    out, lse = pyramid_attention(*qkv, levels, block_q=32, block_kv=32, return_lse=True, impl=backend.impl)
    assert (out[:, :, 32:64] == 0).all()
    assert (lse[:, :, 32:64] == -math.inf).all()
    assert lse[:, :, 64:].isfinite().all()
    assert out.isfinite().all()
    nowhere = pyramid_attention(*qkv, levels * 0, block_q=32, block_kv=32, impl=backend.impl)
    assert (nowhere == 0).all()


@pytest.mark.parametrize("dtype", PRECISIONS)
def test_halves_merge_by_lse(backend, dtype):
    query, key, value = make_qkv(q_len=80, kv_len=256, dtype=dtype, device=backend.device)
    levels = random_levels(BlockLayout(80, 256, block_q=16, block_kv=64), device=backend.device)
    levels[:, :, 2] = 0
    options = {"block_q": 16, "block_kv": 64, "return_lse": True}
    halves = [
        pyramid_attention(
            query,
            key[:, :, part],
            value[:, :, part],
            levels[..., blocks].contiguous(),
            impl=backend.impl,
            **options,
        )
        for part, blocks in ((slice(0, 128), slice(0, 2)), (slice(128, 256), slice(2, 4)))
    ]
    lse = torch.logaddexp(halves[0][1], halves[1][1])
    merged = sum(out * (part - lse).exp().nan_to_num(0)[..., None] for out, part in halves)
    exact = pyramid_attention(query.double(), key.double(), value.double(), levels, impl="reference", **options)
    low = pyramid_attention(query, key, value, levels, impl="reference", **options)
    assert_within_error_budget(merged, exact[0], low[0])
    assert_within_error_budget(lse, exact[1], low[1], input_dtype=dtype)


def test_batch_is_a_loop_over_samples(backend):
    qkv = make_qkv(batch=3, q_len=70, kv_len=130, device=backend.device)
    levels = random_levels(BlockLayout(70, 130, block_q=32, block_kv=32), batch=3, device=backend.device)
    lengths = torch.tensor([130, 64, 33], device=backend.device)
    options = {"block_q": 32, "block_kv": 32, "impl": backend.impl}
    out = pyramid_attention(*qkv, levels, kv_lengths=lengths, **options)
    for b in range(3):
        one = slice(b, b + 1)
        alone = pyramid_attention(*(x[one] for x in qkv), levels[one], kv_lengths=lengths[one], **options)
        assert torch.equal(out[one], alone)


def test_what_lies_past_a_length_has_no_part(backend):
    query, key, value = make_qkv(batch=2, q_len=40, kv_len=150, device=backend.device)
    levels = random_levels(BlockLayout(40, 150, block_q=32, block_kv=32), batch=2, device=backend.device)
    lengths = torch.tensor([70, 33], device=backend.device)
    options = {"block_q": 32, "block_kv": 32, "kv_lengths": lengths, "impl": backend.impl}
    clean = pyramid_attention(query, key, value, levels, **options)
    for b, length in enumerate(lengths.tolist()):
        key[b, :, length:], value[b, :, length:] = math.nan, math.inf
    assert torch.equal(pyramid_attention(query, key, value, levels, **options), clean)


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("view", VIEWS)
def test_strides_do_not_matter(backend, view, dtype):
    qkv = make_qkv(q_len=90, kv_len=200, dtype=dtype, device=backend.device)
    levels = random_levels(BlockLayout(90, 200, block_q=32, block_kv=64), device=backend.device)
    strided = [VIEWS[view](x) for x in qkv]
    packed = [x.clone(memory_format=torch.contiguous_format) for x in strided]
    options = {"block_q": 32, "block_kv": 64, "impl": backend.impl}
    out = pyramid_attention(*strided, levels, **options)
    assert torch.equal(out, pyramid_attention(*packed, levels, **options))


def test_a_plan_takes_the_place_of_levels(backend):
    qkv = make_qkv(q_len=90, device=backend.device)
    layout = BlockLayout(90, 90, block_q=32, block_kv=32)
    levels = random_levels(layout, device=backend.device)
    options = {"block_q": 32, "block_kv": 32, "impl": backend.impl}
    out = pyramid_attention(*qkv, LevelPlan.from_levels(levels, layout), **options)
    assert torch.equal(out, pyramid_attention(*qkv, levels, **options))


def test_same_bits_twice(backend):
    qkv = make_qkv(q_len=200, device=backend.device)
    levels = random_levels(BlockLayout(200, 200, block_q=64, block_kv=64), device=backend.device)
    state = torch.get_rng_state()
    first, second = (pyramid_attention(*qkv, levels, block_q=64, block_kv=64, impl=backend.impl) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), state)


def test_sparse_differs_from_dense(backend):
    qkv = make_qkv(q_len=256, device=backend.device)
    dense = torch.ones(1, 2, 2, 2, dtype=torch.int8, device=backend.device)
    pooled, skipped = dense.clone(), dense.clone()
    pooled[..., 1], skipped[..., 1] = 4, 0
    full, *others = (pyramid_attention(*qkv, x, impl=backend.impl) for x in (dense, pooled, skipped))
    assert all((full - other).abs().max() > 1e-2 for other in others)


def test_float64_on_torch_is_the_oracle():
    qkv = make_qkv(q_len=90, dtype=torch.float64)
    levels = random_levels(BlockLayout(90, 90, block_q=32, block_kv=32))
    levels[..., 0] = 1
    options = {"block_q": 32, "block_kv": 32, "return_lse": True}
    exact = pyramid_attention(*qkv, levels, impl="reference", **options)
    single = pyramid_attention(*(x.float() for x in qkv), levels, impl="reference", **options)
    for out, ref, low in zip(pyramid_attention(*qkv, levels, impl="torch", **options), exact, single, strict=True):
        assert out.dtype == torch.float64
        assert_equal_in_float64(out, ref, low)


def test_more_heads_than_a_grid_axis_holds():
    heads = 65_537
    query, key, value = make_qkv(heads=heads, kv_heads=1, q_len=16, head_dim=16)
    levels = torch.ones(1, heads, 1, 1, dtype=torch.int8)
    out = pyramid_attention(query, key, value, levels, block_q=16, block_kv=16, impl="torch")
    last = pyramid_attention(query[:, -1:], key, value, levels[:, -1:], block_q=16, block_kv=16, impl="torch")
    assert torch.equal(out[:, -1:], last)


def test_oracle_pools_as_pool_pyramid_does():
    query, key, value = make_qkv(heads=1, q_len=16, kv_len=100, dtype=torch.float64)
    levels = torch.full((1, 1, 1, 1), 3, dtype=torch.int8)
    rows = [pool_pyramid(x, block_kv=128, num_levels=3, impl="reference") for x in (key, value)]
    bias = rows[0].counts(3).double().log()
    dense, low = (
        scaled_dot_product_attention(
            *(x.to(dtype) for x in (query, rows[0].level(3), rows[1].level(3))),
            attn_mask=bias.to(dtype).expand(16, -1),
        )
        for dtype in (torch.float64, torch.float32)
    )
    out = pyramid_attention(query, key, value, levels, block_q=16, impl="reference")
    assert_equal_in_float64(out, dense, low)


def test_oracle_is_differentiable():
    qkv = [x.requires_grad_() for x in make_qkv(heads=1, q_len=10, head_dim=4, dtype=torch.float64)]
    levels = torch.tensor([[[[1, 0, 2], [3, 2, 1], [0, 0, 0]]]], dtype=torch.int8)

    def attend(*qkv):
        return pyramid_attention(*qkv, levels, block_q=4, block_kv=4, impl="reference")

    assert torch.autograd.gradcheck(attend, qkv)


def test_strides_of_what_goes_beside_do_not_matter(backend):
    """Lengths and plans that are views of something larger."""
    qkv = make_qkv(batch=2, q_len=40, kv_len=90, device=backend.device)
    layout = BlockLayout(40, 90, block_q=16, block_kv=16)
    levels = random_levels(layout, batch=2, heads=4, device=backend.device)
    lengths = torch.tensor([70, 1, 33, 2], device=backend.device)[::2]
    whole = LevelPlan.from_levels(levels, layout, impl=backend.impl)
    view = LevelPlan(whole.indices[:, ::2], whole.offsets[:, ::2], layout)
    options = {"block_q": 16, "block_kv": 16, "impl": backend.impl}
    out = pyramid_attention(*qkv, view, kv_lengths=lengths, **options)
    packed = pyramid_attention(*qkv, levels[:, ::2].contiguous(), kv_lengths=lengths.clone(), **options)
    assert torch.equal(out, packed)
    for operator in (pool_pyramid, key_similarity):
        one, other = (
            operator(qkv[1], block_kv=16, num_levels=3, kv_lengths=x, impl=backend.impl)
            for x in (lengths, lengths.clone())
        )
        same = torch.equal(one, other) if isinstance(one, torch.Tensor) else torch.equal(one.pooled, other.pooled)
        assert same


def test_a_length_past_all_keys_is_no_limit(backend):
    qkv = make_qkv(q_len=40, kv_len=90, device=backend.device)
    levels = random_levels(BlockLayout(40, 90, block_q=16, block_kv=16), device=backend.device)
    options = {"block_q": 16, "block_kv": 16, "impl": backend.impl}
    far = torch.tensor([2**32], device=backend.device)
    assert torch.equal(
        pyramid_attention(*qkv, levels, kv_lengths=far, **options), pyramid_attention(*qkv, levels, **options)
    )


def test_autocast_changes_nothing(backend):
    qkv = make_qkv(q_len=40, device=backend.device)
    levels = random_levels(BlockLayout(40, 40, block_q=16, block_kv=16), device=backend.device)
    for impl in (backend.impl, "reference"):
        expected = pyramid_attention(*qkv, levels, block_q=16, block_kv=16, impl=impl)
        with torch.autocast(backend.device, dtype=torch.bfloat16):
            out = pyramid_attention(*qkv, levels, block_q=16, block_kv=16, impl=impl)
        assert torch.equal(out, expected)


def test_not_a_number_shows(backend):
    query, key, value = make_qkv(q_len=40, device=backend.device)
    query[:, :, 3] = math.nan
    levels = torch.ones(1, 2, 3, 3, dtype=torch.int8, device=backend.device)
    out, lse = pyramid_attention(query, key, value, levels, block_q=16, block_kv=16, return_lse=True, impl=backend.impl)
    assert out[:, :, 3].isnan().all()
    assert lse[:, :, 3].isnan().all()
    assert out[:, :, 4:].isfinite().all()


@pytest.mark.parametrize("size", [80, 1000])
def test_half_precision_does_not_overflow_on_the_way(backend, size):
    """Products of queries and keys, and sums over a block, past the largest float16."""
    big = torch.full((1, 1, 128, 16), float(size), dtype=torch.float16, device=backend.device)
    query = big if size == 80 else big / 1000
    for level in (1, 8):
        levels = torch.full((1, 1, 1, 1), level, dtype=torch.int8, device=backend.device)
        for impl in (backend.impl, "reference"):
            assert torch.equal(pyramid_attention(query, big, big, levels, impl=impl), big)


def test_oracle_gradients_where_nothing_is_kept():
    qkv = [x.requires_grad_() for x in make_qkv(batch=2, q_len=32, head_dim=8)]
    levels = torch.full((2, 2, 2, 2), 2, dtype=torch.int8)
    out = pyramid_attention(*qkv, levels, block_q=16, block_kv=16, kv_lengths=torch.tensor([0, 20]), impl="reference")
    out.sum().backward()
    assert all(x.grad.isfinite().all() for x in qkv)
    assert (qkv[0].grad[0] == 0).all()


@pytest.mark.parametrize(("heads", "num_q_blocks", "num_levels"), [(1, 1, 1), (3, 130, 4), (2, 300, 8)])
def test_heavy_query_blocks_start_first(triton_backend, heads, num_q_blocks, num_levels):
    """Every row once, heads in order, and no row before one of its head with clearly more work."""
    from psa_kernels.pyramid_attention.triton_order import heavy_first

    layout = BlockLayout(num_q_blocks * 128, 40 * 128, num_levels=num_levels)
    generator = torch.Generator().manual_seed(0)
    kept = torch.rand(2, heads, num_q_blocks, 40, generator=generator) < torch.rand(
        2, heads, num_q_blocks, 1, generator=generator
    )
    levels = (torch.randint(1, num_levels + 1, kept.shape, generator=generator) * kept).to(torch.int8)
    plan = LevelPlan.from_levels(levels.to(triton_backend.device), layout)
    order = heavy_first(plan.offsets, 40, 128).cpu().long()
    assert torch.equal(order.sort().values, torch.arange(order.numel()))
    assert torch.equal(order // num_q_blocks, torch.arange(order.numel()) // num_q_blocks)
    rows = 128 // 2 ** torch.arange(num_levels)
    share = ((plan.offsets.cpu().diff(dim=-1) * rows).sum(-1) / (40 * 128)).flatten()[order].view(-1, num_q_blocks)
    classes = (share.double() ** 0.25 * 32).clamp(max=31)
    assert (classes.diff(dim=-1) < 1).all()


def test_only_the_oracle_overflows_in_float16():
    """Logits of 40 * 40 * 64 are more than float16 holds, and the oracle's alone are of the dtype of its inputs."""
    x, value = torch.full((1, 1, 16, 64), 40.0, dtype=torch.float16), torch.ones(1, 1, 16, 64, dtype=torch.float16)
    levels = torch.ones(1, 1, 1, 1, dtype=torch.int8)
    assert not pyramid_attention(x, x, value, levels, scale=1.0, impl="reference").isfinite().any()
    assert torch.equal(pyramid_attention(x, x, value, levels, scale=1.0, impl="torch"), value)
