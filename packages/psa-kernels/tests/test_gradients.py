"""Gradients of ``pyramid_attention`` on every backend against the oracle, and the oracle against differences."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import forward_ad, gradcheck
from torch.utils.checkpoint import checkpoint

from psa_kernels import BlockLayout, LevelPlan, permute_tokens, pool_pyramid, pyramid_attention
from psa_kernels.testing import VIEWS, assert_within_error_budget, make_qkv, random_levels


def gradients(qkv, levels, *, dtype, through_lse=True, **options):
    """Of query, key and value, for gradients of out and lse that are the same, in ``dtype``, for every precision."""
    qkv = [x.detach().requires_grad_() for x in qkv]
    results = pyramid_attention(*qkv, levels, return_lse=True, **options)
    generator = torch.Generator().manual_seed(7)
    drawn = [torch.randn(x.shape, generator=generator).to(dtype).to(x.device, x.dtype) for x in results]
    count = 2 if through_lse else 1
    return torch.autograd.grad(results[:count], qkv, drawn[:count])


def check(backend, qkv, levels, **options):
    """Gradients of the backend lie within the error budget of the oracle's."""
    options["dtype"] = qkv[0].dtype
    exact = gradients([x.double() for x in qkv], levels, impl="reference", **options)
    low = gradients(qkv, levels, impl="reference", **options)
    got = gradients(qkv, levels, impl=backend.impl, **options)
    for gradient, ref64, rounded, x in zip(got, exact, low, qkv, strict=True):
        assert gradient.dtype == x.dtype
        assert_within_error_budget(gradient, ref64, rounded)


CASES = {
    "one block": {},
    "ragged both": {"q_len": 100, "kv_len": 143},
    "one query": {"q_len": 1, "kv_len": 129},
    "one key": {"q_len": 70, "kv_len": 1},
    "q longer": {"q_len": 150, "kv_len": 40},
    "GQA 4": {"heads": 4, "kv_heads": 1, "q_len": 33, "kv_len": 40},
    "GQA 2, batch": {"batch": 2, "heads": 4, "kv_heads": 2, "q_len": 40, "kv_len": 75},
    "head_dim 1": {"head_dim": 1, "q_len": 70},
    "head_dim 40": {"head_dim": 40, "q_len": 70},
    "head_dim 128": {"head_dim": 128, "q_len": 70},
    # Rows of no whole number of 16 bytes. Where a query reads one row alone, the gradient is rounding and little else.
    "head_dim 250": {"head_dim": 250, "q_len": 40, "kv_len": 100},
    "kv_lengths": {"batch": 3, "q_len": 40, "kv_len": 100, "kv_lengths": (100, 67, 1)},
    "a sample with no keys": {"batch": 2, "q_len": 40, "kv_len": 75, "kv_lengths": (0, 50)},
    "causal": {"q_len": 100, "is_causal": True},
    "causal, more keys": {"q_len": 37, "kv_len": 100, "is_causal": True},
    "causal, GQA, kv_lengths": {
        "batch": 2,
        "heads": 4,
        "kv_heads": 2,
        "q_len": 33,
        "kv_len": 50,
        "is_causal": True,
        "kv_lengths": (50, 40),
    },
    "own scale": {"q_len": 70, "scale": -0.3},
    "two levels": {"q_len": 70, "num_levels": 2},
    "one level": {"q_len": 70, "num_levels": 1},
    "without lse": {"q_len": 70, "through_lse": False},
}
# The interpreter runs what the others do not show, in one precision each: float32 and float16 have tiles of their own.
INTERPRETED = {
    torch.float16: ("ragged both", "head_dim 40", "a sample with no keys", "causal, GQA, kv_lengths"),
    torch.float32: ("one query", "head_dim 250", "GQA 4", "causal, more keys", "own scale"),
}


def interpreted(backend):
    return backend.impl == "triton" and backend.device == "cpu"


def precisions(backend, name):
    if not interpreted(backend):
        return backend.dtypes
    return [dtype for dtype, names in INTERPRETED.items() if name in names]


OPTIONS = ("is_causal", "scale", "num_levels", "kv_lengths", "through_lse")


