"""Ten properties that catch most of what goes wrong in sparse attention, each held by all the packages together."""

import random
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lib import pipelines
from lib.backends import BACKENDS, INTERPRETER
from lib.calls import AttentionCalls
from lib.cases import assert_is_oracle, oracle
from lib.presets import FULL, SPARSE, make_preset
from lib.strategies import cases, grids, orders, presets, seeds, stacks
from lib.work import counted_densities
from torch.nn.functional import scaled_dot_product_attention

from psa_integrations import PyramidAttention, apply_pyramid_sparse_attention
from psa_kernels import BlockLayout, LevelPlan, pyramid_attention
from psa_kernels.pyramid_attention.tiles import Tile
from psa_kernels.testing import assert_within_error_budget, make_qkv
from psa_masks import MaskPolicy, density


def dense_attention(qkv, mask=None):
    """torch's attention in float64 and in the dtype of ``qkv``; a query that ``mask`` shows nothing gets 0.

    Neither passes through the code under test, whose faults would otherwise widen its own error budget.
    """

    def attend(tensors):
        out = scaled_dot_product_attention(*tensors, attn_mask=mask, enable_gqa=True)
        return out if mask is None else out.masked_fill(~mask.any(-1, keepdim=True), 0)

    return attend([x.double() for x in qkv]), attend(qkv)


def kept_tokens(case, levels):
    """bool [B, H, q_len, kv_len]: the pairs of tokens that attention reads, at whatever level."""
    kept = (case.layout.executed_levels(levels) > 0).repeat_interleave(case.policy.block_q, 2)
    kept = kept.repeat_interleave(case.policy.block_kv, 3)[:, :, : case.q_len, : case.kv_len]
    if case.is_causal:
        kept = kept & torch.ones(case.q_len, case.kv_len, dtype=torch.bool).tril(case.kv_len - case.q_len)
    if case.lengths is not None:
        kept = kept & (torch.arange(case.kv_len) < case.lengths[:, None, None, None])
    return kept


@settings(max_examples=60)
@given(stack=stacks(ends=st.just(FULL)))
def test_1_all_level_1_equals_sdpa(stack):
    out = PyramidAttention(stack.preset, stack.grid)(*stack.qkv)
    assert_within_error_budget(out, *dense_attention(stack.qkv))


@settings(max_examples=60)
@given(stack=stacks())
def test_2_values_of_one_give_one(stack):
    query, key, value = stack.qkv
    out = PyramidAttention(stack.preset, stack.grid)(query, key, torch.ones_like(value))
    # A sum of positive float32 weights over another such sum, each off by half an eps a term, then rounded.
    single, own = (torch.finfo(dtype).eps for dtype in (torch.float32, stack.dtype))
    assert (out.double() - 1).abs().max() <= stack.grid.seq_len * single + own


