from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from psa_kernels import BlockLayout, block_importance, pyramid_attention
from psa_kernels.testing import make_qkv
from psa_masks import MaskPolicy, density, keep_full, levels_by_budget, levels_by_quota, levels_by_threshold

PAPER = MaskPolicy(
    mode="threshold",
    bounds=(0.4, 0.5, 0.6, 0.8),
    block_q=16,
    block_kv=16,
    similarity_thresholds=(0.7, 0.65, 0.6),
    min_full=0.06,
)


@st.composite
def policies(draw: st.DrawFn) -> MaskPolicy:
    mode = draw(st.sampled_from(["threshold", "quota", "budget"]))
    if mode == "budget":
        rule = {"density": draw(st.integers(26, 100)) / 100, "share": draw(st.sampled_from(["head", "layer"]))}
    else:
        rule = {
            "bounds": [end / 100 for end in draw(st.lists(st.integers(0, 100), min_size=1, max_size=3).map(sorted))]
        }
    method = draw(st.sampled_from(["sampled", "antidiagonal"]))
    return MaskPolicy(
        mode=mode,
        **rule,
        block_q=draw(st.sampled_from([4, 16])),
        block_kv=draw(st.sampled_from([4, 16])),
        skip=draw(st.sampled_from(["drop", "mean"])),
        min_full=draw(st.sampled_from([0.0, 0.3])),
        method=method,
        reduction=draw(st.sampled_from(["max", "mean", *(["error"] if method == "sampled" else [])])),
        similarity_thresholds=draw(st.none() if mode == "budget" else st.none() | st.just((0.4, 0.3))),
        diagonal=draw(st.booleans()),
        sinks=draw(st.integers(0, 5)),
        is_causal=draw(st.booleans()),
        seed=draw(st.integers(0, 3)),
    )


@settings(max_examples=80)
@given(
    policy=policies(),
    q_len=st.integers(1, 40),
    extra_keys=st.integers(0, 20),
    kv_heads=st.integers(1, 2),
    seed=st.integers(0, 2**32),
)
def test_every_map_can_be_attended_with(
    policy: MaskPolicy, q_len: int, extra_keys: int, kv_heads: int, seed: int
) -> None:
    query, key, value = make_qkv(
        heads=4, kv_heads=kv_heads, q_len=q_len, kv_len=q_len + extra_keys, head_dim=8, seed=seed
    )
    inputs, state = (query.clone(), key.clone()), torch.get_rng_state()
    layout = BlockLayout(q_len, q_len + extra_keys, block_q=policy.block_q, block_kv=policy.block_kv)
    # A few keys past a block have a mean of their own, which a small density may not pay for.
    assume(policy.density is None or policy.density * layout.kv_len >= layout.num_kv_blocks or policy.skip == "drop")
    assume(policy.density is None or not policy.is_causal or policy.skip == "drop")
    levels = policy(query, key)

    assert levels.shape == (1, 4, layout.num_q_blocks, layout.num_kv_blocks)
    assert levels.dtype == torch.int8
    assert levels.min() >= 0
    assert levels.max() <= policy.num_levels
    assert (levels == 1).any(dim=-1).all()
    if policy.skip == "mean" and not policy.is_causal:
        assert (levels > 0).all()
    _, lse = pyramid_attention(
        query,
        key,
        value,
        levels,
        block_q=policy.block_q,
        block_kv=policy.block_kv,
        is_causal=policy.is_causal,
        return_lse=True,
    )
    assert lse.isfinite().all(), "a query sees no key"

    assert torch.equal(policy(query, key), levels)
    assert torch.equal(query, inputs[0])
    assert torch.equal(key, inputs[1])
    assert torch.equal(torch.get_rng_state(), state)


def planted(partner: Tensor, block: int, head_dim: int = 32) -> tuple[Tensor, Tensor]:
    """Query block i looks only at key block ``partner[i]``."""
    directions = torch.eye(head_dim)[: len(partner)] * 20
    key = directions.repeat_interleave(block, dim=0)
    query = directions[partner].repeat_interleave(block, dim=0)
    return query[None, None], key[None, None]