@pytest.fixture
def fast_backend(backend):
    """Where kernels are compiled: what a test of registration needs no interpreter for."""
    if interpreted(backend):
        pytest.skip("too slow to interpret all")
    return backend


@pytest.mark.parametrize("name", CASES)
def test_case_equals_oracle(backend, name):
    case = dict(CASES[name])
    options = {key: case.pop(key) for key in OPTIONS if key in case}
    if "kv_lengths" in options:
        options["kv_lengths"] = torch.tensor(options["kv_lengths"], device=backend.device)
    dtypes = precisions(backend, name)
    if not dtypes:
        pytest.skip("too slow to interpret all")
    for dtype in dtypes:
        qkv = make_qkv(**case, dtype=dtype, device=backend.device, seed=1)
        layout = BlockLayout(
            qkv[0].shape[2],
            qkv[1].shape[2],
            block_q=32,
            block_kv=32,
            **{key: options[key] for key in ("num_levels", "is_causal") if key in options},
        )
        levels = random_levels(layout, batch=qkv[0].shape[0], heads=qkv[0].shape[1], device=backend.device, seed=2)
        check(backend, qkv, levels, block_q=32, block_kv=32, **options)


@pytest.mark.parametrize("block_kv", [16, 32, 64, 128])
@pytest.mark.parametrize("block_q", [16, 32, 64, 128])
def test_every_block_size(backend, block_q, block_kv):
    if interpreted(backend) and (block_q, block_kv) not in ((16, 16), (16, 128), (128, 16), (64, 64), (128, 128)):
        pytest.skip("too slow to interpret all")
    layout = BlockLayout(70, 150, block_q=block_q, block_kv=block_kv)
    levels = random_levels(layout, heads=1, device=backend.device)
    dtypes = (torch.float16,) if interpreted(backend) else backend.dtypes
    for dtype in dtypes:
        qkv = make_qkv(heads=1, q_len=70, kv_len=150, dtype=dtype, device=backend.device)
        check(backend, qkv, levels, block_q=block_q, block_kv=block_kv)


@pytest.mark.parametrize("level", range(1, 9))
def test_one_level_at_tails(backend, level):
    if interpreted(backend) and level not in (2, 8):
        pytest.skip("too slow to interpret all")
    for tail in (7,) if interpreted(backend) else (1, 7, 64, 127):
        qkv = make_qkv(heads=1, q_len=16, kv_len=128 + tail, head_dim=16, device=backend.device, seed=tail)
        levels = torch.full((1, 1, 1, 2), level, dtype=torch.int8, device=backend.device)
        check(backend, qkv, levels, block_q=16, block_kv=128)


