"""Maps that spend a density: what they cost, that no map does better for it, and what they keep."""

import math
from fractions import Fraction
from functools import partial
from itertools import product

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from psa_kernels import BlockLayout
from psa_masks import density, levels_by_budget
from psa_masks.budget import check_pays_for_means

seeds = st.integers(0, 2**32)
percents = st.integers(1, 100)
skips = st.sampled_from(["drop", "mean"])


@st.composite
def layouts(draw: st.DrawFn, *, may_be_causal: bool = True) -> BlockLayout:
    causal = may_be_causal and draw(st.booleans())
    kv_len = draw(st.integers(1, 200))
    return BlockLayout(
        draw(st.integers(1, kv_len if causal else 120)),
        kv_len,
        block_q=draw(st.sampled_from([4, 16])),
        block_kv=draw(st.sampled_from([8, 16])),
        is_causal=causal,
    )


def scores_of(layout: BlockLayout, seed: int, *, batch: int = 2, heads: int = 3) -> Tensor:
    """Whole numbers with ties and zeros, some of them far above the rest."""
    shape = (batch, heads, layout.num_q_blocks, layout.num_kv_blocks)
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)).pow(8).mul(100).floor()


def cost_of_means(layout: BlockLayout) -> Fraction:
    """A row for each block that is seen, over dense work."""
    seen = layout.visible(torch.device("cpu")) * layout.q_sizes()[:, None]
    return Fraction(int(seen.sum()), int((seen * layout.kv_sizes()).sum()))


def work_of(levels: Tensor, layout: BlockLayout, kv_length: int | None = None) -> int:
    """Products of queries and rows that a head's map executes, counted from the meaning of a level."""
    total = 0
    for i, row in enumerate(layout.executed_levels(levels).tolist()):
        queries = len(range(i * layout.block_q, min((i + 1) * layout.block_q, layout.q_len)))
        for j, level in enumerate(row):
            first = j * layout.block_kv
            keys = range(first, min(first + layout.block_kv, layout.kv_len if kv_length is None else kv_length))
            total += queries * len({key >> (level - 1) for key in keys}) if level else 0
    return total


def least_of(levels: Tensor, importance: Tensor, layout: BlockLayout, rest: int, kv_length: int | None = None) -> int:
    """What a head's map has to cost: its largest blocks and the diagonal at level 1, the others at ``rest``."""
    full = torch.full_like(levels, 2, dtype=torch.int8)
    executed = layout.executed_levels(full)
    exists = torch.arange(layout.num_kv_blocks) * layout.block_kv < (layout.kv_len if kv_length is None else kv_length)
    least = torch.full_like(full, rest)
    largest = importance.masked_fill((executed == 0) | ~exists, -1).argmax(-1, keepdim=True)
    least.scatter_(-1, largest, 1)
    return work_of(torch.where(executed == 1, 1, least), layout, kv_length)


@given(
    layout=layouts(),
    percent=percents,
    skip=skips,
    lengths=st.none() | st.tuples(*[st.integers(0, 200)] * 2),
    seed=seeds,
)
def test_spends_the_density_of_each_head(
    layout: BlockLayout, percent: int, skip: str, lengths: tuple[int, int] | None, seed: int
) -> None:
    importance = scores_of(layout, seed)
    kv_lengths = None if lengths is None else torch.tensor(lengths)
    rest = layout.num_levels if skip == "mean" else 0
    if skip == "mean" and Fraction(percent, 100) < cost_of_means(layout):
        with pytest.raises(ValueError, match=r"density must be at least .* with skip='mean'"):
            levels_by_budget(importance, percent / 100, skip=skip, layout=layout, kv_lengths=kv_lengths)
        return
    levels = levels_by_budget(importance, percent / 100, skip=skip, layout=layout, kv_lengths=kv_lengths)
    one_block = layout.block_q * layout.block_kv
    for sample, head in product(range(2), range(3)):
        chosen, scores = levels[sample, head], importance[sample, head]
        length = None if lengths is None else min(lengths[sample], layout.kv_len)
        executed = work_of(chosen, layout, length)
        dense = work_of(torch.ones_like(chosen), layout, length)
        budget = max(Fraction(percent, 100) * dense, least_of(chosen, scores, layout, rest, length))
        assert executed <= budget
        assert executed == dense or executed > budget - one_block


