"""The quality bench: its metrics on known answers, its fields, its hold on the tiny model, and its report."""

import math
import re
from pathlib import Path
from xml.etree import ElementTree

import calibrated_tail
import head_quotas
import plot_quality
import pytest
import quality
import quality_equal_time
import quality_metrics
import quality_store
import torch
from lib.presets import make_preset
from quality_capture import Inputs, Site, Size, capture, sample
from quality_fields import Field, blur, make_inputs, smooth_field
from quality_metrics import Case, block_mass, geometric_mean, interval, membership, psnr, spread, ssim
from quality_oracle import Coarsening, contributions, levels_by_block_error, levels_by_true_error
from quality_policies import FRONTIER, ORDERS, ROWS, Row, attend, chosen, decide, points
from quality_report import fill, limits_table, parts_of_page
from quality_videos import Circumstances, PolicyAttention, Run, make_pairs
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from psa_integrations import apply_pyramid_sparse_attention
from psa_integrations.tiny_wan import load_pipeline
from psa_kernels import BlockLayout, pyramid_attention
from psa_kernels.testing import assert_within_error_budget, error_budget
from psa_masks import MaskPolicy, VideoGrid, density, levels_by_quota

ROOT = Path(__file__).parents[1]
GRID = VideoGrid(frames=4, height=8, width=8)
SMALL = Size(4, 32, 32)
STEPS = 2


def make_point(*, order="Gilbert", reuse=0, choose="policy", **settings):
    row = Row(
        "test",
        {"mode": "quota", "block_q": 32, "block_kv": 32, **settings},
        "test",
        order=order,
        reuse=reuse,
        choose=choose,
    )
    return next(points(row))


FULL, ONE_BLOCK = {"bounds": (1.0,)}, {"bounds": (0.0,)}


@pytest.fixture
def inputs():
    return make_inputs(GRID, Field(1.0, 0.2, 1.5), batch=2, heads=2, head_dim=16)


@pytest.fixture(scope="module")
def pipeline():
    pipeline = load_pipeline()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_everything_at_level_1_is_dense_in_every_order(inputs, monkeypatch):
    def by_head(grid, query, key, block_kv):
        generator = torch.Generator().manual_seed(0)
        q_index, kv_index = (torch.rand(key.shape[:3], generator=generator).argsort(dim=-1) for _ in range(2))
        return q_index, kv_index

    monkeypatch.setitem(ORDERS, "another for each head", by_head)
    case = Case(inputs, GRID)
    exact = Case(Inputs(0, 0, *(x.double() for x in (inputs.query, inputs.key, inputs.value))), GRID)
    ref64 = torch.nn.functional.scaled_dot_product_attention(exact.inputs.query, exact.inputs.key, exact.inputs.value)
    for order in ORDERS:
        point = make_point(order=order, **FULL)
        out = attend(
            decide(point, GRID, inputs.query, inputs.key, inputs.value), inputs.query, inputs.key, inputs.value
        )
        assert_within_error_budget(out, ref64, case.dense)
        found = case.measure(point)
        assert (found.density == 1).all()
        # The mass is a sum of 256 rows' sums, each of which rounding leaves a few units from 1.
        assert_within_error_budget(
            found.mass, torch.ones(2, dtype=torch.float64), torch.ones(2), input_dtype=torch.half
        )
        # Norms over all elements: twice the largest error that rounding explains, that of both sides, in each of them.
        budget = error_budget(ref64, case.dense, torch.finfo(torch.float32).eps)
        assert (found.error <= 2 * budget * math.sqrt(ref64[0].numel()) / ref64.flatten(1).norm(dim=1)).all()


def test_one_block_a_row_is_softmax_over_that_block(inputs):
    point = make_point(order="as they are", **ONE_BLOCK)
    found = Case(inputs, GRID).measure(point)
    kept = (
        decide(point, GRID, inputs.query, inputs.key, inputs.value)
        .levels.repeat_interleave(32, 2)
        .repeat_interleave(32, 3)
        == 1
    )
    assert (kept.sum(dim=-1) == 32).all()

    def by_hand(dtype):
        query, key, value = (x.to(dtype) for x in (inputs.query, inputs.key, inputs.value))
        logits = query @ key.mT / 4.0
        dense = logits.softmax(dim=-1)
        out = logits.masked_fill(~kept, -math.inf).softmax(dim=-1) @ value
        error = (out - dense @ value).flatten(1).norm(dim=1) / (dense @ value).flatten(1).norm(dim=1)
        return error, (dense * kept).sum(dim=-1).mean(dim=(1, 2))

    for got, exact, low in zip((found.error, found.mass), by_hand(torch.float64), by_hand(torch.float32), strict=True):
        assert_within_error_budget(got, exact, low)
    assert found.density.tolist() == [1 / 8, 1 / 8]


