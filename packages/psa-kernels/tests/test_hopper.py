"""The forward kernel for Hopper against the oracle, with every level, and that it runs when it should and only then."""

import importlib
import subprocess
import sys

import pytest
import torch

from psa_kernels import BlockLayout, LevelPlan, pyramid_attention
from psa_kernels.testing import VIEWS, assert_within_error_budget, make_qkv, random_levels

HOPPER = "psa_kernels.pyramid_attention.hopper_fwd"


@pytest.fixture
def launches(monkeypatch):
    """The calls that the kernel got."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the kernel is for capability 9.0")
    module = importlib.import_module(HOPPER)
    launch, calls = module.launch, []

    def spy(*args):
        calls.append(args)
        launch(*args)

    monkeypatch.setattr(module, "launch", spy)
    return calls


def check(qkv, levels, **options):
    """Output and lse lie within the error budget of the oracle's."""
    options["return_lse"] = True
    exact = pyramid_attention(*(x.double() for x in qkv), levels, impl="reference", **options)
    low = pyramid_attention(*qkv, levels, impl="reference", **options)
    got = pyramid_attention(*qkv, levels, impl="triton", **options)
    for result, ref64, rounded in zip(got, exact, low, strict=True):
        assert_within_error_budget(result, ref64, rounded, input_dtype=qkv[0].dtype)


def inputs(*, num_levels=None, block_kv=128, seed=1, **shape):
    """Queries, keys and values on the GPU, and a map with every level."""
    shape = {"q_len": 300, "kv_len": 500, "head_dim": 128, "dtype": torch.bfloat16} | shape
    qkv = make_qkv(**shape, device="cuda", seed=seed)
    layout = BlockLayout(shape["q_len"], shape["kv_len"], block_kv=block_kv, num_levels=num_levels)
    batch, heads = qkv[0].shape[:2]
    return qkv, random_levels(layout, batch=batch, heads=heads, device="cuda", seed=seed)


CASES = {
    "one block": {"q_len": 128, "kv_len": 128},
    "ragged both": {},
    "one query": {"q_len": 1, "kv_len": 3001},
    "part of a block": {"q_len": 700, "kv_len": 64},
    "one key": {"q_len": 130, "kv_len": 1},
    "whole blocks, many": {"q_len": 256, "kv_len": 5120},
    "GQA 4, batch": {"batch": 2, "heads": 8, "kv_heads": 2},
    # More query blocks than multiprocessors, so that each program takes several.
    "programs that stay": {"batch": 2, "heads": 40, "q_len": 1000, "kv_len": 1411},
    "float16": {"dtype": torch.float16},
    "head_dim 64": {"head_dim": 64},
    "head_dim 64, many": {"head_dim": 64, "batch": 2, "heads": 40, "q_len": 1000, "kv_len": 5120},
    "head_dim 72": {"head_dim": 72},
    "head_dim 96, float16": {"head_dim": 96, "dtype": torch.float16},
}


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_case_equals_oracle(launches, name):
    check(*inputs(**CASES[name]))
    assert len(launches) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("block_kv", [32, 64, 128])
def test_every_number_of_levels(launches, head_dim, block_kv):
    """With few of them no block is so small that its rows are gathered."""
    most = BlockLayout(1, 1, block_kv=block_kv).num_levels
    for num_levels in range(1, most + 1):
        shape = {"num_levels": num_levels, "block_kv": block_kv, "head_dim": head_dim}
        # More query blocks than multiprocessors, whose programs stay, and few, some with nothing of some level.
        for size in ({"heads": 40, "q_len": 600, "kv_len": 1411}, {"kv_len": 200}):
            check(*inputs(**shape, **size), block_kv=block_kv, num_levels=num_levels)
    assert len(launches) == 2 * most


@pytest.mark.gpu
def test_own_scale(launches):
    check(*inputs(), scale=0.3)
    assert len(launches) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("block_kv", [32, 64, 128])
@pytest.mark.parametrize("tail", [0, 1, 7, 31, 64, 127])
def test_one_level_at_tails(launches, tail, block_kv):
    most = BlockLayout(1, 1, block_kv=block_kv).num_levels
    for level in range(1, most + 1):
        (query, key, value), levels = inputs(heads=1, q_len=130, kv_len=256 + tail, block_kv=block_kv, seed=level)
        check((query, key, value), torch.full_like(levels, level), block_kv=block_kv)
    assert len(launches) == most


@pytest.mark.gpu
def test_drawn_lengths(launches):
    generator = torch.Generator().manual_seed(0)
    for seed in range(25):
        q_len, kv_len = (int(x) for x in torch.randint(1, 900, (2,), generator=generator))
        check(*inputs(heads=4, kv_heads=2, q_len=q_len, kv_len=kv_len, seed=seed))
    assert len(launches) == 25


