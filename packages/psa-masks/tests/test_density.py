import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from psa_kernels import BlockLayout, LevelPlan
from psa_kernels.testing import random_levels
from psa_masks import density


@st.composite
def layouts(draw: st.DrawFn, *, may_be_causal: bool = True) -> BlockLayout:
    causal = may_be_causal and draw(st.booleans())
    kv_len = draw(st.integers(1, 90))
    return BlockLayout(
        draw(st.integers(1, kv_len if causal else 90)),
        kv_len,
        block_q=draw(st.sampled_from([1, 8, 16])),
        block_kv=draw(st.sampled_from([1, 4, 16])),
        is_causal=causal,
    )


@given(layout=layouts(), seed=st.integers(0, 2**32))
def test_agrees_with_the_plan(layout: BlockLayout, seed: int) -> None:
    levels = random_levels(layout, batch=2, heads=3, seed=seed)
    ours, plans = density(levels, layout), LevelPlan.from_levels(levels, layout).density()
    assert ours.dtype == torch.float32
    assert torch.equal(ours, plans)
    assert ((ours >= 0) & (ours <= 1)).all()


def test_agrees_with_the_plan_where_work_passes_24_bits() -> None:
    layout = BlockLayout(69121, 69119)
    levels = random_levels(layout, heads=8, seed=1)
    assert torch.equal(density(levels, layout), LevelPlan.from_levels(levels, layout).density())


@given(layout=layouts(may_be_causal=False), seed=st.integers(0, 2**32))
def test_counts_the_products_of_queries_and_rows(layout: BlockLayout, seed: int) -> None:
    levels = random_levels(layout, batch=1, heads=1, seed=seed)
    executed = 0
    for i, queries in enumerate(layout.q_sizes().tolist()):
        for j, keys in enumerate(layout.kv_sizes().tolist()):
            level = int(levels[0, 0, i, j])
            executed += queries * len(range(0, keys, 2 ** (level - 1))) if level else 0
    assert density(levels, layout).item() == pytest.approx(executed / (layout.q_len * layout.kv_len), rel=1e-6)


@given(shape=st.tuples(*[st.integers(1, 5)] * 4), level=st.integers(1, 8))
def test_uniform_map(shape: tuple[int, ...], level: int) -> None:
    assert (density(torch.full(shape, level, dtype=torch.int8)) == 0.5 ** (level - 1)).all()


def test_full_is_1_and_empty_is_0() -> None:
    layout = BlockLayout(37, 53, block_q=8, block_kv=16)
    shape = (1, 2, layout.num_q_blocks, layout.num_kv_blocks)
    for uniform in (None, layout):
        assert density(torch.ones(shape, dtype=torch.int8), uniform).tolist() == [[1.0, 1.0]]
        assert density(torch.zeros(shape, dtype=torch.int8), uniform).tolist() == [[0.0, 0.0]]


def test_without_a_layout_every_block_counts_alike() -> None:
    levels = torch.tensor([[[[1, 2], [0, 3]]]], dtype=torch.int8)
    assert density(levels).item() == (1 + 1 / 2 + 0 + 1 / 4) / 4
    layout = BlockLayout(10, 10, block_q=8, block_kv=8)
    assert density(levels, layout).item() == pytest.approx((8 * (8 + 1) + 2 * (0 + 1)) / 100)


def test_leaves_levels_alone() -> None:
    levels = random_levels(BlockLayout(40, 40, block_q=8, block_kv=8), seed=1)
    before = levels.clone()
    density(levels, BlockLayout(40, 40, block_q=8, block_kv=8, is_causal=True))
    assert torch.equal(levels, before)


def test_refuses_what_is_no_level_map() -> None:
    with pytest.raises(TypeError, match=r"levels must be torch.int8, got torch.int64"):
        density(torch.ones(1, 1, 2, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"levels must have shape \[B, H, .*\], got \[2, 2\]"):
        density(torch.ones(2, 2, dtype=torch.int8))
    with pytest.raises(ValueError, match=r"levels must have the layout's 2 x 3 blocks, got \[1, 1, 2, 2\]"):
        density(torch.ones(1, 1, 2, 2, dtype=torch.int8), BlockLayout(16, 20, block_q=8, block_kv=8))
    with pytest.raises(TypeError, match=r"levels must be a torch.Tensor, got list"):
        density([[[[1]]]])
    with pytest.raises(TypeError, match=r"layout must be a psa_kernels.BlockLayout, got int"):
        density(torch.ones(1, 1, 2, 2, dtype=torch.int8), 8)
