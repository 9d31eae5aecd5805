"""The sparse format: round trip, density by counting, the causal rule."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from psa_kernels import BlockLayout, LevelPlan
from psa_kernels.testing import random_levels


@st.composite
def layouts(draw):
    is_causal = draw(st.booleans())
    q_len = draw(st.integers(1, 200))
    return BlockLayout(
        q_len,
        draw(st.integers(q_len if is_causal else 1, 300)),
        block_q=draw(st.sampled_from([1, 4, 32, 128])),
        block_kv=draw(st.sampled_from([2, 16, 32, 128])),
        num_levels=draw(st.integers(1, 2)),
        is_causal=is_causal,
    )


@given(layout=layouts(), seed=st.integers(0, 2**16))
def test_round_trip(layout, seed):
    levels = random_levels(layout, batch=2, seed=seed)
    plan = LevelPlan.from_levels(levels, layout)
    assert torch.equal(plan.to_levels(), layout.executed_levels(levels))


@given(layout=layouts(), seed=st.integers(0, 2**16))
def test_density_is_counted_work(layout, seed):
    levels = random_levels(layout, heads=1, seed=seed)
    executed = layout.executed_levels(levels)[0, 0].tolist()
    work = dense = 0
    for i, queries in enumerate(layout.q_sizes().tolist()):
        for j, keys in enumerate(layout.kv_sizes().tolist()):
            first_key, last_query = j * layout.block_kv, i * layout.block_q + queries - 1
            if layout.is_causal and first_key > last_query + layout.kv_len - layout.q_len:
                continue
            dense += queries * keys
            if executed[i][j]:
                work += queries * -(-keys // 2 ** (executed[i][j] - 1))
    density = LevelPlan.from_levels(levels, layout).density()
    assert density.shape == (1, 1)
    assert 0 <= density.item() <= 1
    assert abs(density.item() - work / dense) <= torch.finfo(torch.float32).eps


@given(layout=layouts(), seed=st.integers(0, 2**16))
def test_causal_rule_token_by_token(layout, seed):
    levels = random_levels(layout, heads=1, seed=seed)
    executed = layout.executed_levels(levels)
    shift = layout.kv_len - layout.q_len
    for i in range(layout.num_q_blocks):
        queries = range(i * layout.block_q, min((i + 1) * layout.block_q, layout.q_len))
        for j in range(layout.num_kv_blocks):
            keys = range(j * layout.block_kv, min((j + 1) * layout.block_kv, layout.kv_len))
            level, got = levels[0, 0, i, j].item(), executed[0, 0, i, j].item()
            if not layout.is_causal or keys[-1] <= queries[0] + shift:
                assert got == level
            elif keys[0] > queries[-1] + shift:
                assert got == 0
            else:
                assert got == min(level, 1)


def test_all_of_a_causal_map_is_dense():
    layout = BlockLayout(100, 130, block_q=32, block_kv=16, is_causal=True)
    levels = torch.ones(1, 1, layout.num_q_blocks, layout.num_kv_blocks, dtype=torch.int8)
    assert LevelPlan.from_levels(levels, layout).density().item() == 1


def test_backends_build_the_same_plan(backend):
    for num_blocks, num_levels in ((1, 1), (5, 3), (67, 8), (1500, 4)):
        layout = BlockLayout(70, num_blocks * 128 - 1, block_q=64, num_levels=num_levels)
        levels = random_levels(layout, device=backend.device)
        plan = LevelPlan.from_levels(levels, layout, impl=backend.impl)
        oracle = LevelPlan.from_levels(levels, layout, impl="reference")
        assert torch.equal(plan.indices, oracle.indices)
        assert torch.equal(plan.offsets, oracle.offsets)


def test_repr_says_what_it_is():
    plan = LevelPlan.from_levels(torch.ones(1, 2, 1, 3, dtype=torch.int8), BlockLayout(10, 300))
    expected = "LevelPlan(batch=1, heads=2, q_blocks=1, kv_blocks=3, num_levels=8, device='cpu')"
    assert repr(plan) == expected


@pytest.mark.parametrize("impl", ["torch", "triton", "reference"])
def test_a_map_without_heads_is_an_empty_plan(impl):
    layout = BlockLayout(40, 70, block_q=32, block_kv=32)
    plan = LevelPlan.from_levels(torch.ones(2, 0, 2, 3, dtype=torch.int8), layout, impl=impl)
    assert plan.to_levels().shape == (2, 0, 2, 3)
    assert plan.density().shape == (2, 0)
