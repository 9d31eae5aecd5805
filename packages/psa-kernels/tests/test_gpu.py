"""What only a GPU can show: sizes past 32-bit offsets, streams, graphs, a second device, no waiting."""

import pytest
import torch

from psa_kernels import (
    BlockLayout,
    LevelPlan,
    block_importance,
    key_similarity,
    pool_pyramid,
    pyramid_attention,
    rank_levels,
)
from psa_kernels.testing import assert_within_error_budget, make_qkv, random_levels

pytestmark = pytest.mark.gpu

BLOCKS = {"block_q": 64, "block_kv": 64}


def pipeline(query, key, value, seed=0):
    """Importance to output, every operator once."""
    importance = block_importance(query, key, samples_q=16, samples_kv=16, seed=seed, **BLOCKS)
    similarity = key_similarity(key, block_kv=64, num_levels=4)
    num_blocks = importance.shape[-1]
    levels = rank_levels(importance, [num_blocks // 4, num_blocks // 2, num_blocks // 2, num_blocks])
    levels = torch.where(similarity[..., 2].unsqueeze(2) > 0, levels, 1).to(torch.int8)
    plan = LevelPlan.from_levels(levels, BlockLayout(query.shape[2], key.shape[2], **BLOCKS))
    return pyramid_attention(query, key, value, plan, **BLOCKS) * plan.density().any()


def test_heads_and_batch_past_a_grid_axis():
    query, key, value = make_qkv(batch=3, heads=22_000, q_len=20, head_dim=16, dtype=torch.float16, device="cuda")
    levels = torch.full((3, 22_000, 1, 1), 2, dtype=torch.int8, device="cuda")
    options = {"block_q": 32, "block_kv": 32}
    out = pyramid_attention(query, key, value, levels, **options)
    importance = block_importance(query, key, samples_q=8, samples_kv=8, **options)
    assert importance.isfinite().all()
    last = slice(21_990, None)
    tail = [x[2:, last] for x in (query, key, value, levels)]
    exact = pyramid_attention(*(x.double() for x in tail[:3]), tail[3], impl="reference", **options)
    low = pyramid_attention(*tail, impl="reference", **options)
    assert_within_error_budget(out[2:, last], exact, low)


def test_offsets_past_two_to_the_31():
    """The last head of a fused QKV view whose offsets overflow 32 bits, beside the same head on its own."""
    length, heads = 70_000, 90
    fused = torch.empty(1, length, 3, heads, 128, dtype=torch.bfloat16, device="cuda")
    assert fused.numel() > 2**31
    small = make_qkv(heads=1, q_len=length, head_dim=128, dtype=torch.bfloat16, device="cuda")
    views = [x.transpose(1, 2)[:, -2:] for x in fused.unbind(2)]
    for view, x in zip(views, small, strict=True):
        view.copy_(x.expand_as(view))
    layout = BlockLayout(length, length, num_levels=4)
    levels = random_levels(layout, heads=1, device="cuda").masked_fill_(
        torch.rand(layout.num_q_blocks, layout.num_kv_blocks, device="cuda") < 0.9, 0
    )
    out = pyramid_attention(*views, levels.expand(1, 2, -1, -1), num_levels=4)
    alone = pyramid_attention(*small, levels, num_levels=4)
    assert torch.equal(out[:, 1:], alone)
    assert alone[:, :, -1].isfinite().all()
    pooled = pool_pyramid(views[1], block_kv=128, num_levels=4)
    assert torch.equal(pooled.pooled[:, 1:], pool_pyramid(small[1], block_kv=128, num_levels=4).pooled)


def test_the_host_never_waits():
    qkv = make_qkv(q_len=300, dtype=torch.bfloat16, device="cuda")
    pipeline(*qkv)
    torch.cuda.set_sync_debug_mode("error")
    try:
        pipeline(*qkv)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_graph_replays():
    qkv = make_qkv(q_len=300, dtype=torch.bfloat16, device="cuda")
    expected = pipeline(*qkv)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = pipeline(*qkv)
    other = make_qkv(q_len=300, dtype=torch.bfloat16, device="cuda", seed=1)
    for x, y in zip(qkv, other, strict=True):
        x.copy_(y)
    graph.replay()
    assert torch.equal(out, pipeline(*other))
    assert not torch.equal(out, expected)


def test_another_stream():
    qkv = make_qkv(q_len=300, dtype=torch.float16, device="cuda")
    expected = pipeline(*qkv)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        out = pipeline(*qkv)
    stream.synchronize()
    assert torch.equal(out, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second GPU")
def test_a_device_that_is_not_the_current_one():
    qkv = make_qkv(q_len=300, dtype=torch.float16, device="cuda:0")
    assert torch.cuda.current_device() == 0
    out = pipeline(*(x.to("cuda:1") for x in qkv))
    assert out.device == torch.device("cuda:1")
    assert torch.equal(out.to("cuda:0"), pipeline(*qkv))


def test_no_compilation_for_a_new_length_or_seed():
    from psa_kernels.block_importance.triton_fwd import _logits_kernel, _positions_kernel, _reduce_kernel
    from psa_kernels.key_similarity.triton_fwd import _similarity_kernel
    from psa_kernels.level_plan.triton_fwd import _plan_kernel
    from psa_kernels.pyramid_attention.triton_fwd import _forward_kernel
    from psa_kernels.pyramid_pool.triton_fwd import _pool_kernel
    from psa_kernels.rank_levels.triton_fwd import _rank_kernel

    kernels = (
        _positions_kernel,
        _logits_kernel,
        _reduce_kernel,
        _similarity_kernel,
        _rank_kernel,
        _plan_kernel,
        _forward_kernel,
        _pool_kernel,
    )

    def compiled():
        return [len(next(iter(kernel.device_caches.values()))[0]) for kernel in kernels]

    def run(length, seed=0):
        pipeline(*make_qkv(heads=16, q_len=length, head_dim=64, dtype=torch.float16, device="cuda"), seed)

    run(1000)
    before = compiled()
    for length in (*range(1, 20), 64, 1024, 1040, 2049):
        run(length)
    for seed in (1, 16, -1, 2**29, 2**31, -(2**70)):
        run(1000, seed)
    assert compiled() == before


def test_torch_implementation_on_a_gpu():
    qkv = make_qkv(q_len=200, kv_len=333, dtype=torch.bfloat16, device="cuda")
    levels = random_levels(BlockLayout(200, 333, **BLOCKS), device="cuda")
    exact = pyramid_attention(*(x.double() for x in qkv), levels, impl="reference", **BLOCKS)
    low = pyramid_attention(*qkv, levels, impl="reference", **BLOCKS)
    assert_within_error_budget(pyramid_attention(*qkv, levels, impl="torch", **BLOCKS), exact, low)


def test_levels_stay_on_the_gpu():
    layout = BlockLayout(300, 300, **BLOCKS)
    levels = random_levels(layout, device="cuda")
    plan = LevelPlan.from_levels(levels, layout)
    assert torch.equal(plan.to_levels(), levels)
    assert plan.density().device.type == "cuda"