@pytest.mark.parametrize(("mode", "bounds"), [("threshold", (0.9,)), ("quota", (0.05,))])
def test_finds_the_blocks_that_matter(mode: str, bounds: tuple[float, ...]) -> None:
    partner = torch.randperm(12, generator=torch.Generator().manual_seed(4))
    query, key = planted(partner, block=8)
    levels = MaskPolicy(mode=mode, bounds=bounds, block_q=8, block_kv=8)(query, key)
    assert torch.equal(levels[0, 0], torch.nn.functional.one_hot(partner, 12).to(torch.int8))


def test_samples_a_quarter_of_each_block_unless_told() -> None:
    query, key, _ = make_qkv(q_len=96, head_dim=16)
    plain = MaskPolicy(mode="quota", bounds=(0.3, 0.6), block_q=16, block_kv=8)
    for policy, samples_q, samples_kv in ((plain, 4, 2), (replace(plain, samples_q=16, samples_kv=1), 16, 1)):
        importance = block_importance(query, key, block_q=16, block_kv=8, samples_q=samples_q, samples_kv=samples_kv)
        assert torch.equal(policy(query, key), levels_by_quota(importance, (0.3, 0.6)))


@pytest.mark.parametrize("reduction", ["max", "mean"])
def test_scale_seed_and_reduction_reach_the_scores(reduction: str) -> None:
    query, key, _ = make_qkv(q_len=96, head_dim=16)
    policy = MaskPolicy(mode="threshold", bounds=(0.5,), block_q=8, block_kv=8, reduction=reduction, seed=5)
    importance = block_importance(
        query, key, block_q=8, block_kv=8, samples_q=2, samples_kv=2, reduction=reduction, scale=0.7, seed=5
    )
    assert torch.equal(policy(query, key, scale=0.7), levels_by_threshold(importance, (0.5,)))
    assert not torch.equal(policy(query, key, scale=0.7), replace(policy, seed=6)(query, key, scale=0.7))


@pytest.mark.parametrize("is_causal", [False, True])
def test_antidiagonals_reach_the_scores(is_causal: bool) -> None:
    query, key, _ = make_qkv(batch=2, q_len=75, kv_len=90, head_dim=16)
    sizes = {"block_q": 16, "block_kv": 8, "is_causal": is_causal}
    policy = MaskPolicy(mode="quota", bounds=(0.3, 0.6), method="antidiagonal", reduction="mean", **sizes)
    layout = BlockLayout(75, 90, **sizes)
    lengths = torch.tensor([90, 41])
    options = {"method": "antidiagonal", "reduction": "mean", "scale": 0.7, "kv_lengths": lengths}
    for changed, samples_q, samples_kv in ((policy, 4, 2), (replace(policy, samples_q=2, samples_kv=1), 2, 1)):
        importance = block_importance(query, key, samples_q=samples_q, samples_kv=samples_kv, **options, **sizes)
        chosen = levels_by_quota(importance, (0.3, 0.6), num_blocks=torch.tensor([12, 6]))
        expected = keep_full(chosen, layout, diagonal=is_causal)
        levels = changed(query, key, kv_lengths=lengths, scale=0.7)
        assert torch.equal(levels, layout.executed_levels(expected))
        assert torch.equal(replace(changed, seed=9)(query, key, kv_lengths=lengths, scale=0.7), levels)
    assert not torch.equal(replace(policy, method="sampled")(query, key), policy(query, key))


@pytest.mark.parametrize("method", ["sampled", "antidiagonal"])
def test_both_methods_find_the_blocks_that_matter(method: str) -> None:
    partner = torch.randperm(12, generator=torch.Generator().manual_seed(4))
    query, key = planted(partner, block=8)
    levels = MaskPolicy(mode="threshold", bounds=(0.9,), block_q=8, block_kv=8, method=method)(query, key)
    assert torch.equal(levels[0, 0], torch.nn.functional.one_hot(partner, 12).to(torch.int8))


