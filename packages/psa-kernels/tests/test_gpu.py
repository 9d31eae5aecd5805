"""What only a GPU can show: sizes past 32-bit offsets, streams, graphs, a second device, no waiting."""

import warnings

import pytest
import torch
from torch._dynamo.utils import counters

from psa_kernels import (
    BlockLayout,
    LevelPlan,
    block_importance,
    checks,
    kd_tree,
    key_similarity,
    leading_directions,
    permute_tokens,
    pool_pyramid,
    pyramid_attention,
    rank_levels,
    share_levels,
)
from psa_kernels.testing import assert_within_error_budget, make_qkv, random_levels

pytestmark = pytest.mark.gpu

BLOCKS = {"block_q": 64, "block_kv": 64}


def pipeline(query, key, value, seed=0):
    """Importance to output, every operator once."""
    importance = block_importance(query, key, samples_q=16, samples_kv=16, seed=seed, **BLOCKS)
    similarity = key_similarity(key, block_kv=64, num_levels=4)
    tree = kd_tree(key[:, :, : key.shape[2] // 64 * 64].unflatten(2, (-1, 64))[..., :8])
    moments = (x.float().mT @ x.float() for x in (query, key))
    directions = leading_directions(*moments, 3)
    permuted = permute_tokens(key, key[..., 0].argsort(dim=2))
    num_blocks = importance.shape[-1]
    levels = rank_levels(importance, [num_blocks // 4, num_blocks // 2, num_blocks // 2, num_blocks])
    levels = torch.maximum(levels, share_levels(importance, [0.3, 0.6], min_first=0.1))
    levels = torch.where(similarity[..., 2].unsqueeze(2) > 0, levels, 1).to(torch.int8)
    plan = LevelPlan.from_levels(levels, BlockLayout(query.shape[2], key.shape[2], **BLOCKS))
    out = pyramid_attention(query, key, value, plan, **BLOCKS)
    return out * plan.density().any() * (tree >= 0).all() * directions.isfinite().all() * permuted.isfinite().all()


def masked_pipeline(query, key, value, kv_lengths):
    """The operators that take them, with a causal mask and a length a sample."""
    options = {"is_causal": True, "kv_lengths": kv_lengths, **BLOCKS}
    importance = block_importance(query, key, samples_q=16, samples_kv=16, reduction="mean", **options)
    similarity = key_similarity(key, block_kv=64, num_levels=7, kv_lengths=kv_lengths)
    levels = (importance > 0).to(torch.int8) * 7
    levels = torch.where(similarity[..., 5].unsqueeze(2) > 0, levels, 1).to(torch.int8)
    return pyramid_attention(query, key, value, levels, return_lse=True, **options)


def test_heads_and_batch_past_a_grid_axis():
    query, key, value = make_qkv(batch=3, heads=22_000, q_len=20, head_dim=16, dtype=torch.float16, device="cuda")
    levels = torch.full((3, 22_000, 1, 1), 2, dtype=torch.int8, device="cuda")
    options = {"block_q": 32, "block_kv": 32}
    out = pyramid_attention(query, key, value, levels, **options)
    importance = block_importance(query, key, samples_q=8, samples_kv=8, **options)
    assert importance.isfinite().all()
    similarity = key_similarity(key, block_kv=32, num_levels=3)
    last = slice(21_990, None)
    tail = [x[2:, last] for x in (query, key, value, levels)]
    exact = pyramid_attention(*(x.double() for x in tail[:3]), tail[3], impl="reference", **options)
    low = pyramid_attention(*tail, impl="reference", **options)
    assert_within_error_budget(out[2:, last], exact, low)
    wide, half = ([x.to(dtype) for x in tail[:2]] for dtype in (torch.float64, torch.float16))
    exact, low = (block_importance(*x, samples_q=8, samples_kv=8, impl="reference", **options) for x in (wide, half))
    assert_within_error_budget(importance[2:, last], exact, low, input_dtype=torch.float16)
    exact, low = (key_similarity(x[1], block_kv=32, num_levels=3, impl="reference") for x in (wide, half))
    assert_within_error_budget(similarity[2:, last], exact, low, input_dtype=torch.float16)


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
    similarity = key_similarity(views[1], block_kv=128, num_levels=4)
    assert torch.equal(similarity[:, 1:], key_similarity(small[1], block_kv=128, num_levels=4))
    options = {"block_q": 128, "block_kv": 128, "samples_q": 16, "samples_kv": 16}
    importance = block_importance(*views[:2], **options)
    assert torch.equal(importance[:, 1:], block_importance(*small[:2], **options))


def results_of_many_heads(operator, heads):
    """What ``operator`` writes for ``heads`` heads that are all views of one, ``[1, heads, ...]``."""
    length = {"attention": 16_384, "pooling": 40_000, "plan": 108_800, "importance": 32_768}[operator]
    if operator == "plan":
        layout = BlockLayout(length, length, num_levels=4)
        return LevelPlan.from_levels(
            random_levels(layout, heads=1, device="cuda").expand(1, heads, -1, -1), layout
        ).indices
    kv_len = 200 if operator == "attention" else length
    one = make_qkv(heads=1, q_len=length, kv_len=kv_len, head_dim=128, dtype=torch.float16, device="cuda")
    query, key, value = (x.expand(1, heads, -1, -1) for x in one)
    if operator == "attention":
        levels = random_levels(BlockLayout(length, kv_len), heads=1, device="cuda").clamp(min=1)
        return pyramid_attention(query, key, value, levels.expand(1, heads, -1, -1))
    if operator == "pooling":
        return pool_pyramid(key, block_kv=128, num_levels=2).pooled
    return block_importance(query, key, block_q=128, block_kv=128, samples_q=16, samples_kv=16)


@pytest.mark.parametrize(
    ("operator", "heads"), [("attention", 1100), ("pooling", 900), ("plan", 3000), ("importance", 2100)]
)
def test_results_past_two_to_the_31(operator, heads):
    """The results, and for importance what passes between its kernels, have more than 2**31 elements."""
    many = results_of_many_heads(operator, heads)
    if operator == "importance":
        assert heads * (32_768 // 128) ** 2 * 16 > 2**31
    else:
        assert many.numel() > 2**31
    one = results_of_many_heads(operator, 2)[:, 0]
    assert all(torch.equal(many[:, head], one) for head in (0, heads // 2, heads - 1))


def test_the_host_never_waits():
    qkv = make_qkv(q_len=300, dtype=torch.bfloat16, device="cuda")
    kv_lengths = torch.tensor([299], device="cuda")
    pipeline(*qkv)
    masked_pipeline(*qkv, kv_lengths)
    torch.cuda.set_sync_debug_mode("error")
    try:
        pipeline(*qkv)
        masked_pipeline(*qkv, kv_lengths)
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


def test_gradients_wait_for_nothing_and_replay_in_a_graph():
    options = {"is_causal": True, "return_lse": True, **BLOCKS}

    def gradients(query, key, value, grad_out):
        plan = LevelPlan.from_levels(levels, BlockLayout(300, 300, is_causal=True, **BLOCKS))
        out, lse = pyramid_attention(query, key, value, plan, kv_lengths=kv_lengths, **options)
        return torch.autograd.grad((out, lse), (query, key, value), (grad_out, grad_out[..., 0].float()))

    def inputs(seed):
        tensors = (*make_qkv(heads=4, kv_heads=2, q_len=300, seed=seed), make_qkv(heads=4, q_len=300, seed=9)[0])
        return [x.to("cuda", torch.bfloat16).requires_grad_(n < 3) for n, x in enumerate(tensors)]

    levels = random_levels(BlockLayout(300, 300, **BLOCKS), heads=4, device="cuda")
    kv_lengths = torch.tensor([299], device="cuda")
    static = inputs(0)
    first = gradients(*static)
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = gradients(*static)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = gradients(*static)
    other = inputs(1)
    with torch.no_grad():
        for x, y in zip(static, other, strict=True):
            x.copy_(y)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(found, gradients(*other), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(found, first, strict=True))


def test_gradients_past_two_to_the_31():
    """The last head of views whose offsets overflow 32 bits, beside the same head on its own."""
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
    results = []
    for tensors, map_of_heads in ((views, levels.expand(1, 2, -1, -1)), (small, levels)):
        inputs = [x.detach().requires_grad_() for x in tensors]
        out = pyramid_attention(*inputs, map_of_heads, num_levels=4)
        grad_out = small[0].expand_as(out).contiguous()
        results.append([x[:, -1:] for x in torch.autograd.grad(out, inputs, grad_out)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert all(x.isfinite().all() for x in results[0])


def test_another_stream():
    qkv = make_qkv(q_len=300, dtype=torch.float16, device="cuda")
    expected = pipeline(*qkv)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        out = pipeline(*qkv)
    stream.synchronize()
    assert torch.equal(out, expected)


def test_two_streams_at_once():
    inputs = [make_qkv(heads=4, q_len=2000, dtype=torch.float16, device="cuda", seed=seed) for seed in (0, 1)]
    expected = [pipeline(*qkv) for qkv in inputs]
    streams = [torch.cuda.Stream() for _ in inputs]
    first, last = ([torch.cuda.Event(enable_timing=True) for _ in inputs] for _ in range(2))
    outputs = [[], []]
    torch.cuda.synchronize()
    for stream, event in zip(streams, first, strict=True):
        with torch.cuda.stream(stream):
            torch.cuda._sleep(200_000_000)  # about 0.1 s, so that both queues fill before either starts
            event.record()
    for _ in range(10):
        for stream, qkv, outs in zip(streams, inputs, outputs, strict=True):
            with torch.cuda.stream(stream):
                outs.append(pipeline(*qkv))
    for stream, event in zip(streams, last, strict=True):
        event.record(stream)
    torch.cuda.synchronize()
    assert first[0].elapsed_time(last[1]) > 0
    assert first[1].elapsed_time(last[0]) > 0
    for outs, out in zip(outputs, expected, strict=True):
        assert all(torch.equal(x, out) for x in outs)


@pytest.mark.parametrize(("mode", "dynamic"), [("default", None), ("default", True), ("reduce-overhead", None)])
def test_compiles_whole(mode, dynamic):
    """By torch's own compiler and, with ``reduce-overhead``, into a CUDA graph: one program, the same bits."""
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(pipeline, fullgraph=True, mode=mode, dynamic=dynamic)
    for length in (300, 517, 1001) if dynamic else (300,):
        qkv = make_qkv(q_len=length, dtype=torch.bfloat16, device="cuda")
        expected = pipeline(*qkv)
        for _ in range(3):
            assert torch.equal(compiled(*qkv), expected)
    assert counters["stats"]["unique_graphs"] == 1


def test_an_old_gpu_takes_torch_with_one_warning(monkeypatch):
    monkeypatch.setattr(checks, "gpu_capability", lambda device: (7, 5))
    monkeypatch.setattr(checks, "_warned_of_old_gpu", False)
    qkv = make_qkv(q_len=300, dtype=torch.float16, device="cuda")
    levels = random_levels(BlockLayout(300, 300, **BLOCKS), device="cuda")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for run in (pipeline, torch.compile(pipeline, fullgraph=True, backend="aot_eager")):
            assert run(*qkv).isfinite().all()
        out = pyramid_attention(*qkv, levels, **BLOCKS)
    said = [str(x.message) for x in caught if "psa_kernels" in str(x.message)]
    assert len(said) == 1
    assert "capability 8.0 or higher, and cuda:0 has 7.5" in said[0]
    assert torch.equal(out, pyramid_attention(*qkv, levels, impl="torch", **BLOCKS))
    with pytest.raises(ValueError, match=r"impl='triton'.*capability 8\.0 or higher, and cuda:0 has 7\.5"):
        pyramid_attention(*qkv, levels, impl="triton", **BLOCKS)


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
    from psa_kernels.leading_directions.triton_fwd import _directions_kernel
    from psa_kernels.level_plan.triton_fwd import _plan_kernel
    from psa_kernels.permute_tokens.triton_fwd import _permute_kernel
    from psa_kernels.pyramid_attention.triton_fwd import _forward_kernel
    from psa_kernels.pyramid_attention.triton_order import _order_kernel
    from psa_kernels.pyramid_pool.triton_fwd import _pool_kernel
    from psa_kernels.rank_levels.triton_fwd import _rank_kernel
    from psa_kernels.share_levels.triton_fwd import _share_kernel

    kernels = (
        _positions_kernel,
        _logits_kernel,
        _reduce_kernel,
        _similarity_kernel,
        _directions_kernel,
        _permute_kernel,
        _rank_kernel,
        _share_kernel,
        _plan_kernel,
        _forward_kernel,
        _order_kernel,
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