def test_block_mass_of_short_last_blocks(inputs, monkeypatch):
    query, key = inputs.query[:, :, :77], inputs.key[:, :, :45]
    layout = BlockLayout(77, 45, block_q=32, block_kv=16)
    mass = block_mass(query, key, layout)

    def by_hand(dtype):
        dense = (query.to(dtype) @ key.to(dtype).mT / 4.0).softmax(dim=-1) / 77
        rows = torch.stack([part.sum(dim=2) for part in dense.split(32, dim=2)], dim=2)
        return torch.stack([part.sum(dim=3) for part in rows.split(16, dim=3)], dim=3)

    exact, low = by_hand(torch.float64), by_hand(torch.float32)
    assert_within_error_budget(mass, exact, low)
    monkeypatch.setattr(quality_metrics, "LARGEST_SCORES", 4 * 45 * 10)
    assert_within_error_budget(block_mass(query, key, layout), exact, low)
    assert membership(45, 16, torch.device("cpu")).sum(dim=0).tolist() == [16, 16, 13]


def test_levels_of_another_step_are_used(inputs):
    point = make_point(**ONE_BLOCK)
    case = Case(inputs, GRID)
    other = make_inputs(GRID, Field(1.0, 0.2, 1.5), batch=2, heads=2, head_dim=16, seed=1)
    now, same = case.measure(point), case.measure(point, inputs)
    assert torch.equal(now.error, same.error)
    worse = case.measure(point, Inputs(-1, 0, other.query, other.key, other.value))
    assert (worse.error > now.error).all()
    assert (worse.mass < now.mass).all()


def test_spread_of_even_and_of_single_minded_attention():
    even = spread(torch.zeros(1, 1, 8, 4), torch.randn(1, 1, 100, 4, generator=torch.Generator().manual_seed(0)))
    assert even == pytest.approx({"effective": 1.0, "top5": 0.05, "top15": 0.15}, rel=1e-5)
    key = torch.zeros(1, 1, 100, 4)
    key[..., 17, :] = 100.0
    assert spread(torch.ones(1, 1, 8, 4), key) == pytest.approx({"effective": 0.01, "top5": 1.0, "top15": 1.0})


def test_errors_are_averaged_by_their_logarithms():
    assert geometric_mean([torch.tensor([0.1, 0.0]), torch.tensor([0.4, 0.0])])[0] == pytest.approx(0.2)


def test_psnr_and_ssim_are_those_of_torchmetrics():
    generator = torch.Generator().manual_seed(0)
    reference = torch.rand(2, 3, 3, 24, 17, generator=generator)
    video = (reference + 0.1 * torch.randn(reference.shape, generator=generator)).clamp(0, 1)

    def theirs(dtype):
        pairs = [(a.to(dtype), b.to(dtype)) for a, b in zip(video, reference, strict=True)]
        by_psnr = torch.stack([peak_signal_noise_ratio(a, b, data_range=1.0) for a, b in pairs])
        by_ssim = torch.stack([structural_similarity_index_measure(a, b, data_range=1.0) for a, b in pairs])
        return by_psnr, by_ssim

    ours = psnr(video, reference), ssim(video, reference)
    for value, ref64, low in zip(ours, theirs(torch.float64), theirs(torch.float32), strict=True):
        assert_within_error_budget(value, ref64, low)
    assert psnr(reference, reference).tolist() == [quality_metrics.MAX_PSNR] * 2
    with pytest.raises(ValueError, match="at least 11 pixels"):
        ssim(video[..., :10], reference[..., :10])