def test_cap_keeps_unlike_neighbours_apart() -> None:
    query, _, _ = make_qkv(q_len=64, head_dim=32)
    smooth, rough = torch.ones(1, 2, 64, 32), torch.randn(1, 2, 64, 32, generator=torch.Generator().manual_seed(2))
    policy = MaskPolicy(mode="quota", bounds=(0.25, 1.0), block_q=16, block_kv=16, similarity_thresholds=(0.7,))
    assert (policy(query, smooth) == 2).any()
    assert (policy(query, rough) == 1).all()
    assert torch.equal(
        replace(policy, similarity_thresholds=(-1,))(query, rough),
        replace(policy, similarity_thresholds=None)(query, rough),
    )


def test_mean_changes_skipped_blocks_only() -> None:
    query, key, _ = make_qkv(q_len=200, head_dim=16)
    dropped, tailed = PAPER(query, key), replace(PAPER, skip="mean")(query, key)
    assert (dropped == 0).any()
    assert torch.equal(tailed, dropped.masked_fill(dropped == 0, 5))
    assert (PAPER.num_levels, replace(PAPER, skip="mean").num_levels) == (4, 5)
    # One row of 16 for each dropped block, and 8 of the last block's tokens are one row as well.
    layout = BlockLayout(200, 200, block_q=16, block_kv=16)
    rows = (layout.q_sizes()[:, None] * (dropped == 0)).sum(dim=(-2, -1))
    assert torch.allclose(density(tailed, layout), density(dropped, layout) + rows / 200**2)


@pytest.mark.parametrize("mode", ["threshold", "quota"])
def test_min_full_holds_in_both_modes(mode: str) -> None:
    query, key, _ = make_qkv(q_len=160, head_dim=16)
    policy = MaskPolicy(mode=mode, bounds=(0.0, 0.1), block_q=16, block_kv=16, min_full=0.3)
    assert ((policy(query, key) == 1).sum(dim=-1) >= 3).all()


