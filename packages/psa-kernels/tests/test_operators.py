"""Registration: fakes agree with the kernels, and torch.compile keeps the operators whole."""

import subprocess
import sys
import warnings

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

from psa_kernels import (
    BlockLayout,
    LevelPlan,
    block_importance,
    checks,
    kd_tree,
    key_similarity,
    kmeans,
    leading_directions,
    permute_tokens,
    pool_pyramid,
    pyramid_attention,
    rank_levels,
    share_levels,
)
from psa_kernels.testing import make_qkv, random_levels

LENGTHS = torch.tensor([100, 33])


def test_fakes_describe_the_results():
    query, key, value = make_qkv(batch=2, heads=4, kv_heads=2, q_len=70, kv_len=100, dtype=torch.float16)
    layout = BlockLayout(70, 100, block_q=32, block_kv=32)
    plan = LevelPlan.from_levels(random_levels(layout, batch=2, heads=4), layout)
    ops = torch.ops.psa_kernels
    checks = ("test_schema", "test_faketensor")
    for op, args in (
        (ops.rank_levels, (torch.zeros(2, 3, 5), [1, 4], None, "torch")),
        (ops.rank_levels, (torch.zeros(2, 3, 5), [], torch.tensor([[1, 4], [0, 2]], dtype=torch.int32), "torch")),
        (ops.share_levels, (torch.ones(2, 3, 5), [0.3, 0.6], 0.1, None, "torch")),
        (ops.share_levels, (torch.ones(2, 3, 5), [0.3], 0.0, torch.tensor([4, 2]), "torch")),
        (ops.level_plan, (plan.to_levels(), 6, "torch")),
        (ops.pyramid_pool, (key, LENGTHS, 5, "torch")),
        (ops.key_similarity, (key, None, 32, 4, "torch")),
        (ops.kd_tree, (key.unflatten(2, (-1, 4)), "torch")),
        (ops.leading_directions, (torch.eye(8).expand(2, 3, 8, 8), torch.eye(8).expand(2, 3, 8, 8), 2, "torch")),
        (ops.permute_tokens, (key, torch.arange(100).expand(2, 2, 100), "torch")),
        (ops.kmeans, (key, key[:, :, ::9].float(), 2, "torch")),
        (ops.block_importance, (query, key, LENGTHS, 32, 16, 8, 8, "max", False, 0.1, 5, "torch")),
        (ops.block_importance, (query, key, None, 32, 16, 8, 8, "mean", True, 0.1, 0, "torch")),
        (ops.block_importance, (query, key, LENGTHS, 32, 16, 8, 8, "error", True, 0.1, 0, "torch")),
        (
            ops.pyramid_attention,
            (query, key, value, plan.indices, plan.offsets, LENGTHS, 32, 32, False, 0.1, "torch"),
        ),
    ):
        torch.library.opcheck(op.default, args, test_utils=checks)


def pipeline(query, key, value, kv_lengths, impl=None):
    """Everything a caller does between q, k, v and the output."""
    blocks = {"block_q": 32, "block_kv": 32, "impl": impl}
    scores = block_importance(query, key, samples_q=8, samples_kv=8, kv_lengths=kv_lengths, **blocks)
    similarity = key_similarity(key, block_kv=32, num_levels=3, impl=impl)
    coarse = pool_pyramid(key, block_kv=32, num_levels=3, impl=impl).level(3)
    clusters = kmeans(key, 5, num_iterations=2, impl=impl)
    tree = kd_tree(key[:, :, :32], impl=impl)
    directions = leading_directions(query.mT @ query, key.mT @ key, 3, impl=impl)
    turned = permute_tokens(key, key[..., 0].argsort(dim=2), impl=impl)
    kept = scores.shape[-1] // 2
    levels = rank_levels(scores, [kept, kept, 2 * kept], impl=impl)
    shorter = rank_levels(scores, torch.tensor([[kept], [1]], dtype=torch.int32), impl=impl)
    by_share = share_levels(scores, [0.3, 0.6], min_first=0.1, impl=impl)
    by_share += share_levels(scores, [0.5], lengths=(kv_lengths + 31) // 32, impl=impl)
    out, lse = pyramid_attention(query, key, value, levels, kv_lengths=kv_lengths, return_lse=True, **blocks)
    plan = LevelPlan.from_levels(levels, BlockLayout(query.shape[2], key.shape[2], block_q=32, block_kv=32), impl=impl)
    planned = pyramid_attention(query, key, value, plan, kv_lengths=kv_lengths, **blocks)
    return (
        out, lse, similarity, coarse, *clusters, directions, tree, turned, planned, plan.density(), shorter, by_share,
    )  # fmt: skip


def test_compiles_whole():
    query, key, value = make_qkv(batch=2, q_len=70, kv_len=100)
    eager = pipeline(query, key, value, LENGTHS)
    compiled = torch.compile(pipeline, fullgraph=True, backend="aot_eager")(query, key, value, LENGTHS)
    assert all(torch.equal(a, b) for a, b in zip(eager, compiled, strict=True))


def test_compiles_for_lengths_it_has_not_seen():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    attend = torch.compile(pipeline, fullgraph=True, backend=counter, dynamic=True)
    for n in range(20):
        qkv = make_qkv(batch=2, q_len=70 + 13 * n, kv_len=100 + 29 * n)
        eager = pipeline(*qkv, LENGTHS)
        assert all(torch.equal(a, b) for a, b in zip(eager, attend(*qkv, LENGTHS), strict=True))
    assert counter.frame_count == 1


@pytest.fixture
def old_gpu(monkeypatch):
    """The CPU passes for a GPU that the Triton kernels do not run on."""
    monkeypatch.setattr(checks, "gpu_capability", lambda device: (7, 5))
    monkeypatch.setattr(checks, "resolve_impl", lambda impl, tensor: impl or checks.AUTO)
    monkeypatch.setattr(checks, "_warned_of_old_gpu", False)


@pytest.mark.parametrize("compiled", [False, True])
def test_an_old_gpu_takes_torch_with_one_warning(old_gpu, compiled):
    qkv = make_qkv(batch=2, q_len=70, kv_len=100)
    run = torch.compile(pipeline, fullgraph=True, backend="aot_eager") if compiled else pipeline
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        first, second = run(*qkv, LENGTHS), run(*qkv, LENGTHS)
    said = [str(warning.message) for warning in caught if "compute capability" in str(warning.message)]
    assert len(said) == 1
    assert "need a GPU of compute capability 8.0 or higher, and cpu has 7.5" in said[0]
    expected = pipeline(*qkv, LENGTHS, impl="torch")
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(expected, first, second, strict=True))


