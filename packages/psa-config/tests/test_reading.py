"""What a user's file means."""

import copy
import itertools
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from psa_config import (
    DenseAttention,
    MaskRatios,
    Preset,
    PresetBook,
    PresetError,
    PyramidSparseAttention,
    load_presets,
)

Load = Callable[[str], PresetBook]


def pyramid(preset: Preset) -> PyramidSparseAttention:
    assert isinstance(preset.attention, PyramidSparseAttention)
    return preset.attention


def with_ratios(form: str, ratios: str) -> str:
    start, end = form.index("        1: ["), form.index("      mask_mode")
    return form[:start] + ratios + form[end:]


def test_the_published_form(load: Load, form: str) -> None:
    book = load(form)
    assert book.models == ("Wan",)
    assert book.presets("Wan") == ("balanced", "baseline")
    preset = book.get("Wan")
    assert (preset.model, preset.name, preset.text_length) == ("Wan", "balanced", 226)
    assert preset.video_scale.model_dump() == {"width_divisor": 16, "height_divisor": 16, "depth_divisor": 4}
    attention = pyramid(preset)
    assert attention.description == "..."
    assert attention.use_rearrange is True
    assert attention.block_size.model_dump() == {"m": 128, "n": 64, "tile_n": 32}
    assert attention.mask_ratios.bounds == (0.4, 0.5, 0.6, 0.8)
    assert attention.mask_mode == "thresholdbound"
    assert attention.warmup_steps == 12
    assert book.get("Wan", "baseline").attention == DenseAttention(type="dense")


def test_what_is_left_out_has_a_default(load: Load, form: str) -> None:
    attention = pyramid(load(form.replace("        tile_n: 32\n", "")).get("Wan"))
    assert attention.block_size.tile_n == 32
    assert (attention.rearrange_method, attention.tile_size) == ("Gilbert", (2, 8, 8))
    assert attention.cubes_along == "Raster"
    assert (attention.num_clusters, attention.cluster_iterations) == (64, 2)
    assert (attention.use_sim_mask, attention.sim_thresholds.values) == (False, (0.7, 0.65, 0.6))
    assert (attention.cooldown_steps, attention.dense_layers) == (0, ())
    assert (attention.min_full, attention.skip, attention.seed) == (0.0, "drop", 0)
    assert (attention.samples.q, attention.samples.kv) == (None, None)


def test_every_optional_key(load: Load, form: str) -> None:
    options = """\
      cooldown_steps: 3
      dense_layers: [0, 29]
      rearrange_method: Cube
      tile_size: [4, 8, 16]
      cubes_along: Gilbert
      use_sim_mask: true
      sim_thresholds: {x2: 0.75, x4: -1, x8: 1}
      skip: mean
      samples: {q: 32, kv: 16}
      seed: 7
      min_full: 6e-2
    baseline:
"""
    attention = pyramid(load(form.replace("    baseline:\n", options)).get("Wan"))
    assert (attention.cooldown_steps, attention.dense_layers) == (3, (0, 29))
    assert (attention.rearrange_method, attention.tile_size) == ("Cube", (4, 8, 16))
    assert attention.cubes_along == "Gilbert"
    assert (attention.use_sim_mask, attention.sim_thresholds.values) == (True, (0.75, -1, 1))
    assert (attention.skip, attention.seed, attention.min_full) == ("mean", 7, 0.06)
    assert (attention.samples.q, attention.samples.kv) == (32, 16)


def test_orders_by_cluster(load: Load, form: str) -> None:
    for method in ("Semantic", "Hybrid", "KdTree"):
        chosen = f"rearrange_method: {method}\n      num_clusters: 256\n      cluster_iterations: 1"
        attention = pyramid(load(form.replace("warmup_steps: 12", chosen)).get("Wan"))
        assert attention.rearrange_method == method
        assert (attention.num_clusters, attention.cluster_iterations) == (256, 1)


def test_importance_method(load: Load, form: str) -> None:
    assert pyramid(load(form).get("Wan")).importance_method == "sampled"
    for samples in ("{q: 16, kv: 8}", "{q: 32}", "{}"):
        chosen = f"importance_method: antidiagonal\n      samples: {samples}"
        attention = pyramid(load(form.replace("warmup_steps: 12", chosen)).get("Wan"))
        assert attention.importance_method == "antidiagonal"