def test_text_reads_and_is_read_in_full() -> None:
    query, key, _ = make_qkv(q_len=160, head_dim=16)
    for start, stop in ((0, 20), (141, 160)):
        levels = replace(PAPER, protected=((start, stop),))(query, key)
        blocks = slice(start // 16, -(-stop // 16))
        assert (levels[:, :, blocks] == 1).all()
        assert (levels[..., blocks] == 1).all()
        assert (levels != 1).any()


def test_kv_heads_are_shared_as_if_repeated() -> None:
    query, key, _ = make_qkv(heads=6, kv_heads=2, q_len=120, head_dim=16)
    assert torch.equal(PAPER(query, key), PAPER(query, key.repeat_interleave(3, dim=1)))


def test_batch_equals_the_loop_over_samples() -> None:
    query, key, _ = make_qkv(batch=3, q_len=120, head_dim=16)
    lengths = torch.tensor([120, 70, 33])
    together = PAPER(query, key, kv_lengths=lengths)
    for sample in range(3):
        one = slice(sample, sample + 1)
        assert torch.equal(together[one], PAPER(query[one], key[one], kv_lengths=lengths[one]))


def test_keys_past_the_length_do_not_matter() -> None:
    query, key, _ = make_qkv(q_len=120, head_dim=16)
    short = PAPER(query, key[:, :, :70])
    key[:, :, 70:] = 100.0
    assert torch.equal(PAPER(query, key, kv_lengths=torch.tensor([70]))[..., :5], short)


@settings(max_examples=60)
@given(
    policy=policies().map(lambda policy: replace(policy, is_causal=False, diagonal=False)),
    kv_len=st.integers(1, 70),
    lengths=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    seed=st.integers(0, 2**32),
)
def test_a_padded_sample_gets_the_levels_it_gets_alone(
    policy: MaskPolicy, kv_len: int, lengths: tuple[int, int], seed: int
) -> None:
    query, key, _ = make_qkv(batch=2, q_len=30, kv_len=kv_len, head_dim=8, seed=seed)
    lengths = min(lengths[0], kv_len), min(lengths[1], kv_len)
    blocks = [-(-length // policy.block_kv) for length in lengths]
    # What a few keys past a block cost may be more than a small density.
    assume(policy.density is None or policy.skip == "drop" or policy.block_kv == 16)
    assume(policy.density is None or policy.skip == "drop" or all(n % 16 == 0 for n in (*lengths, kv_len)))
    together = policy(query, key, kv_lengths=torch.tensor(lengths))
    for sample, (length, existing) in enumerate(zip(lengths, blocks, strict=True)):
        one = slice(sample, sample + 1)
        assert torch.equal(together[one, ..., :existing], policy(query[one], key[one, :, :length]))


@pytest.mark.parametrize(
    "policy",
    [
        MaskPolicy(mode="quota", bounds=(0.25, 0.5), block_q=8, block_kv=8, samples_q=8, samples_kv=8),
        MaskPolicy(mode="threshold", bounds=(0.5, 0.8), min_full=0.5, block_q=8, block_kv=8),
        MaskPolicy(mode="budget", density=0.5, min_full=0.5, block_q=8, block_kv=8),
    ],
    ids=lambda policy: policy.mode,
)
def test_shares_are_of_the_blocks_that_exist(policy: MaskPolicy) -> None:
    """17 of 64 keys are 3 of 8 blocks, so a quarter of them is one, and a half two."""
    query, key, _ = make_qkv(batch=2, q_len=64, kv_len=64, head_dim=16)
    levels = policy(query, key, kv_lengths=torch.tensor([64, 17]))
    assert torch.equal(levels[1:, ..., :3], policy(query[1:], key[1:, :, :17]))
    level_1 = (levels[1] == 1).sum(-1)
    assert (level_1 == 1).all() if policy.mode == "quota" else (level_1 >= 2).all()


def test_causal_map_is_what_is_executed() -> None:
    query, key, _ = make_qkv(q_len=100, kv_len=120, head_dim=16)
    for skip in ("drop", "mean"):
        levels = replace(PAPER, is_causal=True, skip=skip, min_full=0.0)(query, key)
        layout = BlockLayout(100, 120, block_q=16, block_kv=16, is_causal=True)
        assert torch.equal(layout.executed_levels(levels), levels)
        assert not levels[..., ~layout.visible(levels.device)].any()
        assert (levels[:, :, -1] != 1).any()


def test_causal_queries_all_see_a_key() -> None:
    """One query is sampled of sixteen, and it wants a KV block that queries before it may not see."""
    query = torch.ones(1, 1, 16, 8)
    key = torch.arange(16.0)[:, None].expand(1, 1, 16, 8)
    sizes = {"block_q": 16, "block_kv": 4, "is_causal": True}
    importance = block_importance(query, key, samples_q=1, samples_kv=4, **sizes)
    assert importance.argmax() > 0
    levels = MaskPolicy(mode="quota", bounds=(0.25,), samples_q=1, samples_kv=4, **sizes)(query, key)
    _, lse = pyramid_attention(query, key, key, levels, return_lse=True, **sizes)
    assert lse.isfinite().all()


@pytest.mark.parametrize("is_causal", [False, True])
def test_diagonal_and_sinks_are_kept(is_causal: bool) -> None:
    query, key, _ = make_qkv(q_len=100, kv_len=120, head_dim=16)
    policy = MaskPolicy(
        mode="quota", bounds=(0.1, 0.3), block_q=16, block_kv=16, diagonal=True, sinks=20, is_causal=is_causal
    )
    layout = BlockLayout(100, 120, block_q=16, block_kv=16, is_causal=is_causal)
    importance = block_importance(query, key, block_q=16, block_kv=16, samples_q=4, samples_kv=4, is_causal=is_causal)
    chosen = keep_full(levels_by_quota(importance, (0.1, 0.3)), layout, diagonal=True, sinks=20)
    assert torch.equal(policy(query, key), layout.executed_levels(chosen))


BUDGET = MaskPolicy(mode="budget", density=0.3, block_q=16, block_kv=16, skip="mean", reduction="error")


@pytest.mark.parametrize("share", ["head", "layer"])
def test_a_budget_pays_for_what_is_kept(share: str) -> None:
    query, key, _ = make_qkv(batch=2, heads=4, kv_heads=2, q_len=400, head_dim=16)
    policy = replace(BUDGET, density=0.5, share=share, protected=((0, 20),), sinks=30, diagonal=True, min_full=0.1)
    layout = BlockLayout(400, 400, block_q=16, block_kv=16)
    levels = policy(query, key)
    assert torch.equal(levels, keep_full(levels, layout, protected=((0, 20),), sinks=30, diagonal=True))
    assert ((levels == 1).sum(-1) >= 3).all()
    spent = density(levels, layout)
    spent = spent if share == "head" else spent.mean(-1)
    assert (spent <= 0.5).all()
    assert (spent > 0.5 - 1 / 25**2).all()


@pytest.mark.parametrize("is_causal", [False, True])
def test_a_budget_reaches_the_scores_and_the_levels(is_causal: bool) -> None:
    query, key, _ = make_qkv(batch=2, q_len=150, kv_len=180, head_dim=16)
    sizes = {"block_q": 16, "block_kv": 16}
    lengths = torch.tensor([180, 77])
    policy = replace(BUDGET, errors=(0.3, 0.6), density=0.4, is_causal=is_causal)
    importance = block_importance(
        query, key, samples_q=4, samples_kv=4, reduction="error", is_causal=is_causal, kv_lengths=lengths, **sizes
    )
    layout = BlockLayout(150, 180, is_causal=is_causal, **sizes)
    levels = levels_by_budget(
        importance, 0.4, num_levels=3, skip="mean", errors=(0.3, 0.6), layout=layout, kv_lengths=lengths
    )
    diagonal = keep_full(torch.zeros_like(levels), layout, diagonal=is_causal) == 1
    if is_causal:
        levels = levels_by_budget(
            importance,
            0.4,
            num_levels=3,
            skip="mean",
            errors=(0.3, 0.6),
            layout=layout,
            kv_lengths=lengths,
            full=diagonal,
        )
    assert torch.equal(policy(query, key, kv_lengths=lengths), levels)
    assert (levels == 5).any()


@pytest.mark.parametrize("policy", [replace(PAPER, skip="mean"), BUDGET], ids=["threshold", "budget"])
def test_compiles_without_a_graph_break(policy: MaskPolicy) -> None:
    query, key, _ = make_qkv(q_len=100, head_dim=16)
    policy = replace(policy, protected=((90, 100),), sinks=1)
    compiled = torch.compile(lambda q, k: policy(q, k), fullgraph=True, backend="eager")
    assert torch.equal(compiled(query, key), policy(query, key))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="asks how a GPU is used")
@pytest.mark.parametrize("policy", [replace(PAPER, skip="mean"), BUDGET], ids=["threshold", "budget"])
def test_gpu_never_waits_and_agrees_with_the_cpu(policy: MaskPolicy) -> None:
    query, key, _ = make_qkv(heads=4, kv_heads=2, q_len=1000, head_dim=64)
    policy = replace(policy, block_q=128, block_kv=64, protected=((900, 1000),), diagonal=True)
    on_gpu = query.cuda(), key.cuda()
    policy(*on_gpu)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        levels = policy(*on_gpu)
        share = density(levels, BlockLayout(1000, 1000, block_q=128, block_kv=64))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected = policy(query, key)
    # Scores that differ in their last bits may swap two blocks beside a bound, no more than that.
    assert (levels.cpu() == expected).float().mean() > 0.99
    assert share.shape == (1, 4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="asks how a GPU is used")
def test_a_budget_is_spent_within_a_cuda_graph() -> None:
    query, key, _ = make_qkv(heads=4, q_len=1000, head_dim=64, device="cuda")
    policy = replace(BUDGET, block_q=64, block_kv=64)
    other = torch.randn_like(query)
    expected = policy(other, key)
    policy(query, key)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        levels = policy(query, key)
    query.copy_(other)
    graph.replay()
    assert torch.equal(levels, expected)


def test_policies_are_values() -> None:
    assert replace(BUDGET, errors=[1, 1]) == replace(BUDGET, errors=(1.0, 1.0))
    assert BUDGET.num_levels == 5
    assert replace(BUDGET, skip="drop").num_levels == 4
    assert replace(BUDGET, skip="drop", errors=(0.5,)).num_levels == 2
    spelt = MaskPolicy(mode="quota", bounds=[0, 1], similarity_thresholds=[1], protected=[[0, 4]])
    assert spelt == MaskPolicy(mode="quota", bounds=(0.0, 1.0), similarity_thresholds=(1.0,), protected=((0, 4),))
    assert len({spelt, replace(spelt), replace(spelt, seed=1)}) == 2


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"mode": "topk"}, ValueError, r"mode must be one of 'threshold', 'quota', 'budget', got 'topk'"),
        ({"skip": "keep"}, ValueError, r"skip must be one of 'drop', 'mean', got 'keep'"),
        ({"bounds": (0.5, 0.4)}, ValueError, r"bounds .* must not decrease"),
        ({"block_kv": 2, "bounds": (0.1, 0.2, 0.3)}, ValueError, r"at most log2\(block_kv\) \+ 1 = 2 levels"),
        ({"block_kv": 96}, ValueError, r"block_kv must be a power of two"),
        ({"block_q": 0}, ValueError, r"block_q must be at least 1, got 0"),
        ({"min_full": 2}, ValueError, r"min_full must be in \[0, 1\], got 2"),
        ({"samples_q": 129}, ValueError, r"samples_q must be at most the block's 128 tokens, got 129"),
        ({"samples_kv": 0}, ValueError, r"samples_kv must be at least 1, got 0"),
        ({"method": "guess"}, ValueError, r"method must be one of 'sampled', 'antidiagonal', got 'guess'"),
        ({"method": "antidiagonal", "samples_q": 48}, ValueError, r"samples_q must divide block_q 128.*got 48"),
        ({"method": "antidiagonal", "samples_q": 16}, ValueError, r"block_q / samples_q must equal.*128 / 16 and 128"),
        ({"similarity_thresholds": ()}, ValueError, r"similarity_thresholds must hold at least one number"),
        ({"block_kv": 2, "similarity_thresholds": (0, 0)}, ValueError, r"at most log2\(block_kv\) = 1 numbers"),
        ({"protected": ((2, 1),)}, ValueError, r"protected\[0\] stop must be at least 2, got 1"),
        ({"sinks": 1.5}, TypeError, r"sinks must be an int, got 1.5"),
        ({"bounds": ()}, ValueError, r"bounds must hold 1 to 9 numbers, got 0"),
        ({"density": 0.1}, ValueError, r"density must be given with mode 'budget' alone, got 0.1 with 'quota'"),
        ({"errors": (0.1,)}, ValueError, r"errors must be given with mode 'budget' alone"),
        ({"share": "layer"}, ValueError, r"share must be given with mode 'budget' alone"),
        ({"method": "antidiagonal", "reduction": "error"}, ValueError, r"reduction 'error' needs method 'sampled'"),
    ],
)
def test_refuses(options: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        MaskPolicy(**{"mode": "quota", "bounds": (0.5,), **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"density": None}, r"density must be given with mode 'budget', got None"),
        ({"density": 0}, r"density must be in \(0, 1\], got 0"),
        ({"density": 0.0625}, r"density must be more than 1 / block_kv = 0.0625 with skip='mean'.* got 0.0625"),
        ({"bounds": (0.1,)}, r"bounds must not be given with mode 'budget', which goes by density, got \(0.1,\)"),
        ({"errors": (0.1,) * 5}, r"errors must be at most log2\(block_kv\) = 4 numbers with block_kv 16, got 5"),
        ({"share": "model"}, r"share must be one of 'head', 'layer', got 'model'"),
        ({"similarity_thresholds": (0.5,)}, r"similarity_thresholds must be None or all -1 with mode 'budget'"),
    ],
)
def test_refuses_a_budget(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(BUDGET, **options)


def test_refuses_a_range_past_the_keys_and_an_unknown_method() -> None:
    query, key, _ = make_qkv(q_len=32)
    with pytest.raises(ValueError, match=r"protected ranges must end by kv_len 32, got \(0, 33\)"):
        MaskPolicy(mode="quota", bounds=(0.5,), protected=((0, 33),))(query, key)
    with pytest.raises(ValueError, match=r"method must be one of"):
        MaskPolicy(mode="quota", bounds=(0.5,), method="guess")(query, key)