@given(layout=layouts(), percent=percents, skip=skips, seed=seeds)
def test_heads_share_the_density_of_a_layer(layout: BlockLayout, percent: int, skip: str, seed: int) -> None:
    importance = scores_of(layout, seed)
    assume(skip == "drop" or Fraction(percent, 100) >= cost_of_means(layout))
    levels = levels_by_budget(importance, percent / 100, share="layer", skip=skip, layout=layout)
    rest = layout.num_levels if skip == "mean" else 0
    for chosen, scores in zip(levels, importance, strict=True):
        executed = sum(work_of(head, layout) for head in chosen)
        dense = 3 * work_of(torch.ones_like(chosen[0]), layout)
        least = sum(least_of(head, score, layout, rest) for head, score in zip(chosen, scores, strict=True))
        budget = max(Fraction(percent, 100) * dense, least)
        assert executed <= budget
        assert executed == dense or executed > budget - layout.block_q * layout.block_kv


@given(
    keys=st.sampled_from([8, 24, 29]),
    percent=st.integers(15, 100),
    skip=skips,
    errors=st.sampled_from([(0.5, 0.7), (0.1, 0.9), (0.9, 0.95), (0.3, 0.3)]),
    seed=seeds,
)
def test_no_map_of_its_work_has_less_error(
    keys: int, percent: int, skip: str, errors: tuple[float, float], seed: int
) -> None:
    """Against all maps of two rows of up to four blocks, with levels 1 to 3 and the rest."""
    layout = BlockLayout(12, keys, block_q=8, block_kv=8)
    importance = scores_of(layout, seed, batch=1, heads=1)[..., : layout.num_kv_blocks]
    if keys % 8:
        importance[..., -1] = 0  # a short block is ranked as a whole one, though its rows may be worth a little more
    levels = levels_by_budget(importance, percent / 100, num_levels=3, skip=skip, errors=errors, layout=layout)
    rest = 4 if skip == "mean" else 0
    relative = {1: 0.0, 2: errors[0], 3: errors[1], rest: 1.0}
    squares = importance[0, 0].double().square().flatten().tolist()
    largest = {int(row.argmax()) + i * layout.num_kv_blocks for i, row in enumerate(importance[0, 0])}

    costs = []
    for i, j in product(range(2), range(layout.num_kv_blocks)):
        queries, size = (8, 4)[i], min(8, keys - 8 * j)
        costs.append({h: queries * -(-size // 2 ** (h - 1)) if h else 0 for h in relative})
    weights = [(8, 4)[n // layout.num_kv_blocks] / 8 for n in range(len(squares))]

    def error_and_work(map_: list[int]) -> tuple[float, int]:
        # A short query block has as much less to lose as it has less to pay.
        error = sum(w * s * relative[h] ** 2 for w, s, h in zip(weights, squares, map_, strict=True))
        return error, sum(cost[h] for cost, h in zip(costs, map_, strict=True))

    mine, work = error_and_work(levels.flatten().tolist())
    best = {0: 0.0}  # work so far: least error for it, over all maps
    for n, (square, weight) in enumerate(zip(squares, weights, strict=True)):
        grown: dict[int, float] = {}
        for before, error in best.items():
            for h in (1,) if n in largest else relative:
                total = before + costs[n][h]
                added = error + weight * square * relative[h] ** 2
                grown[total] = min(grown.get(total, added), added)
        best = grown
    least = min(error for total, error in best.items() if total <= work)
    assert mine <= least * (1 + 1e-9)


@given(layout=layouts(), percent=percents, seed=seeds)
def test_keeps_the_largest_block_of_every_row(layout: BlockLayout, percent: int, seed: int) -> None:
    importance = scores_of(layout, seed)
    levels = levels_by_budget(importance, percent / 100, layout=layout)
    seen = layout.visible(torch.device("cpu"))
    largest = importance.masked_fill(~seen, -1).argmax(-1, keepdim=True)
    assert (levels.gather(-1, largest) == 1).all()
    assert torch.equal(levels, layout.executed_levels(levels))
    assert not levels[..., ~seen].any()


@given(percent=percents, seed=seeds)
def test_more_important_blocks_are_no_coarser(percent: int, seed: int) -> None:
    importance = torch.rand(1, 2, 6, 9, generator=torch.Generator().manual_seed(seed))
    levels = levels_by_budget(importance, percent / 100).flatten(2)
    for head, scores in zip(levels[0], importance[0].flatten(1), strict=True):
        kept = head[scores.argsort(descending=True)]
        chosen = torch.where(kept == 0, 9, kept)
        rows = [torch.where(level == 1, 0, level) for level in chosen.split(1)]  # level 1 may be a row's largest
        coarseness = torch.cat(rows)
        assert (coarseness[coarseness > 0].diff() >= 0).all()


def test_a_map_worked_out_by_hand() -> None:
    # Half of eight blocks: one level 1 a row is two, the next two scores take level 1, and no score is left to weigh.
    importance = torch.tensor([[[[9.0, 8.0, 0.0, 0.0], [7.0, 6.0, 0.0, 0.0]]]])
    assert levels_by_budget(importance, 0.5, num_levels=1).tolist() == [[[[1, 1, 0, 0], [1, 1, 0, 0]]]]
    # An eighth less: the last one is read at level 2, which is all that its share pays.
    assert levels_by_budget(importance, 0.4375, num_levels=2).tolist() == [[[[1, 1, 0, 0], [1, 2, 0, 0]]]]
    # A whole budget leaves nothing out, scores of 0 too.
    assert (levels_by_budget(importance, 1.0) == 1).all()


def test_equal_scores_prefer_the_earlier_block() -> None:
    levels = levels_by_budget(torch.ones(1, 1, 1, 8), 0.5, num_levels=1)
    assert levels.flatten().tolist() == [1, 1, 1, 1, 0, 0, 0, 0]
    levels = levels_by_budget(torch.zeros(1, 1, 1, 8), 0.5, num_levels=2)
    assert levels.flatten().tolist() == [1, 2, 2, 2, 2, 2, 2, 0]  # coarse before fine


def test_one_row_may_spend_what_another_does_not_need() -> None:
    importance = torch.zeros(1, 1, 2, 8)
    importance[..., 0] = 1
    importance[0, 0, 1] = 1
    levels = levels_by_budget(importance, 9 / 16, num_levels=1)[0, 0]
    assert levels.sum(-1).tolist() == [1, 8]


def test_full_blocks_are_paid_for_first() -> None:
    layout = BlockLayout(64, 64, block_q=8, block_kv=8)
    importance = scores_of(layout, 3)
    full = torch.zeros(8, 8, dtype=torch.bool)
    full[:, 5] = True
    levels = levels_by_budget(importance, 0.4, full=full, layout=layout)
    assert (levels[..., 5] == 1).all()
    assert (density(levels) <= 0.4).all()
    assert (density(levels) > 0.4 - 1 / 64).all()
    assert (levels_by_budget(importance, 0.1, full=full) == levels_by_budget(importance, 0.01, full=full)).all()


def test_a_least_share_of_full_blocks() -> None:
    importance = scores_of(BlockLayout(64, 80, block_q=8, block_kv=8), 5)
    levels = levels_by_budget(importance, 0.5, min_full=0.4)
    assert ((levels == 1).sum(-1) >= 4).all()
    assert (density(levels) <= 0.5).all()


def test_a_level_that_is_no_bargain_is_left_out() -> None:
    importance = torch.rand(1, 2, 8, 16, generator=torch.Generator().manual_seed(0))
    levels = levels_by_budget(importance, 0.3, errors=(0.99, 0.99, 0.99))
    assert set(levels.unique().tolist()) == {0, 1}
    levels = levels_by_budget(importance, 0.3, errors=(0.01, 0.5, 0.9))
    assert set(levels.unique().tolist()) >= {0, 2}


def test_repeats_itself_and_touches_nothing() -> None:
    importance = torch.rand(2, 3, 7, 9)
    before, state = importance.clone(), torch.get_rng_state()
    first = levels_by_budget(importance, 0.3)
    assert torch.equal(first, levels_by_budget(importance, 0.3))
    assert torch.equal(importance, before)
    assert torch.equal(torch.get_rng_state(), state)
    for head in range(3):  # a head's map is its own
        assert torch.equal(first[:, head], levels_by_budget(importance[:, head : head + 1], 0.3)[:, 0])
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        assert torch.equal(
            levels_by_budget(importance.to(dtype), 0.3), levels_by_budget(importance.to(dtype).float(), 0.3)
        )


def test_a_scale_of_the_scores_changes_nothing() -> None:
    importance = torch.rand(1, 2, 7, 9)
    expected = levels_by_budget(importance, 0.3)
    for scale in (2.0**-60, 2.0**60):
        assert torch.equal(levels_by_budget(importance * scale, 0.3), expected)


@pytest.mark.parametrize("share", ["head", "layer"])
def test_scores_that_are_no_numbers_are_the_highest(share: str) -> None:
    """On a GPU they would end in reads outside of memory: nobody looks whether there are any."""
    importance = torch.rand(2, 2, 4, 5)
    highest = importance.clone()
    highest[0, 0, 1] = 2.0
    for value in (math.inf, math.nan, 1e300):
        odd = highest.double() if value == 1e300 else highest.clone()
        odd[0, 0, 1] = value
        assert torch.equal(levels_by_budget(odd, 0.5, share=share)[0, 0, 1], torch.ones(5, dtype=torch.int8))
        everywhere = torch.full_like(odd, value)
        assert torch.equal(levels_by_budget(everywhere, 0.5), levels_by_budget(torch.ones_like(odd), 0.5))


@pytest.mark.parametrize("share", ["head", "layer"])
@pytest.mark.parametrize("shape", [(0, 2), (2, 0)])
def test_no_samples_or_no_heads_give_an_empty_map(shape: tuple[int, int], share: str) -> None:
    assert levels_by_budget(torch.rand(*shape, 4, 4), 0.3, share=share).shape == (*shape, 4, 4)


@pytest.mark.parametrize("is_causal", [False, True])
def test_a_new_length_to_check_compiles_nothing(is_causal: bool) -> None:
    counter = CompileCounterWithBackend("eager")

    @partial(torch.compile, fullgraph=True, dynamic=True, backend=counter)
    def checked(x: Tensor) -> Tensor:
        layout = BlockLayout(len(x), len(x), block_q=8, block_kv=8, is_causal=is_causal)
        check_pays_for_means(0.4, layout)
        return x + 1

    for length in (27, 45):
        checked(torch.zeros(length))
    assert counter.frame_count == 1


LAYOUT = BlockLayout(32, 32, block_q=8, block_kv=8)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"density": 0.0}, ValueError, r"density must be in \(0, 1\], got 0.0"),
        ({"density": 1.5}, ValueError, r"density must be in \(0, 1\], got 1.5"),
        ({"density": math.nan}, ValueError, r"density must be in \(0, 1\], got nan"),
        ({"density": "0.5"}, TypeError, r"density must be a number, got '0.5'"),
        ({"density": 0.12, "skip": "mean"}, ValueError, r"density must be at least 0.125 with skip.* got 0.12"),
        ({"skip": "mean", "layout": None}, ValueError, r"layout must be given with skip='mean'.* got None"),
        ({"skip": "keep"}, ValueError, r"skip must be one of 'drop', 'mean', got 'keep'"),
        ({"share": "row"}, ValueError, r"share must be one of 'head', 'layer', got 'row'"),
        ({"num_levels": 0}, ValueError, r"num_levels must be at least 1, got 0"),
        ({"num_levels": 5}, ValueError, r"num_levels must be at most 4, .*block_kv 8 has 4, got 5"),
        ({"num_levels": 10, "layout": None}, ValueError, r"num_levels must be at most 9, got 10"),
        ({"errors": (0.5, 0.6)}, ValueError, r"errors must be of levels 2..num_levels, 3 numbers, got 2"),
        ({"errors": (0.5, 0.4, 0.6)}, ValueError, r"errors must not decrease"),
        ({"errors": (0.0, 0.4, 0.6)}, ValueError, r"errors\[0\] must be in \(0, 1\], got 0.0"),
        ({"min_full": -1}, ValueError, r"min_full must be in \[0, 1\], got -1"),
        ({"full": torch.ones(3, 4)}, TypeError, r"full must be a bool tensor, got torch.float32"),
        ({"full": torch.ones(3, 4, dtype=torch.bool)}, ValueError, r"full must broadcast .*4, 4\], got \[3, 4\]"),
        ({"full": torch.ones(4, 4, dtype=torch.bool, device="meta")}, ValueError,
            r"full must be on importance's device cpu, got meta"),
        ({"layout": BlockLayout(32, 40, block_q=8, block_kv=8)}, ValueError, r"importance must have the layout's"),
        ({"layout": 8}, TypeError, r"layout must be a psa_kernels.BlockLayout, got int"),
        ({"layout": None, "kv_lengths": torch.tensor([5])}, ValueError, r"layout must be given with kv_lengths"),
    ],
)  # fmt: skip
def test_refuses(options: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        levels_by_budget(torch.rand(1, 2, 4, 4), **{"density": 0.3, "layout": LAYOUT} | options)


def test_refuses_importance() -> None:
    with pytest.raises(ValueError, match=r"importance must have shape \[B, H, .*\], got \[4, 4\]"):
        levels_by_budget(torch.rand(4, 4), 0.3)
    with pytest.raises(TypeError, match=r"importance must be float16, .* got torch.int64"):
        levels_by_budget(torch.ones(1, 1, 4, 4, dtype=torch.int64), 0.3)