def test_the_other_spelling_of_min_full(load: Load, form: str) -> None:
    text = form.replace("warmup_steps: 12", "min_full_attn_ratio: 0.06")
    assert pyramid(load(text).get("Wan")).min_full == 0.06


def test_the_order_of_levels_does_not_matter(load: Load, form: str) -> None:
    lines = ["1: [0, 0.4]", "2: [0.4, 0.5]", "4: [0.5, 0.6]", "8: [0.6, 0.8]", "0: [0.8, 1]"]
    expected = load(form).get("Wan")
    for order in itertools.permutations(lines):
        text = with_ratios(form, "".join(f"        {line}\n" for line in order))
        assert load(text).get("Wan") == expected


@pytest.mark.parametrize(
    ("ratios", "bounds"),
    [
        ("{1: [0, 0.5], 2: [0.5, 0.7], 4: [0.7, 0.9], 0: [0.9, 1]}", (0.5, 0.7, 0.9, 0.9)),
        ("{1: [0, 0.5], 4: [0.5, 0.7], 8: [0.7, 0.8], 0: [0.8, 1]}", (0.5, 0.5, 0.7, 0.8)),
        ("{1: [0, 0.5], 2: [0.5, 0.5], 4: [0.5, 0.7], 8: [0.7, 0.8]}", (0.5, 0.5, 0.7, 0.8)),
        ("{8: [0, 0.25]}", (0.0, 0.0, 0.0, 0.25)),
        ("{1: [0, 1]}", (1.0, 1.0, 1.0, 1.0)),
        ("{1: [0, 1], 0: [1, 1]}", (1.0, 1.0, 1.0, 1.0)),
        ('{"1": [0, 0.5], "0": [0.5, 1]}', (0.5, 0.5, 0.5, 0.5)),
    ],
)
def test_a_level_left_out_is_an_empty_range(load: Load, form: str, ratios: str, bounds: tuple[float, ...]) -> None:
    text = with_ratios(form, "").replace("mask_ratios:\n", f"mask_ratios: {ratios}\n")
    assert pyramid(load(text).get("Wan")).mask_ratios.bounds == bounds


def test_merge_keys_and_aliases(load: Load, form: str) -> None:
    text = form.replace("    balanced:\n", "    balanced: &balanced\n") + (
        "    tail:\n      <<: *balanced\n      skip: mean\n"
        "    both:\n      warmup_steps: 1\n      <<: [{skip: mean}, *balanced]\n"
    )
    book = load(text)
    balanced = pyramid(book.get("Wan"))
    assert pyramid(book.get("Wan", "tail")) == balanced.model_copy(update={"skip": "mean"})
    both = balanced.model_copy(update={"skip": "mean", "warmup_steps": 1})
    assert pyramid(book.get("Wan", "both")) == both


def test_names_are_text(load: Load, form: str) -> None:
    text = form.replace("Wan:", "2.10:").replace("    baseline:", "    no:").replace("balanced", "1e3")
    text = text.replace("default_attention: 1e3", 'default_attention: "1e3"')
    book = load(text)
    assert book.models == ("2.10",)
    assert book.presets("2.10") == ("1e3", "no")
    assert book.get("2.10").name == "1e3"


def test_utf8_with_and_without_a_byte_order_mark(load: Load, form: str) -> None:
    text = form.replace('"..."', '"均衡"')
    for mark in ("", "\ufeff"):
        assert pyramid(load(mark + text).get("Wan")).description == "均衡"


def test_a_path_may_be_text(tmp_path: Path, form: str) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(form)
    assert load_presets(str(file)).get("Wan") == load_presets(file).get("Wan")


def test_presets_are_frozen_and_hashable() -> None:
    preset = load_presets().get("tiny-wan")
    with pytest.raises(ValidationError, match="frozen"):
        preset.text_length = 3
    with pytest.raises(ValidationError, match="frozen"):
        pyramid(preset).mask_ratios.full = (0.0, 1.0)
    assert len({preset, load_presets().get("tiny-wan", "psa_balanced")}) == 1
    assert pickle.loads(pickle.dumps(preset)) == preset


def test_books_can_be_copied_and_pickled() -> None:
    book = load_presets()
    assert copy.deepcopy(book) == book
    assert pickle.loads(pickle.dumps(book)) == book


