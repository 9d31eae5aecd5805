"""Statistics of whole runs against work counted from the level maps."""

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch

from psa_config import Preset
from psa_integrations import apply_pyramid_sparse_attention
from psa_masks import MaskPolicy

Build = Callable[[str], Any]
Run = Callable[..., torch.Tensor]


def counted_density(levels: torch.Tensor, tokens: int, block: int = 32) -> float:
    """Rows read by every query over keys there are, pair by pair."""
    sizes = [min(block, tokens - start) for start in range(0, tokens, block)]
    executed = 0
    maps = levels.flatten(0, 1).tolist()
    for one in maps:
        for q_size, row in zip(sizes, one, strict=True):
            for kv_size, level in zip(sizes, row, strict=True):
                if level:
                    executed += q_size * -(-kv_size // 2 ** (level - 1))
    return executed / (len(maps) * tokens**2)


@pytest.fixture
def level_maps(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """The level maps that the policy made, in order of the calls."""
    maps: list[torch.Tensor] = []
    decide = MaskPolicy.__call__

    def note(policy: MaskPolicy, *args: Any, **options: Any) -> torch.Tensor:
        maps.append(decide(policy, *args, **options))
        return maps[-1]

    monkeypatch.setattr(MaskPolicy, "__call__", note)
    return maps


@pytest.mark.parametrize(("name", "tokens"), [("wan21", 3 * 7 * 9), ("cogvideox_5b", 16 + 3 * 7 * 9)])
@pytest.mark.parametrize("skip", ["drop", "mean"])
def test_density_per_step_and_layer_is_the_executed_work(
    name: str,
    tokens: int,
    skip: str,
    build: Build,
    run: Run,
    make_preset: Callable[..., Preset],
    level_maps: list[torch.Tensor],
) -> None:
    pipeline = build(name)
    changes = {"mask_mode": "thresholdbound", "skip": skip, "warmup_steps": 1, "dense_layers": (0,)}
    preset = make_preset((0.2, 0.3, 0.5, 0.6), **changes)
    with apply_pyramid_sparse_attention(pipeline, preset) as handle:
        run(pipeline, height=112, width=144, steps=3)
        stats = handle.stats()

    # Wan makes two calls a step with guidance, CogVideoX one with a batch of two.
    calls = 2 if name == "wan21" else 1
    assert len(level_maps) == 2 * calls
    expected = {}
    for step in (1, 2):
        maps = level_maps[(step - 1) * calls : step * calls]
        expected[step] = sum(counted_density(levels, tokens) for levels in maps) / calls
    sparse = {entry.step: entry for entry in stats.layers if entry.dense_calls == 0}
    assert {(entry.step, entry.layer) for entry in stats.layers} == set(product(range(3), range(2)))
    assert {step: entry.density for step, entry in sparse.items()} == pytest.approx(expected, rel=1e-6)
    assert all(entry.layer == 1 and entry.calls == calls for entry in sparse.values())
    assert all(0 < entry.density < 1 for entry in sparse.values())
    assert stats.calls == 3 * 2 * calls
    assert stats.density == pytest.approx((4 + sum(expected.values())) / 6, rel=1e-6)
    assert stats.dense_steps() == [0]
    assert stats.dense_layers() == [0]


def test_a_density_known_in_advance(build: Build, run: Run, sparse: Preset) -> None:
    pipeline = build("wan21")
    with apply_pyramid_sparse_attention(pipeline, sparse) as handle:
        run(pipeline, height=128, width=192)
        density = handle.stats().density
    # 288 tokens in 9 blocks; shares .25/.4/.6/.75 end at blocks 3, 4, 6, 7: 3 of 32 rows, 1 of 16, 2 of 8, 1 of 4.
    assert density == pytest.approx((3 * 32 + 16 + 2 * 8 + 4) / 288, rel=1e-6)


def test_text_is_read_by_all_and_reads_all(
    build: Build, run: Run, sparse: Preset, level_maps: list[torch.Tensor]
) -> None:
    pipeline = build("cogvideox_5b")
    with apply_pyramid_sparse_attention(pipeline, sparse) as handle:
        run(pipeline)
        calls = sum(entry.calls - entry.dense_calls for entry in handle.stats().layers)
    assert len(level_maps) == calls > 0
    for levels in level_maps:
        assert (levels[:, :, 0, :] == 1).all()
        assert (levels[:, :, :, 0] == 1).all()
        assert (levels[:, :, 1:, 1:] != 1).any()


def test_statistics_add_up_until_reset_and_outlive_removal(build: Build, run: Run, sparse: Preset) -> None:
    pipeline = build("wan21")
    with apply_pyramid_sparse_attention(pipeline, sparse) as handle:
        run(pipeline, steps=2)
        run(pipeline, steps=2)
        assert handle.stats().calls == 2 * (2 * 2 * 2)
        handle.reset_stats()
        run(pipeline, steps=2)
    run(pipeline, steps=2)
    assert handle.stats().calls == 2 * 2 * 2


def test_a_dense_preset_is_counted_and_changes_nothing(build: Build, run: Run) -> None:
    pipeline = build("wan21")
    expected = run(pipeline)
    with apply_pyramid_sparse_attention(pipeline, "Wan2.1_1.3b/baseline") as handle:
        assert torch.equal(run(pipeline), expected)
        assert handle.stats().density == 1.0
        assert handle.stats().dense_steps() == [0, 1, 2]


def test_the_random_state_of_the_caller_is_left_alone(build: Build, run: Run, sparse: Preset) -> None:
    pipeline = build("wan21")
    before = torch.get_rng_state()
    with apply_pyramid_sparse_attention(pipeline, sparse):
        first = run(pipeline)
        second = run(pipeline)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, second)