def test_drawn_shapes_and_levels(backend):
    longest, most, examples = (70, 1, 3) if interpreted(backend) else (200, 2, backend.examples)

    @settings(max_examples=examples)
    @given(
        q_len=st.integers(1, longest),
        kv_len=st.integers(1, longest),
        batch=st.integers(1, most),
        kv_heads=st.integers(1, most),
        group=st.sampled_from([1, 2, 4][: most + 1]),
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


@pytest.mark.parametrize("impl", ["reference", "torch"])
@pytest.mark.parametrize("is_causal", [False, True])
def test_gradients_are_differences(impl, is_causal):
    """Of out and lse, ragged, grouped, with a sample of no keys and a query block that reads nothing."""
    qkv = make_qkv(batch=2, kv_heads=1, q_len=5, kv_len=11, head_dim=2, dtype=torch.float64)
    options = {"block_q": 2, "block_kv": 4, "is_causal": is_causal, "impl": impl}
    levels = random_levels(BlockLayout(5, 11, block_q=2, block_kv=4), batch=2)
    levels[:, :, 1] = 0
    lengths = torch.tensor([11, 0])

    def attend(*qkv):
        out, lse = pyramid_attention(*qkv, levels, kv_lengths=lengths, return_lse=True, **options)
        return out, lse.masked_fill(lse == -math.inf, 0)

    assert torch.autograd.gradcheck(attend, [x.requires_grad_() for x in qkv])


def test_nothing_to_read_has_no_gradient(backend):
    """Gradients of such queries are 0, whatever comes in for their lse, and blocks that nobody reads stay unread."""
    query, key, value = make_qkv(q_len=100, device=backend.device)
    levels = torch.ones(1, 2, 4, 4, dtype=torch.int8, device=backend.device)
    levels[:, :, 2, :2] = 3
    levels[:, :, 1] = 0
    levels[..., 3] = 0
    key[:, :, 96:], value[:, :, 96:] = math.nan, math.nan
    qkv = [x.requires_grad_() for x in (query, key, value)]
    out, lse = pyramid_attention(*qkv, levels, block_q=32, block_kv=32, return_lse=True, impl=backend.impl)
    grad_lse = torch.ones_like(lse).masked_fill(lse == -math.inf, math.nan)
    of_query, of_key, of_value = torch.autograd.grad((out, lse), qkv, (torch.ones_like(out), grad_lse))
    assert (of_query[:, :, 32:64] == 0).all()
    assert all(x.isfinite().all() for x in (of_query, of_key, of_value))
    assert (of_key[:, :, 96:] == 0).all()
    assert (of_value[:, :, 96:] == 0).all()
    assert (of_value[:, :, :96] != 0).all()


def test_what_lies_past_a_length_has_no_part(backend):
    query, key, value = make_qkv(batch=2, heads=1, q_len=30, kv_len=100, device=backend.device)
    levels = random_levels(BlockLayout(30, 100, block_q=32, block_kv=32), batch=2, heads=1, device=backend.device)
    lengths = torch.tensor([70, 33], device=backend.device)
    options = {"block_q": 32, "block_kv": 32, "kv_lengths": lengths, "impl": backend.impl, "dtype": torch.float32}
    clean = gradients((query, key, value), levels, **options)
    for b, length in enumerate(lengths.tolist()):
        key[b, :, length:], value[b, :, length:] = math.nan, math.inf
        assert (clean[1][b, :, length:] == 0).all()
    again = gradients((query, key, value), levels, **options)
    assert all(torch.equal(a, b) for a, b in zip(clean, again, strict=True))


def test_values_share_the_gradient_of_their_row(backend):
    """With one key a query there is nothing to weigh: each token of a row of n gets 1/n of the gradient."""
    query, key, value = make_qkv(heads=1, q_len=16, kv_len=13, device=backend.device)
    levels = torch.full((1, 1, 1, 1), 5, dtype=torch.int8, device=backend.device)
    options = {"block_q": 16, "block_kv": 16, "impl": backend.impl}
    value.requires_grad_()
    pyramid_attention(query, key, value, levels, **options).sum().backward()
    exact = torch.full_like(value, 16 / 13, dtype=torch.float64)
    assert_within_error_budget(value.grad, exact, exact.float())


def test_size_of_logits_leaves_weights_alone(backend):
    """What is added to all keys adds to all logits of a query alike, and weights stay what they were.

    The log-sum-exp, from which they are recomputed, is then rounded at its new size. Token t has feature t alone as the
    gradient of its output, so that the gradient of the values is the weights, and each query's add up to one. Multiples
    of an eighth make scores exact.
    """
    if backend.impl != "triton":
        pytest.skip("weights of the torch implementation are as exact as the log-sum-exp, like the oracle's")
    layout = BlockLayout(32, 80, block_q=32, block_kv=32, num_levels=3)
    plan = LevelPlan.from_levels(torch.tensor([[[[1, 3, 1]]]], dtype=torch.int8, device=backend.device), layout)
    made = make_qkv(heads=1, q_len=32, kv_len=80, head_dim=32, device=backend.device)
    query, key, value = ((x * 4).round() / 8 for x in made)
    query += 4
    identity = torch.eye(32, device=backend.device)[None, None]

    def sums(key, impl, dtype=torch.float32):
        qkv = [x.to(dtype).requires_grad_() for x in (query, key, value)]
        options = {"block_q": 32, "block_kv": 32, "num_levels": 3, "scale": 0.125, "return_lse": True, "impl": impl}
        out, lse = pyramid_attention(*qkv, plan, **options)
        (of_value,) = torch.autograd.grad(out, qkv[2], identity.to(dtype))
        return of_value.sum(dim=2), lse

    exact, small = sums(key, "reference", torch.float64)
    low, _ = sums(key, "reference")
    got, large = sums(key + 5, backend.impl)
    assert small.max() < 10
    assert 60 < large.min() < large.max() < 100
    assert_within_error_budget(got, exact, low)


@pytest.mark.parametrize("view", VIEWS)
def test_strides_do_not_matter(backend, view):
    if interpreted(backend) and view not in ("expanded",):
        pytest.skip("too slow to interpret all")
    qkv = make_qkv(q_len=40, kv_len=75, device=backend.device)
    levels = random_levels(BlockLayout(40, 75, block_q=32, block_kv=32), device=backend.device)
    options = {"block_q": 32, "block_kv": 32, "impl": backend.impl}
    strided = [VIEWS[view](x) for x in qkv]
    packed = [x.clone(memory_format=torch.contiguous_format) for x in strided]
    grad_out = make_qkv(q_len=40, device=backend.device, seed=3)[0]
    results = []
    for inputs, grad in ((strided, VIEWS[view](grad_out)), (packed, VIEWS[view](grad_out).contiguous())):
        inputs = [x.detach().requires_grad_() for x in inputs]
        results.append(torch.autograd.grad(pyramid_attention(*inputs, levels, **options), inputs, grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_same_bits_twice(backend):
    qkv = make_qkv(kv_heads=1, q_len=50, device=backend.device)
    levels = random_levels(BlockLayout(50, 50, block_q=32, block_kv=32), device=backend.device)
    options = {"block_q": 32, "block_kv": 32, "impl": backend.impl, "dtype": torch.float32}
    first, second = (gradients(qkv, levels, **options) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_plan_takes_the_place_of_levels(fast_backend):
    """And inputs that want no gradient get none."""
    query, key, value = make_qkv(heads=1, q_len=30, device=fast_backend.device)
    layout = BlockLayout(30, 30, block_q=16, block_kv=16)
    levels = random_levels(layout, heads=1, device=fast_backend.device)
    options = {"block_q": 16, "block_kv": 16, "impl": fast_backend.impl}
    results = []
    for what in (levels, LevelPlan.from_levels(levels, layout)):
        key.grad = None
        pyramid_attention(query, key.requires_grad_(), value, what, **options).sum().backward()
        results.append(key.grad)
    assert torch.equal(*results)
    assert query.grad is None


def test_gradients_leave_the_forward_pass_alone(fast_backend):
    qkv = make_qkv(heads=1, q_len=30, device=fast_backend.device)
    levels = random_levels(BlockLayout(30, 30, block_q=16, block_kv=16), heads=1, device=fast_backend.device)
    options = {"block_q": 16, "block_kv": 16, "impl": fast_backend.impl}
    plain = pyramid_attention(*qkv, levels, **options)
    assert plain.grad_fn is None
    assert torch.equal(pyramid_attention(*(x.requires_grad_() for x in qkv), levels, **options), plain)


def test_checkpoints_and_autocast_change_nothing(fast_backend):
    qkv = [x.requires_grad_() for x in make_qkv(heads=1, q_len=30, device=fast_backend.device)]
    levels = random_levels(BlockLayout(30, 30, block_q=32, block_kv=32), heads=1, device=fast_backend.device)

    def attend(*qkv):
        return pyramid_attention(*qkv, levels, block_q=32, block_kv=32, impl=fast_backend.impl)

    expected = torch.autograd.grad(attend(*qkv).sum(), qkv)
    for reentrant in (False, True):
        for x in qkv:
            x.grad = None
        with torch.autocast(fast_backend.device, dtype=torch.bfloat16):
            out = checkpoint(attend, *qkv, use_reentrant=reentrant)
        out.sum().backward()
        assert all(torch.equal(x.grad, y) for x, y in zip(qkv, expected, strict=True))


def test_second_derivatives_are_refused(backend):
    qkv = [x.requires_grad_() for x in make_qkv(q_len=16, device=backend.device)]
    levels = torch.ones(1, 2, 1, 1, dtype=torch.int8, device=backend.device)
    out = pyramid_attention(*qkv, levels, block_q=16, block_kv=16, impl=backend.impl)
    (of_query,) = torch.autograd.grad(out.sum(), qkv[0], create_graph=True)
    with pytest.raises(NotImplementedError, match=r"has first derivatives only.*impl='reference' can"):
        of_query.sum().backward()


def test_compiles_whole():
    torch._dynamo.reset()
    options = {"block_q": 32, "block_kv": 32}

    def loss(query, key, value, levels):
        out, lse = pyramid_attention(query * 2, key, value, levels, return_lse=True, **options)
        return (out.square().sum() + lse.sum()).sin()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for length in (70, 101):
        qkv = [x.requires_grad_() for x in make_qkv(q_len=length)]
        levels = random_levels(BlockLayout(length, length, **options))
        levels[..., 0] = 1
        expected, got = (torch.autograd.grad(run(*qkv, levels), qkv) for run in (loss, compiled))
        assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))


def test_registration():
    layout = BlockLayout(20, 30, block_q=16, block_kv=16)
    plan = LevelPlan.from_levels(random_levels(layout), layout)
    qkv = [x.requires_grad_() for x in make_qkv(q_len=20, kv_len=30, head_dim=8, dtype=torch.float64)]
    options = (plan.indices, plan.offsets, None, 16, 16, False, 0.3, "torch")
    torch.library.opcheck(torch.ops.psa_kernels.pyramid_attention.default, (*qkv, *options))
    query, key, value = (x.detach() for x in qkv)
    out, lse = torch.ops.psa_kernels.pyramid_attention(query, key, value, *options)
    arguments = (torch.ones_like(out), None, query, key, value, out, lse, *options)
    torch.library.opcheck(torch.ops.psa_kernels.pyramid_attention_backward.default, arguments)


OPERATORS = {
    "pyramid_attention": lambda x: pyramid_attention(
        x, x, x, torch.ones(1, 2, 2, 2, dtype=torch.int8), block_q=32, block_kv=32
    ),
    "permute_tokens": lambda x: permute_tokens(x, torch.arange(64).flip(0).expand(1, 2, 64)),
    "pool_pyramid": lambda x: pool_pyramid(x, block_kv=32, num_levels=2).pooled,
}


def _dual_numbers(operator, x):
    with forward_ad.dual_level():
        operator(forward_ad.make_dual(x, x))


DERIVATIVES = {
    "dual numbers": _dual_numbers,
    "jvp": lambda operator, x: torch.func.jvp(operator, (x,), (x,)),
    "jvp of vmap": lambda operator, x: torch.func.jvp(torch.func.vmap(operator), (x[None],), (x[None],)),
    "grad": lambda operator, x: torch.func.grad(lambda x: operator(x).sum())(x),
    "grad of vmap": lambda operator, x: torch.func.grad(lambda x: torch.func.vmap(operator)(x).sum())(x[None]),
}


@pytest.mark.parametrize("derivative", DERIVATIVES)
@pytest.mark.parametrize("name", OPERATORS)
def test_other_derivatives_are_refused(name, derivative):
    """Not given as 0, as torch does in forward mode for an operator that has none."""
    query, _, _ = make_qkv(q_len=64, head_dim=16)
    # One with no derivative at all refuses it as it refuses a tensor that requires grad.
    refusal = ValueError if name == "pool_pyramid" else NotImplementedError  # torch's own type for a lacking one
    with pytest.raises(refusal, match=f"^{name} has"):
        DERIVATIVES[derivative](OPERATORS[name], query)


@pytest.mark.parametrize("name", OPERATORS)
def test_constants_inside_of_other_derivatives_are_not(name):
    query, _, _ = make_qkv(q_len=64, head_dim=16)
    operator, expected = OPERATORS[name], OPERATORS[name](query)

    def of_constants(x):
        with torch.no_grad():
            unseen = operator(x + 0)
        return (x * x).sum(), (unseen, operator(x.detach()))

    gradient, (unseen, detached) = torch.func.grad(of_constants, has_aux=True)(query)
    assert torch.equal(gradient, 2 * query)
    assert torch.equal(unseen, expected)
    assert torch.equal(detached, expected)


def test_the_oracle_has_derivatives_in_forward_mode():
    query, key, value = make_qkv(heads=1, q_len=3, head_dim=2, dtype=torch.float64)
    levels = torch.tensor([[[[1, 2], [2, 0]]]], dtype=torch.int8)

    def attend(query):
        return pyramid_attention(query, key, value, levels, block_q=2, block_kv=2, impl="reference")

    assert gradcheck(attend, query.requires_grad_(), check_forward_ad=True)