@settings(max_examples=100)
@given(case=cases())
def test_3_keys_alike_in_each_group_make_the_pyramid_dense_attention_over_kept_blocks(case):
    pool = 1 << (case.policy.num_levels - 1)
    query, key, value = case.qkv
    key = key[:, :, ::pool].repeat_interleave(pool, dim=2)[:, :, : case.kv_len]
    levels = case.policy(query, key, kv_lengths=case.lengths)
    out = pyramid_attention(query, key, value, levels, **case.options())
    assert_within_error_budget(out, *dense_attention((query, key, value), kept_tokens(case, levels)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_4_one_pattern_of_tokens_gives_one_result_for_all_block_and_tile_sizes(backend):
    @settings(max_examples=backend.examples // 2)
    @given(
        case=cases(dtypes=backend.dtypes, longest=backend.longest, blocks=(4, 16, 32, 64)),
        cut_q=st.sampled_from([1, 2, 4]),
        cut_kv=st.sampled_from([1, 2, 4]),
        tile_m=st.sampled_from([16, 32]),
        tile_n=st.sampled_from([16, 32, 64]),
    )
    def run(case, cut_q, cut_kv, tile_m, tile_n):
        # What causal attention executes is settled in the blocks that the map was made for.
        levels = case.layout.executed_levels(case.levels())
        exact, low = oracle(case.qkv, levels, **case.options())
        # The coarsest row must fit into the finer block.
        cut_kv = min(cut_kv, case.policy.block_kv >> (case.policy.num_levels - 1))
        finer = replace(case.layout, block_q=case.policy.block_q // cut_q, block_kv=case.policy.block_kv // cut_kv)
        cut = levels.repeat_interleave(cut_q, 2).repeat_interleave(cut_kv, 3)
        cut = cut[:, :, : finer.num_q_blocks, : finer.num_kv_blocks]
        options = case.options() | {"block_q": finer.block_q, "block_kv": finer.block_kv}
        tile = Tile(tile_m, tile_n, num_warps=4, num_stages=1)
        if backend is INTERPRETER:
            with mock.patch("psa_kernels.pyramid_attention.triton_fwd.choose_tile", return_value=tile):
                got = pyramid_attention(*case.qkv, cut, impl=backend.impl, return_lse=True, **options)
        else:
            got = pyramid_attention(*case.qkv, cut, impl=backend.impl, return_lse=True, **options)
        for out, ref, rounded in zip(got, exact, low, strict=True):
            assert_within_error_budget(out, ref, rounded, input_dtype=case.dtype)

    run()


@torch.no_grad()
@settings(max_examples=40)
@given(preset=presets(), grid=grids(text=0))
def test_5_density_is_the_counted_work(preset, grid):
    transformer = pipelines.wan_transformer()
    generator = torch.Generator().manual_seed(2)
    latents = (1, pipelines.CHANNELS, grid.frames, 2 * grid.height, 2 * grid.width)
    text = torch.randn(1, pipelines.TEXT_LENGTH, pipelines.TEXT_DIM, generator=generator)
    with apply_pyramid_sparse_attention(transformer, preset) as handle, AttentionCalls() as calls:
        for _ in range(2):
            transformer(torch.randn(latents, generator=generator), torch.tensor([500]), text)
        reported = handle.stats().density
    size = preset.attention.block_size
    counted = []
    for indices, offsets in calls.plans:
        layout = BlockLayout(
            grid.seq_len, grid.seq_len, block_q=size.m, block_kv=size.n, num_levels=offsets.shape[-1] - 1
        )
        plan = LevelPlan(indices, offsets, layout)
        (shares,) = counted_densities(plan.to_levels(), layout)
        counted += shares
        single = torch.tensor([[float(share) for share in shares]])
        assert torch.equal(plan.density(), single)
        assert torch.equal(density(plan.to_levels(), layout), single)
    assert len(calls.plans) == 2
    # Each head's density, at most 1, was rounded to float32 once.
    assert abs(reported - sum(counted) / len(counted)) <= torch.finfo(torch.float32).eps
    assert 0 < reported <= 1


@settings(max_examples=60)
@given(data=st.data(), stack=stacks(ends=st.just(FULL)))
def test_6_an_order_and_its_inverse_are_the_identity_and_no_order_changes_attention_at_level_1(data, stack):
    order = data.draw(orders(grid=stack.grid))
    for tensor in stack.qkv:
        assert torch.equal(order.undo(order.apply(tensor, 2), 2), tensor)
        assert torch.equal(order.apply(order.undo(tensor, 2), 2), tensor)
    ordered = [order.apply(tensor, 2) for tensor in stack.qkv]
    out = order.undo(PyramidAttention(stack.preset)(*ordered), 2)
    assert_within_error_budget(out, *dense_attention(stack.qkv))


def global_random_state():
    _, words, position, *_ = np.random.get_state()
    return torch.get_rng_state().tolist(), random.getstate(), words.tolist(), position


@settings(max_examples=25)
@given(stack=stacks(), noise=seeds())
def test_7_the_same_seed_gives_the_same_bits_and_leaves_global_random_state_alone(stack, noise):
    first = PyramidAttention(stack.preset, stack.grid)(*stack.qkv)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(noise)
        before = global_random_state()
        second = PyramidAttention(stack.preset, stack.grid)(*stack.qkv)
        assert global_random_state() == before
    assert torch.equal(first, second)


def test_7_another_seed_gives_another_sample():
    query, key, _ = make_qkv(q_len=500)
    maps = [
        MaskPolicy(mode="threshold", bounds=(0.3, 0.6, 0.8), block_q=32, block_kv=32, seed=seed)(query, key)
        for seed in range(2)
    ]
    assert not torch.equal(*maps)


@pytest.mark.parametrize("build", [pipelines.wan, pipelines.cogvideox])
def test_8_dense_steps_of_every_run_are_the_configured_ones(build):
    pipeline = build()

    @settings(max_examples=12)
    @given(
        warmup=st.integers(0, 3),
        cooldown=st.integers(0, 3),
        runs=st.lists(st.tuples(st.integers(1, 6), st.sampled_from([1.0, 4.0])), min_size=2, max_size=2),
    )
    def run(warmup, cooldown, runs):
        preset = make_preset(SPARSE, warmup_steps=warmup, cooldown_steps=cooldown)
        with apply_pyramid_sparse_attention(pipeline, preset) as handle:
            for steps, guidance in runs:
                handle.reset_stats()
                with AttentionCalls() as calls:
                    pipelines.sample(pipeline, steps=steps, guidance=guidance, callback_on_step_end=calls.next_step)
                dense = [step for step in range(steps) if step < warmup or step >= steps - cooldown]
                assert sorted(set(range(steps)) - set(calls.steps)) == dense
                assert handle.stats().dense_steps() == dense

    run()


@settings(max_examples=40)
@given(stack=stacks(batch=3), case=cases(causal=False))
def test_9_a_batch_equals_the_loop_over_its_samples(stack, case):
    attention = PyramidAttention(stack.preset, stack.grid)
    together = attention(*stack.qkv)
    alone = [attention(*(tensor[b : b + 1] for tensor in stack.qkv)) for b in range(stack.batch)]
    assert torch.equal(together, torch.cat(alone))

    levels = case.levels()
    lengths = case.kv_lengths or (case.kv_len,) * case.batch
    out, lse = pyramid_attention(*case.qkv, levels, return_lse=True, **case.options())
    for b, length in enumerate(lengths):
        if length == 0:
            assert (out[b] == 0).all()
            assert (lse[b] == -torch.inf).all()
            continue
        query, key, value = (tensor[b : b + 1] for tensor in case.qkv)
        blocks = -(-length // case.policy.block_kv)
        qkv = (query, key[:, :, :length], value[:, :, :length])
        options = case.options() | {"kv_lengths": None}
        exact, low = oracle(qkv, levels[b : b + 1, :, :, :blocks], **options)
        assert_within_error_budget(out[b : b + 1], exact[0], low[0])
        assert_within_error_budget(lse[b : b + 1], exact[1], low[1], input_dtype=case.dtype)


@pytest.mark.parametrize("backend", BACKENDS)
def test_10_halves_of_the_keys_merged_by_lse_equal_the_whole(backend):
    def merge(halves):
        (out, lse), (other, other_lse) = halves
        total = torch.logaddexp(lse, other_lse)
        # Of a query that reads nothing the total is -inf, and both halves are 0.
        share, rest = ((part - total.masked_fill(total.isinf(), 0)).exp()[..., None] for part in (lse, other_lse))
        return (out * share + other * rest).to(out.dtype), total

    @settings(max_examples=backend.examples // 2)
    @given(
        case=cases(dtypes=backend.dtypes, longest=backend.longest, causal=False).filter(
            lambda case: case.layout.num_kv_blocks > 1
        ),
        data=st.data(),
    )
    def run(case, data):
        levels = case.levels()
        blocks = data.draw(st.integers(1, case.layout.num_kv_blocks - 1))
        tokens = blocks * case.policy.block_kv

        def halves(attend):
            query, key, value = case.qkv
            for part, block_part, first in (
                (slice(0, tokens), slice(0, blocks), 0),
                (slice(tokens, None), slice(blocks, None), tokens),
            ):
                lengths = None if case.lengths is None else (case.lengths - first).clamp(min=0)
                options = case.options() | {"kv_lengths": lengths}
                qkv = (query, key[:, :, part], value[:, :, part])
                yield attend(qkv, levels[..., block_part].contiguous(), **options)

        merged = merge(halves(lambda *args, **options: assert_is_oracle(*args, impl=backend.impl, **options)))
        low = merge(halves(lambda *args, **options: oracle(*args, **options)[1]))
        exact, _ = oracle(case.qkv, levels, **case.options())
        for out, ref, rounded in zip(merged, exact, low, strict=True):
            assert_within_error_budget(out, ref, rounded, input_dtype=case.dtype)

    run()