@pytest.mark.parametrize("compiled", [False, True])
def test_triton_by_name_on_an_old_gpu_is_an_error(old_gpu, compiled):
    qkv = make_qkv(batch=2, q_len=70, kv_len=100)
    run = torch.compile(pipeline, fullgraph=True, backend="aot_eager") if compiled else pipeline
    with pytest.raises(
        ValueError, match=r"impl='triton'.*capability 8\.0 or higher, and cpu has 7\.5; use impl='torch'"
    ):
        run(*qkv, LENGTHS, impl="triton")


def test_only_a_gpu_leaves_the_implementation_open():
    assert checks.resolve_impl(None, torch.zeros(1)) == "torch"
    cpu = torch.device("cpu")
    assert checks.impl_to_run(checks.AUTO, cpu) == "torch"
    assert [checks.impl_to_run(impl, cpu) for impl in checks.IMPLS] == list(checks.IMPLS)


def test_import_is_light():
    """Importing loads no Triton and starts no GPU, so it works where there is neither."""
    code = (
        "import sys; sys.modules['triton'] = None; import torch, psa_kernels, psa_kernels.testing; "
        "assert not torch.cuda.is_initialized()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_unnamed_implementation_on_a_gpu():
    """Which one runs is settled on the GPU, and operators hand the open choice on. No GPU is needed for that."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    blocks = {"block_q": 32, "block_kv": 32}
    with FakeTensorMode():
        query, key, value = (torch.empty(1, 2, 96, 16, device="cuda") for _ in range(3))
        levels = rank_levels(block_importance(query, key, samples_q=8, samples_kv=8, **blocks), [1])
        out = pyramid_attention(query, key, value, levels, **blocks)
    assert out.shape == query.shape
    assert out.device.type == "cuda"


def test_a_traced_map_has_no_values_to_check():
    """In a FakeTensorMode, and under torch.func.vmap, which does not show those of a sample."""
    query, key, value = make_qkv(q_len=64, head_dim=16)
    levels = torch.tensor([[[[1, 2], [0, 6]]]], dtype=torch.int8).expand(1, 2, 2, 2)

    def attend(query, key, value, levels):
        return pyramid_attention(query, key, value, levels, block_q=32, block_kv=32)

    with FakeTensorMode() as mode:
        fake = attend(*(mode.from_tensor(x) for x in (query, key, value, levels)))
    assert fake.shape == query.shape
    mapped = torch.func.vmap(attend)(*(torch.stack([x, x]) for x in (query, key, value, levels)))
    assert torch.equal(mapped[1], attend(query, key, value, levels))


@pytest.mark.parametrize("impl", [None, "torch", "triton", "reference"])
def test_meta_tensors_have_shapes_from_every_implementation(impl):
    query, key, value = (x.to("meta") for x in make_qkv(q_len=64, head_dim=16))
    levels = torch.ones(1, 2, 2, 2, dtype=torch.int8, device="meta")
    out, lse = pyramid_attention(query, key, value, levels, block_q=32, block_kv=32, return_lse=True, impl=impl)
    assert (out.shape, lse.shape) == (query.shape, query.shape[:3])
