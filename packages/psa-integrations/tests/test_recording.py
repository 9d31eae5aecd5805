"""Level maps kept while a model runs, against those that the policy made."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from psa_config import Preset
from psa_integrations import LevelRecorder, apply_pyramid_sparse_attention
from psa_masks import MaskPolicy

Build = Callable[[str], Any]
Run = Callable[..., torch.Tensor]


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


@pytest.mark.parametrize(("name", "text"), [("wan21", 0), ("cogvideox_5b", 16)])
def test_the_map_with_the_prompt_of_the_chosen_places_is_kept(
    name: str, text: int, build: Build, run: Run, make_preset: Callable[..., Preset], level_maps: list[torch.Tensor]
) -> None:
    preset = make_preset((0.25, 0.4, 0.6, 0.75), warmup_steps=1)
    pipeline = build(name)
    recorder = LevelRecorder(layers=(1,), steps=(0, 2), heads=(1,))
    with apply_pyramid_sparse_attention(pipeline, preset) as handle:
        handle.record_levels(recorder)
        run(pipeline, steps=3)
    # Step 0 ran dense. Of the calls of step 2 (two layers; Wan: with the prompt, then without) layer 1's first.
    (kept,) = recorder.maps()
    calls = 2 if name == "wan21" else 1
    made = level_maps[2 * calls + 1]
    assert torch.equal(kept.levels, made[-1, 1:2])
    assert (kept.transformer, kept.step, kept.layer, kept.heads) == ("transformer", 2, 1, (1,))
    assert (kept.block_q, kept.block_kv, kept.num_levels) == (32, 32, 4)
    assert (kept.grid.shape, kept.grid.text) == ((3, 8, 12), text)
    assert kept.order is not None
    assert len(kept.order) == kept.grid.video_len
    assert recorder.left_out == 0


@pytest.mark.parametrize(("method", "count"), [("KdTree", 1), ("Hybrid", 0)])
def test_maps_are_kept_where_blocks_keep_their_tokens(
    method: str, count: int, build: Build, run: Run, make_preset: Callable[..., Preset]
) -> None:
    pipeline = build("wan21")
    recorder = LevelRecorder(layers=(0,), steps=(0,), heads=(0,))
    preset = make_preset((0.25, 0.4, 0.6, 0.75), rearrange_method=method, num_clusters=9)
    with apply_pyramid_sparse_attention(pipeline, preset) as handle:
        handle.record_levels(recorder)
        run(pipeline, steps=1)
    assert len(recorder.maps()) == count
    assert all(kept.order is not None for kept in recorder.maps())


def test_recording_changes_no_bit_and_ends(build: Build, run: Run, sparse: Preset) -> None:
    pipeline = build("wan21")
    recorder = LevelRecorder(layers=(0,), steps=(0,), heads=(0,))
    with apply_pyramid_sparse_attention(pipeline, sparse) as handle:
        plain = run(pipeline, steps=1)
        handle.record_levels(recorder)
        assert torch.equal(run(pipeline, steps=1), plain)
        assert len(recorder.maps()) == 1
        other = LevelRecorder(layers=(0,), steps=(0,), heads=(0,))
        handle.record_levels(other)
        handle.record_levels(None)
        run(pipeline, steps=1)
    assert other.maps() == ()


def test_maps_beyond_the_room_are_counted(build: Build, run: Run, sparse: Preset) -> None:
    # 288 tokens in 9 blocks: 81 bytes a map and head.
    recorder = LevelRecorder(layers=(0, 1), steps=(0, 1), heads=(0, 1), max_bytes=3 * 2 * 81)
    pipeline = build("wan21")
    with apply_pyramid_sparse_attention(pipeline, sparse) as handle:
        handle.record_levels(recorder)
        run(pipeline, steps=2)
    assert [(kept.step, kept.layer) for kept in recorder.maps()] == [(0, 0), (0, 1), (1, 0)]
    assert recorder.left_out == 1


def test_a_head_that_is_not_there_is_named(build: Build, run: Run, sparse: Preset) -> None:
    pipeline = build("wan21")
    with apply_pyramid_sparse_attention(pipeline, sparse) as handle:
        handle.record_levels(LevelRecorder(layers=(0,), steps=(0,), heads=(2,)))
        with pytest.raises(ValueError, match="heads must be below the 2 heads of a layer, got 2"):
            run(pipeline, steps=1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": ()}, r"layers must hold at least one number, none negative, got \[\]"),
        ({"steps": (1, -1)}, r"steps must hold .* got \[1, -1\]"),
        ({"max_bytes": 0}, "max_bytes must be at least 1, got 0"),
    ],
)
def test_choices_out_of_range_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LevelRecorder(**{"layers": (0,), "steps": (0,), "heads": (0,)} | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": 0}, "layers must be a collection of integers, got int 0"),
        ({"steps": "12"}, "steps must be a collection of integers, got str '12'"),
        ({"heads": (0, 1.5)}, "a number of heads must be an integer, got float 1.5"),
        ({"layers": [True]}, "a number of layers must be an integer, got bool True"),
        ({"max_bytes": 1e6}, "max_bytes must be an integer, got float 1000000.0"),
    ],
)
def test_choices_of_another_type_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        LevelRecorder(**{"layers": (0,), "steps": (0,), "heads": (0,)} | changes)


def test_a_handle_refuses_arguments_of_another_type(build: Build, sparse: Preset) -> None:
    with apply_pyramid_sparse_attention(build("wan21"), sparse) as handle:
        with pytest.raises(TypeError, match=r"recorder must be a psa_integrations.LevelRecorder or None, got str"):
            handle.record_levels("x")
        for arguments, message in (
            ((1.5,), "index must be an integer, got float 1.5"),
            ((True,), "index must be an integer, got bool True"),
            (("1",), "index must be an integer, got str '1'"),
            ((1, 2.5), "total must be an integer, got float 2.5"),
        ):
            with pytest.raises(TypeError, match=message):
                handle.at_step(*arguments)
        with pytest.raises(ValueError, match="transformer must be one of 'transformer', got 'transfomer'"):
            handle.stats().density_per_step("transfomer")
