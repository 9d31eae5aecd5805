"""The quality bench: its metrics on known answers, its fields, its policies, and its hold on the tiny model."""

import math

import calibrated_tail
import head_quotas
import pytest
import quality_metrics
import torch
from lib.presets import make_preset
from quality_capture import Inputs, Site, Size, capture, sample
from quality_fields import Field, blur, make_inputs, smooth_field
from quality_metrics import Case, block_mass, geometric_mean, interval, membership, psnr, spread, ssim
from quality_oracle import Coarsening, contributions, levels_by_block_error, levels_by_true_error
from quality_policies import ORDERS, ROWS, Row, attend, chosen, decide, points
from quality_videos import PolicyAttention, Run, make_pairs
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from psa_integrations import apply_pyramid_sparse_attention
from psa_integrations.tiny_wan import load_pipeline
from psa_kernels import BlockLayout, pyramid_attention
from psa_kernels.testing import assert_within_error_budget, error_budget
from psa_masks import MaskPolicy, VideoGrid, density, levels_by_quota

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