def test_interval_is_as_wide_as_the_standard_error_says():
    values = torch.randn(400, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mean, low, high = interval(values.tolist())
    assert mean == pytest.approx(values.mean())
    assert low < mean < high
    assert (high - low) / (2 * 1.96 * values.std() / 20) == pytest.approx(1.0, abs=0.1)
    assert interval([3.0] * 9) == (3.0, 3.0, 3.0)
    assert interval([1.0, 3.0]) == (2.0, 2.0, 2.0)  # too few to resample
    with pytest.raises(ValueError, match="must not be empty"):
        interval([])


def neighbours(x):
    """Correlation of tokens next to each other along each axis of the grid."""
    x = x.unflatten(-1, GRID.shape)
    axes = zip((-3, -2, -1), GRID.shape, strict=True)
    return [float((x.narrow(a, 0, n - 1) * x.narrow(a, 1, n - 1)).mean()) for a, n in axes]


def test_fields_are_as_smooth_and_noisy_as_they_are_set_to():
    def field(smoothness, noise):
        return smooth_field(GRID, (2000,), Field(smoothness, noise, 1.0), torch.Generator().manual_seed(0))

    seen = {(s, n): neighbours(field(s, n)) for s in (0.0, 1.0, 2.0) for n in (0.0, 0.5, 1.0)}
    for (smoothness, noise), correlations in seen.items():
        assert field(smoothness, noise).var() == pytest.approx(1.0, abs=0.05)
        if smoothness == 0.0 or noise == 1.0:
            assert correlations == pytest.approx([0.0] * 3, abs=0.01)
        else:
            # Not exact at the edges, nor for a blur that reaches across the 4 frames.
            expected = (1 - noise) * math.exp(-1 / (4 * smoothness**2))
            assert correlations == pytest.approx([expected] * 3, abs=0.1)
    for noise in (0.0, 0.5):
        rising = [sum(seen[s, noise]) for s in (0.0, 1.0, 2.0)]
        assert rising == sorted(rising)
    torch.testing.assert_close(blur(9, 1.5).square().sum(dim=1), torch.ones(9))


def test_fields_of_one_seed_are_the_same_and_as_sharp_as_set():
    sharp, again = (make_inputs(GRID, Field(0.0, 0.0, 2.0), heads=2) for _ in range(2))
    assert all(torch.equal(getattr(sharp, name), getattr(again, name)) for name in ("query", "key", "value"))
    assert not torch.equal(sharp.query, make_inputs(GRID, Field(0.0, 0.0, 2.0), heads=2, seed=1).query)
    logits = sharp.query @ sharp.key.mT / 8.0
    own = torch.eye(GRID.video_len, dtype=torch.bool)
    assert logits[..., ~own].std() == pytest.approx(2.0, rel=0.05)
    assert logits[..., own].mean() == pytest.approx(2.0 * 0.5 * 8.0, rel=0.05)  # sharpness, ALIKE, sqrt(D)
    calm = make_inputs(GRID, Field(0.0, 0.0, 0.5), heads=2)
    assert spread(calm.query, calm.key)["effective"] > 2 * spread(sharp.query, sharp.key)["effective"]


@pytest.mark.parametrize("setting", [(-1.0, 0.0, 1.0), (1.0, 1.5, 1.0), (1.0, 0.0, math.nan)])
def test_a_field_out_of_range_is_refused(setting):
    with pytest.raises(ValueError, match="must be"):
        Field(*setting)


def test_every_row_of_the_table_is_a_policy():
    names = [row.name for row in ROWS]
    assert len(set(names)) == len(names)
    for row in ROWS:
        assert row.order in ORDERS
        assert row.base is None or row.base in names
        found = list(points(row))
        assert [point.index for point in found] == list(range(len(row.sweep) + 1))
    with pytest.raises(ValueError, match="part of a policy's name, got 'nothing like it'"):
        chosen(["nothing like it"])


def test_the_model_is_held_at_every_self_attention_and_nowhere_else(pipeline):
    pairs = make_pairs(2)
    sites = []

    def watch(site, query, key, value, dense):
        sites.append(site)
        assert query.shape == key.shape == (2, 4, SMALL.grid.seq_len, 64)
        return dense()

    video = sample(pipeline, pairs, size=SMALL, steps=STEPS, attend=watch)
    layers = pipeline.transformer.config.num_layers
    assert sites == [Site(s, f, layer) for s in range(STEPS) for f in range(2) for layer in range(layers)]
    plain = pipeline(
        [prompt for prompt, _ in pairs],
        num_frames=4, height=32, width=32, num_inference_steps=STEPS,
        generator=[torch.Generator().manual_seed(seed) for _, seed in pairs], output_type="pt",
    ).frames  # fmt: skip
    assert torch.equal(video, plain)

    caught = capture(pipeline, pairs, [0], size=SMALL, steps=STEPS)
    assert sorted(caught) == [(0, layer) for layer in range(layers)]
    assert caught[0, 1].query.shape == (2, 4, SMALL.grid.seq_len, 64)


def test_a_policy_in_a_video_is_what_the_integration_does(pipeline):
    bounds = (0.25, 0.5, 0.5, 0.75)
    preset = make_preset(bounds, warmup_steps=1, skip="mean")
    point = make_point(bounds=bounds, skip="mean")
    pairs = make_pairs(1)

    def by_preset(pipeline):
        with apply_pyramid_sparse_attention(pipeline, preset) as handle:
            return sample(pipeline, pairs, size=SMALL, steps=STEPS), handle.stats()

    attention = PolicyAttention(point, Run(SMALL, STEPS, 1, 1))
    video = sample(pipeline, pairs, size=SMALL, steps=STEPS, attend=attention)
    low, stats = by_preset(pipeline)
    exact_pipeline = load_pipeline(dtype=torch.float64)
    exact_pipeline.set_progress_bar_config(disable=True)
    ref64, _ = by_preset(exact_pipeline)
    assert_within_error_budget(video, ref64.double(), low)
    sparse, whole = attention.densities()
    assert float(whole.mean()) == pytest.approx(stats.density)
    assert float(sparse.mean()) == pytest.approx(stats.density_per_step()[1])


@pytest.mark.parametrize("reuse", [0, 1])
def test_levels_in_a_video_are_as_old_as_the_row_says(inputs, reuse):
    point = make_point(reuse=reuse, **ONE_BLOCK)
    size = Size(4, 32, 32)
    attention = PolicyAttention(point, Run(size, 4, 1, 2))
    later = make_inputs(GRID, Field(1.0, 0.2, 1.5), batch=2, heads=2, head_dim=16, seed=1)
    dense = torch.zeros(())
    assert attention(Site(0, 0, 0), inputs.query, inputs.key, inputs.value, lambda: dense) is dense
    attention(Site(1, 0, 0), inputs.query, inputs.key, inputs.value, lambda: dense)
    out = attention(Site(2, 0, 0), later.query, later.key, later.value, lambda: dense)
    seen = inputs if reuse else later
    expected = attend(decide(point, GRID, seen.query, seen.key, seen.value), later.query, later.key, later.value)
    assert torch.equal(out, expected)
    sparse, whole = attention.densities()
    assert sparse.tolist() == [1 / 8, 1 / 8]
    assert whole.tolist() == pytest.approx([(1 + 2 / 8) / 3] * 2)


MIXED = torch.tensor([1, 2, 3, 6], dtype=torch.int8)
"""Levels of blocks of 32 tokens, the last a whole block."""


def test_errors_of_blocks_add_up_to_that_of_their_map(inputs):
    query, key, value = inputs.query[:1, :1], inputs.key[:1, :1], inputs.value[:1, :1]
    layout = BlockLayout(256, 256, block_q=32, block_kv=32)
    choice = torch.randint(0, 4, (8, 8), generator=torch.Generator().manual_seed(0))

    tensors = [x[0, 0] for x in (query, key, value)]
    errors, masses = contributions(*tensors, layout, MIXED.tolist())
    of_query = choice.repeat_interleave(32, 0)[:, :, None]
    mass = masses.gather(2, of_query).sum(dim=(1, 2))
    error = errors.gather(2, of_query[..., None].expand(-1, -1, -1, 16)).sum(dim=(1, 2))
    dense = torch.nn.functional.scaled_dot_product_attention(*(x[None] for x in tensors))[0]
    low, ref64 = (
        pyramid_attention(
            *(x.to(dtype) for x in (query, key, value)),
            MIXED[choice][None, None],
            block_q=32,
            block_kv=32,
            impl="reference",
        )[0, 0]
        for dtype in (torch.float32, torch.float64)
    )
    assert_within_error_budget(dense + error / mass[:, None], ref64, low)


def test_a_path_of_changes_knows_its_error_and_ends_where_the_budget_does(inputs):
    query, key, value = inputs.query[:1, :1], inputs.key[:1, :1], inputs.value[:1, :1]
    layout = BlockLayout(256, 256, block_q=32, block_kv=32)
    tensors = [x[0, 0].double() for x in (query, key, value)]
    costs = 2.0 ** (1 - MIXED.double())
    errors, masses = contributions(*tensors, layout, MIXED.tolist())
    path = Coarsening(errors, masses, layout, costs)
    moves = path.walk(0.5)
    assert path.spent() <= 0.5
    assert path.spent() == pytest.approx(1 + float(moves.cost.sum()) / 64)
    exact = [x.double() for x in (query, key, value)]
    dense = torch.nn.functional.scaled_dot_product_attention(*exact)
    out = pyramid_attention(*exact, MIXED[path.choice][None, None], block_q=32, block_kv=32)
    squares = (out - dense)[0, 0].square().sum(dim=1).unflatten(0, (8, 32)).sum(dim=1)
    # Each of the moves adds a rounding of what it changes, which the first errors bound.
    rounding = len(moves.step) * torch.finfo(torch.float64).eps * errors.square().sum().item()
    assert ((path.errors() - squares).abs() <= rounding).all()


def test_levels_by_true_error_cost_what_they_may_and_beat_every_other_choice(inputs):
    layout = BlockLayout(256, 256, block_q=32, block_kv=32)
    tensors = inputs.query, inputs.key, inputs.value
    dense = torch.nn.functional.scaled_dot_product_attention(*tensors)

    def error(levels):
        out = pyramid_attention(*tensors, levels, block_q=32, block_kv=32)
        return (out - dense).flatten(1).norm(dim=1)

    policy = MaskPolicy(mode="budget", density=0.3, skip="mean", block_q=32, block_kv=32)
    by_layer = levels_by_true_error(*tensors, layout, 0.3)
    by_block = levels_by_block_error(*tensors, layout, 0.3)
    assert (density(by_layer, layout).mean(dim=1) <= 0.3 * (1 + 1e-6)).all()
    assert (density(by_layer, layout).mean(dim=1) > 0.25).all()
    assert (density(by_block, layout) <= 0.3 * (1 + 1e-6)).all()
    for levels in (by_block, policy(*tensors[:2])):
        assert (error(by_layer) < error(levels)).all()
    with pytest.raises(ValueError, match="key must have a multiple of 32 tokens, got 250"):
        levels_by_true_error(inputs.query, inputs.key[:, :, :250], inputs.value[:, :, :250], layout, 0.3)


def test_plain_samples_of_whole_blocks_are_every_token(inputs):
    every = {"bounds": (0.25, 0.5), "skip": "mean", "samples_q": 32, "samples_kv": 32}
    by_policy, by_plain = (
        decide(make_point(choose=choose, **every), GRID, inputs.query, inputs.key, inputs.value).levels
        for choose in ("policy", "plain sample")
    )
    # Softmax over the same tokens in another order: equal but where rounding swaps two scores next to each other.
    assert (by_policy != by_plain).sum() <= 2
    few = {**every, "samples_q": 8, "samples_kv": 8}
    point = make_point(choose="plain sample", **few)
    drawn = decide(point, GRID, inputs.query, inputs.key, inputs.value).levels
    assert torch.equal(drawn, decide(point, GRID, inputs.query, inputs.key, inputs.value).levels)
    assert (drawn != by_plain).any()


def test_the_error_of_values_from_all_tokens_is_the_true_one(inputs):
    every = {"bounds": (0.25, 0.5), "skip": "mean", "samples_q": 32, "samples_kv": 32}
    point = make_point(choose="error of values", order="as they are", **every)
    found = decide(point, GRID, inputs.query, inputs.key, inputs.value).levels
    layout = BlockLayout(256, 256, block_q=32, block_kv=32)
    errors, _ = contributions(*(x[0, 0] for x in (inputs.query, inputs.key, inputs.value)), layout, [6])
    true = errors.square().sum(dim=(2, 3)).unflatten(0, (8, 32)).sum(dim=1)
    # The blocks of largest error are at level 1, but where rounding swaps two next to each other.
    assert ((found[0, 0] == 1) != (levels_by_quota(true, (0.25,)) == 1)).sum() <= 2


def test_means_are_dropped_where_they_lead_further_astray():
    query, key, value = (torch.zeros(1, 1, 256, 16) for _ in range(3))
    # The first half of the queries finds the first key of each block: blocks are alike but for a little, so dropping
    # costs little, and a mean has the value of the other keys. To the other half all keys are alike: means are exact.
    query[:, :, :128, 0], key[:, :, ::32, 0] = 4.0, 3.0
    value[:, :, ::32, 0], value[..., 1] = 1.0, torch.arange(256) / 10000
    settings = {"bounds": (0.0,), "skip": "mean", "samples_q": 32, "samples_kv": 32, "order": "as they are"}
    levels = decide(make_point(choose="mean or drop", **settings), GRID, query, key, value).levels
    plain = decide(make_point(**settings), GRID, query, key, value).levels
    assert torch.equal(levels[:, :, 4:], plain[:, :, 4:])
    assert torch.equal(levels[:, :, :4], plain[:, :, :4].masked_fill(plain[:, :, :4] == 6, 0))
    assert ((plain == 1).sum(dim=-1) == 1).all()


def test_means_weighed_anew(inputs, monkeypatch):
    monkeypatch.setattr(calibrated_tail, "BLOCK", 32)
    monkeypatch.setattr(calibrated_tail, "TAIL", 6)
    tensors = [x.double() for x in (inputs.query, inputs.key, inputs.value)]
    levels = MaskPolicy(mode="quota", bounds=(0.25, 0.5), skip="mean", block_q=32, block_kv=32)(*tensors[:2])

    merged = calibrated_tail.Merged(*(x.float() for x in tensors), levels)
    without = torch.full((2, 2, 8, 8), -math.inf)
    for out, kept in ((merged.out(), levels), (merged.out(without), levels.masked_fill(levels == 6, 0))):
        low, ref64 = (
            pyramid_attention(*(x.to(dtype) for x in tensors), kept, block_q=32, block_kv=32, impl="reference")
            for dtype in (torch.float32, torch.float64)
        )
        assert_within_error_budget(out, ref64, low)

    # With all tokens as samples of all queries, the shortfall of a pair is what its tokens have more than their means.
    alike = tensors[0][:, :, ::32].repeat_interleave(32, dim=2)  # each block's queries are one
    truth = calibrated_tail.true_shortfall(alike, tensors[1])
    assert (truth > 0).all()
    torch.testing.assert_close(calibrated_tail.shortfall(32)(alike, tensors[1]), truth)
    flat = tensors[1][:, :, ::32].repeat_interleave(32, dim=2)  # each block's keys are one
    for form in calibrated_tail.FORMS.values():
        bias = form(tensors[0], flat)
        torch.testing.assert_close(bias, torch.zeros_like(bias))


def test_quotas_of_heads_share_a_layers_density():
    spent = torch.tensor([0.05, 0.1, 0.15, 0.2, 0.3])
    squares = torch.stack([1 / spent, 0.1 / spent])  # squared errors fall ever more slowly, one head has most of them
    densities = spent.expand(2, -1)
    found = head_quotas.shared_out(squares, densities, 2)
    every = [(i, j) for i in range(5) for j in range(5) if spent[i] + spent[j] <= 0.3 + 1e-6]
    best = min(every, key=lambda ij: float(squares[0, ij[0]] + squares[1, ij[1]]))
    assert tuple(found.tolist()) == best == (3, 1)
    assert head_quotas.shared_out(squares[:1].expand(2, -1), densities, 2).tolist() == [2, 2]


PART = {
    "about": {"prompts": 2},
    "runs": [{"device": "a", "commit": "1"}],
    "found": [{"row": name, "point": 0, "run": 0, "errors": [0.25]} for name in ("x", "y")],
}


def part_of(rows, **changes):
    found = [{"row": row, "point": 0, "run": 0, "errors": [1 / 3]} for row in rows]
    return {**PART, "runs": [{"device": "b", "commit": "2"}], "found": found, **changes}


def test_a_file_gains_rows_and_says_what_each_comes_from(tmp_path):
    path = tmp_path / "found.json"
    quality_store.add(path, {"attention": PART})
    results = quality_store.add(path, {"attention": part_of(["y", "z"]), "videos": PART})
    assert results == quality_store.read(path)
    assert results["videos"] == PART
    part = results["attention"]
    assert [(one["row"], one["run"], one["errors"]) for one in part["found"]] == [
        ("x", 0, [0.25]), ("y", 1, [0.33333]), ("z", 1, [0.33333]),
    ]  # fmt: skip
    assert [run["commit"] for run in part["runs"]] == ["1", "2"]
    assert quality_store.measured(part) == {("", name, 0) for name in "xyz"}
    again = quality_store.add(path, {"attention": part_of(["x", "y"])})["attention"]
    assert [run["commit"] for run in again["runs"]] == ["2"]
    assert {one["run"] for one in again["found"]} == {0}


def test_other_samples_do_not_go_into_a_file(tmp_path):
    path = tmp_path / "found.json"
    quality_store.add(path, {"attention": PART})
    before = path.read_text()
    with pytest.raises(ValueError, match="prompts 2 and 3"):
        quality_store.add(path, {"attention": part_of(["z"], about={"prompts": 3})})
    assert path.read_text() == before
    assert list(tmp_path.iterdir()) == [path]


def test_fields_gain_rows_in_each_setting():
    def fields(row, commit):
        settings = [
            {"field": name, "found": [{"row": row, "point": 0, "run": 0, "errors": [1.0]}]} for name in ("one", "two")
        ]
        return {"about": {}, "runs": [{"commit": commit}], "settings": settings}

    part = quality_store.merged(fields("x", "1"), fields("y", "2"))
    assert [[(one["row"], one["run"]) for one in found] for found in quality_store.lists_of(part)] == [
        [("x", 0), ("y", 1)]
    ] * 2
    del part["settings"][1]["found"][1]
    assert quality_store.measured(part) == {("", "x", 0)}
    with pytest.raises(ValueError, match="fields must be the same"):
        quality_store.merged(part, {**part, "settings": part["settings"][:1]})


def test_circumstances_keep_the_tree_inside_blocks_and_give_the_others_their_order():
    there = Circumstances("cubes", order="cubes 4x4x4")
    orders = {row.name: there.changed(row).order for row in ROWS if row.limits}
    assert orders.pop("k-d tree") == "k-d tree in cubes 4x4x4"
    assert set(orders.values()) == {"cubes 4x4x4"}
    assert all(there.changed(row).order in ORDERS for there in quality.CIRCUMSTANCES for row in ROWS if row.limits)
    tree = next(row for row in ROWS if row.name == "k-d tree")
    assert Circumstances("as above").changed(tree).order == "k-d tree"


def test_a_run_from_command_to_page(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(quality, "FIELDS", quality.FIELDS[:2])
    two = Circumstances("few", steps=2, warmup=1), Circumstances("calm", steps=2, warmup=1, shift=3.0, guidance=1.0)
    monkeypatch.setattr(quality, "CIRCUMSTANCES", two)
    path = tmp_path / "found.json"
    small = "--size 2 16 16 --grid 2 8 8 --prompts 1 --draws 1 --pairs 1 --steps 2 --warmup 1 --commit abc"
    parts = [word for part in quality.PARTS for word in ("--part", part)]
    only = ["--policies", "level 1 + tail", "--rows", "quotas + tail"]

    def measure(*more):
        quality.run(quality.arguments([*small.split(), *parts, "--json", str(path), *more]))
        return plot_quality.merged([path])

    measure("--rows", "quotas + tail")
    results = measure(*only, "--only-new", "--commit", "def")
    assert sorted(results) == sorted(quality.PARTS)
    assert [(one["row"], one["run"]) for one in results["attention"]["found"]] == (
        [("quotas + tail", 0)] * 5 + [("level 1 + tail", 1)] * 5
    )
    assert [run["commit"] for run in results["attention"]["runs"]] == ["abc", "def"]
    assert all(0 < one["density"] <= 1 for one in results["attention"]["found"])

    def shifted(noise, shift):
        return shift * noise / (1 + (shift - 1) * noise)

    noise = {one["circumstances"]: one["noise"] for one in results["limits"]["found"]}
    # The second of two steps is at the least noise, 1/1000, which the schedule shifts twice.
    expected = {name: shifted(shifted(0.001, shift), shift) for name, shift in (("few", 6.0), ("calm", 3.0))}
    assert noise == pytest.approx(expected, rel=1e-4)
    before = path.read_text()
    capsys.readouterr()
    measure(*only, "--only-new", "--commit", "ghi")
    assert path.read_text() == before
    said = capsys.readouterr().err.splitlines()
    assert said == [f"{part}: the file has every point of these rows" for part in quality.PARTS]
    names = ("spread", *quality.PARTS)
    page = "".join(f"<!-- {name} -->\nold\n<!-- /{name} -->\n" for name in names)
    filled = fill(page, parts_of_page(results, ROWS))
    assert "old" not in filled
    assert filled.count("| level 1 + tail |") == 5 + 1 + 5
    assert "Commits: abc (50% of the numbers), def (50% of the numbers)." in filled
    for draw, name in ((plot_quality.draw_attention, "attention"), (plot_quality.draw_fields, "fields")):
        ElementTree.fromstring(draw(results[name], ROWS))


def test_time_becomes_density_and_density_an_error():
    names = (quality_equal_time.CURVE, *quality_equal_time.ORDERED.values())
    orders = "\n".join(f"| {name} | {ms} |" for name, ms in zip(names, (0.3, 3.01, 1.01), strict=True))
    more, less = quality_equal_time.OF_DENSITY
    attention = f"| what | density | call |\n|---|---|---|\n| {more} | 0.16 | 11 |\n| {less} | 0.06 | 5 |"
    assert quality_equal_time.order_milliseconds(orders) == pytest.approx({"semantic": 3.0, "hybrid": 1.0})
    assert quality_equal_time.density_milliseconds(attention) == pytest.approx(60.0)
    # error = 0.02 / density, a straight line with both axes logarithmic
    points = [(0.4, 0.05), (0.1, 0.2)]
    assert quality_equal_time.error_at(0.2, points) == pytest.approx(0.1)
    with pytest.raises(ValueError, match="density must lie within"):
        quality_equal_time.error_at(0.5, points)
    with pytest.raises(ValueError, match="must have a table's row 'what'"):
        quality_equal_time.density_milliseconds(orders)


def test_a_page_without_markers_is_refused():
    with pytest.raises(ValueError, match="must have <!-- spread -->"):
        fill("no markers", {"spread": "text"})


@pytest.fixture(scope="module")
def committed():
    return plot_quality.merged(sorted((ROOT / "benchmarks/results").glob("quality_*.json")))


@pytest.fixture(scope="module")
def prose():
    """What the page says of its tables, in one line."""
    page = (ROOT / "docs/quality.md").read_text(encoding="utf-8")
    return " ".join(page[page.index("## What wins") : page.index("## How concentrated")].split())


def test_limits_give_the_density_of_each_policy():
    def one(row, density, psnr):
        return {"circumstances": "x", "noise": 0.5, "row": row, "point": 0, "density": density, "psnr": [psnr]}

    found = [one("the paper's quotas", 0.168, 20.0), one("k-d tree", 0.159, 25.0)]
    *_, line = limits_table({"found": found}, ROWS).splitlines()
    assert line == "| x | 0.500 | 0.168 / 0.159 | 20.00 | 25.00 | +5.00 |"


def test_the_page_says_of_orders_by_cluster_what_its_table_does(committed, prose):
    lines = plot_quality.texts_of(committed)["equal-time"].splitlines()[2:]
    pairs = [tuple(map(float, pair)) for line in lines for pair in re.findall(r"([\d.]+) / ([\d.]+)", line)]
    assert len(pairs) == 4 * 9
    assert all(cluster > curve for cluster, curve in pairs)
    assert "behind the curve on the tiny model and in every field" in prose
    closest = min(pairs, key=lambda pair: pair[0] / pair[1])
    assert f"({closest[0]:.3f} against {closest[1]:.3f})" in prose


@pytest.mark.parametrize(("part", "value", "sign"), [("attention", "errors", -1), ("videos", "psnr", 1)])
def test_the_page_says_of_the_best_policies_what_its_tables_do(part, value, sign, committed, prose):
    policies = {row.name for row in ROWS if row.section == FRONTIER} - {"everything at level 1"}
    points = {}
    for one in committed[part]["found"]:
        if one["row"] in policies:
            # Of errors the geometric mean, as in the table; more is better.
            mean = interval([math.log(x) for x in one[value]] if value == "errors" else one[value])[0]
            points[one["row"], one["density"]] = sign * mean
    tree = {density: mean for (row, density), mean in points.items() if row == "k-d tree"}
    others = {at: mean for at, mean in points.items() if at[0] != "k-d tree"}
    assert "ahead of every other policy at every density" in prose
    for most, mean in tree.items():
        assert mean > max(other for (_, spent), other in others.items() if spent <= most)
    assert "`budget + tail` is the best policy but for the tree" in prose
    for at in (0.3, 0.45):
        rivals = [mean for (row, spent), mean in others.items() if row != "budget + tail" and spent < at + 0.02]
        mine = [mean for (row, spent), mean in others.items() if row == "budget + tail" and round(spent, 2) == at]
        assert mine > [max(rivals)]


def test_the_page_says_of_other_circumstances_what_its_table_does(committed, prose):
    found = {(one["circumstances"], one["row"]): one["psnr"] for one in committed["limits"]["found"]}
    gains = {
        there: interval([a - b for a, b in zip(psnr, found[there, "the paper's quotas"], strict=True)])[0]
        for (there, row), psnr in found.items()
        if row == "k-d tree"
    }
    assert f"the tree stays {min(gains.values()):.1f} to {max(gains.values()):.1f} dB ahead" in prose
    assert max(gains, key=gains.get) == "cubes 4x4x4"
    assert sorted(gains, key=gains.get)[:2] == ["blocks of 32", "no guidance"]


def test_the_page_and_plots_are_those_of_the_committed_numbers(committed):
    results = committed
    page = (ROOT / "docs/quality.md").read_text(encoding="utf-8")
    assert fill(page, plot_quality.texts_of(results)) == page
    for name, draw in plot_quality.DRAW.items():
        drawn = (ROOT / f"docs/quality-{name}.svg").read_text(encoding="utf-8")
        ElementTree.fromstring(drawn)
        assert draw(results[name], ROWS) == drawn
        assert f"quality-{name}.svg" in page