@pytest.mark.parametrize("options", [{}, {"by_alias": True}, {"mode": "json"}, {"exclude_defaults": True}], ids=str)
def test_what_is_dumped_is_read_back(load: Load, form: str, options: dict[str, Any]) -> None:
    form += "    tenth: {type: psa, use_rearrange: false, block_size: {m: 64, n: 64},\n"
    form += "      mask_mode: budget, density: 0.1, budget_per: layer}\n"
    for book in (load_presets(), load(form)):
        for preset in (book.get(model, name) for model in book.models for name in book.presets(model)):
            assert Preset.model_validate(preset.model_dump(**options)) == preset
            assert Preset.model_validate_json(preset.model_dump_json()) == preset


def test_a_changed_copy_is_checked() -> None:
    preset = load_presets().get("tiny-wan")
    attention = pyramid(preset)
    assert attention.model_copy(update={"seed": 5}).seed == 5
    spends = {"mask_mode": "budget", "mask_ratios": None, "density": 0.1}
    assert attention.model_copy(update=spends).mask_ratios is None
    for changes in ({"seed": -5}, {"skip": "men"}, {"warmup_step": 3}, {"density": 0.1}):
        with pytest.raises(ValidationError):
            attention.model_copy(update=changes)
    with pytest.raises(ValidationError):
        preset.model_copy(update={"text_length": -1})


def test_emoji_as_json_escapes_them(load: Load, form: str) -> None:
    text = form.replace('"..."', json.dumps("a 😀")).replace(" balanced", " " + json.dumps("😀"))
    preset = load(text).get("Wan")
    assert (preset.name, preset.attention.description) == ("😀", "a 😀")


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(PresetError, match=r"no\.yaml: cannot be read: No such file") as caught:
        load_presets(tmp_path / "no.yaml")
    (problem,) = caught.value.errors
    assert (problem.file, problem.line) == (str(tmp_path / "no.yaml"), None)


@pytest.mark.parametrize("model", ["wan2.1_1.3B", "Wan2.1-1.3b", "wan2.1_1.3bb"])
def test_unknown_model(model: str) -> None:
    book = load_presets()
    for look_up in (book.get, book.presets):
        with pytest.raises(PresetError, match=r'no model ".*", expected "CogVideo1\.5_5b", .*') as caught:
            look_up(model)
        assert str(caught.value).endswith(', did you mean "Wan2.1_1.3b"?')


def test_unknown_preset() -> None:
    with pytest.raises(PresetError) as caught:
        load_presets().get("CogVideo_5b", "psa_4step")
    assert str(caught.value).endswith(
        'CogVideo_5b: no preset "psa_4step", '
        'expected "psa_balanced", "psa_tail", "psa_4steps", "psa_quality", "psa_fast" or "baseline", '
        'did you mean "psa_4steps"?'
    )


def test_a_name_like_no_other_gets_no_guess() -> None:
    with pytest.raises(PresetError) as caught:
        load_presets().get("???")
    assert "did you mean" not in str(caught.value)


@pytest.mark.parametrize(
    ("message", "call"),
    [
        ("model must be a str, got int 5", lambda: load_presets().get(5)),
        ("model must be a str, got list", lambda: load_presets().presets(["tiny-wan"])),
        ("preset must be a str, got int 3", lambda: load_presets().get("tiny-wan", 3)),
        ("path must be a str, a path or None, got bytes b'x.yaml'", lambda: load_presets(b"x.yaml")),
        ("path must be a str, a path or None, got int 5", lambda: load_presets(5)),
    ],
)
def test_names_and_paths_of_another_type(message: str, call: Callable[[], object]) -> None:
    with pytest.raises(TypeError, match=message):
        call()


def test_a_path_that_no_file_can_have() -> None:
    with pytest.raises(PresetError, match="cannot be read: embedded null"):
        load_presets("a\0b.yaml")


def test_lists_stand_for_tuples() -> None:
    ratios = MaskRatios(**{"1": [0, 0.5], "2": [0.5, 1]})
    assert ratios.bounds == (0.5, 1.0, 1.0, 1.0)
    attention = PyramidSparseAttention(
        type="psa",
        use_rearrange=True,
        block_size={"m": 128, "n": 64},
        mask_ratios=ratios,
        mask_mode="topk",
        dense_layers=[0, 3],
        tile_size=[1, 2, 4],
    )
    assert (attention.dense_layers, attention.tile_size) == ((0, 3), (1, 2, 4))
    hash(attention)
    with pytest.raises(ValidationError, match=r"dense_layers\.0"):
        PyramidSparseAttention(**(attention.model_dump() | {"mask_ratios": ratios, "dense_layers": ["0"]}))