@pytest.mark.gpu
@pytest.mark.parametrize("view", VIEWS)
def test_layouts(launches, view):
    """What no descriptor takes goes to the other kernel, and is right too."""
    qkv, levels = inputs()
    check([VIEWS[view](x) for x in qkv], levels)
    assert len(launches) == (view in ("transposed", "fused"))


@pytest.mark.gpu
def test_queries_with_nothing_to_read(launches):
    qkv, levels = inputs()
    levels[:, :, 1] = 0
    check(qkv, levels)
    out, lse = pyramid_attention(*qkv, levels, return_lse=True)
    assert (out[:, :, 128:256] == 0).all()
    assert (lse[:, :, 128:256] == -torch.inf).all()


@pytest.mark.gpu
def test_what_is_not_read_stays_unread(launches):
    """Blocks that nobody reads may hold what is no number, and so may what no tile fills of shared memory."""
    qkv, levels = inputs(kv_len=1411)
    levels[..., 3] = 0
    clean = pyramid_attention(*qkv, levels)
    for x in qkv[1:]:
        x[:, :, 3 * 128 : 4 * 128] = torch.nan
    assert torch.equal(pyramid_attention(*qkv, levels), clean)
    assert len(launches) == 2


@pytest.mark.gpu
def test_what_is_no_number_shows(launches):
    qkv, levels = inputs()
    levels.fill_(1)
    qkv[2][:, :, 200] = torch.nan
    assert pyramid_attention(*qkv, levels).isnan().all()


@pytest.mark.gpu
def test_same_bits_again_and_in_a_graph(launches):
    qkv, levels = inputs(heads=40, q_len=1000, kv_len=1411)
    plan = LevelPlan.from_levels(levels, BlockLayout(1000, 1411))
    first = pyramid_attention(*qkv, plan)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = pyramid_attention(*qkv, plan)
    for _ in range(3):
        captured.zero_()
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(captured, first)
        assert torch.equal(pyramid_attention(*qkv, plan), first)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ({"head_dim": 56}, {}),
        ({"head_dim": 100}, {}),
        ({"head_dim": 256}, {}),
        ({"dtype": torch.float32}, {}),
        ({}, {"scale": -0.1}),
        ({"q_len": 300}, {"is_causal": True}),
        ({}, {"kv_lengths": (400,)}),
        ({}, {"block_q": 64}),
        ({}, {"block_kv": 16}),
    ],
    ids=str,
)
def test_the_other_kernel_has_the_rest(launches, shape, options):
    options = dict(options)
    if "kv_lengths" in options:
        options["kv_lengths"] = torch.tensor(options["kv_lengths"], device="cuda")
    qkv, _ = inputs(**shape)
    blocks = {name: options[name] for name in ("block_q", "block_kv", "is_causal") if name in options}
    levels = random_levels(BlockLayout(300, 500, **blocks), device="cuda")
    check(qkv, levels, **options)
    assert not launches


def test_what_it_takes(monkeypatch):
    """What is asked on every launch, with a device that need not be there."""
    module = pytest.importorskip(HOPPER)
    monkeypatch.setattr(module, "is_hopper", lambda device: True)
    monkeypatch.setattr(module, "shared_memory_limit", lambda device: 227 * 1024)
    qkv = make_qkv(head_dim=128, dtype=torch.bfloat16)
    asked = {"block_q": 128, "block_kv": 128, "num_levels": 8, "is_causal": False, "scale": 0.1}
    for change in ({}, {"num_levels": 1}, {"block_kv": 64}, {"block_kv": 32}):
        assert module.takes(*qkv, None, **(asked | change)), change
    for change in ({"block_q": 64}, {"block_kv": 16}, {"is_causal": True}, {"scale": -0.1}):
        assert not module.takes(*qkv, None, **(asked | change)), change
    assert not module.takes(*qkv, torch.tensor([100]), **asked)
    for shape in ({"head_dim": 56}, {"head_dim": 100}, {"head_dim": 256}, {"dtype": torch.float32}):
        other = make_qkv(**({"head_dim": 128, "dtype": torch.bfloat16} | shape))
        assert not module.takes(*other, None, **asked), shape
    for shape in ({"head_dim": 64}, {"head_dim": 72}, {"dtype": torch.float16}):
        other = make_qkv(**({"head_dim": 128, "dtype": torch.bfloat16} | shape))
        assert module.takes(*other, None, **asked), shape
    monkeypatch.setattr(module, "shared_memory_limit", lambda device: 163 * 1024)
    assert not module.takes(*qkv, None, **asked)


@pytest.mark.parametrize("version", ["3.5.1", "3.10.0", "4.0.0+git1"])
def test_another_triton_has_the_other_kernel(version):
    """In a process of its own, as what was imported stays."""
    pytest.importorskip("triton")
    code = (
        f"import triton; triton.__version__ = {version!r}\n"
        "from psa_kernels.pyramid_attention import triton_fwd; assert triton_fwd._hopper is None"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
