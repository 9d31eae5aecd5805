"""What a model of a user's file may leave out, and what stands in for it."""

from collections.abc import Callable

import pytest

from psa_config import PresetBook, PresetError, Problem, PyramidSparseAttention, load_presets

Load = Callable[[str], PresetBook]
Problems = Callable[[str], tuple[Problem, ...]]

PUBLISHED = """\
CogVideo_5b:
  attention_configs:
    my_custom_preset:
      type: psa
      description: "My custom PSA configuration"
      use_rearrange: true
      block_size:
        m: 128
        n: 64
        tile_n: 32
      mask_ratios:
        1: [0.0, 0.5]
        2: [0.5, 0.7]
        4: [0.7, 0.9]
        0: [0.9, 1.0]
      mask_mode: thresholdbound
      warmup_steps: 10
"""

SCALE = "{width_divisor: 8, height_divisor: 4, depth_divisor: 2}"


def dense(model: str, *names: str, more: str = "") -> str:
    """A model of dense presets."""
    presets = ", ".join(f"{name}: {{type: dense}}" for name in names)
    return f"{model}: {{{more}attention_configs: {{{presets}}}}}\n"


def test_the_published_custom_preset(load: Load) -> None:
    book = load(PUBLISHED)
    preset = book.get("CogVideo_5b")
    assert preset == book.get("CogVideo_5b", "my_custom_preset")
    assert (preset.model, preset.name) == ("CogVideo_5b", "my_custom_preset")
    attention = preset.attention
    assert isinstance(attention, PyramidSparseAttention)
    assert attention.description == "My custom PSA configuration"
    assert attention.use_rearrange is True
    assert (attention.block_size.m, attention.block_size.n, attention.block_size.tile_n) == (128, 64, 32)
    assert attention.mask_ratios.bounds == (0.5, 0.7, 0.9, 0.9)
    assert (attention.mask_mode, attention.warmup_steps) == ("thresholdbound", 10)


@pytest.mark.parametrize("model", load_presets().models)
def test_geometry_comes_from_the_shipped_model(load: Load, model: str) -> None:
    preset, shipped = load(dense(model, "mine")).get(model), load_presets().get(model)
    assert (preset.video_scale, preset.text_length) == (shipped.video_scale, shipped.text_length)


def test_what_is_given_counts(load: Load) -> None:
    shipped = load_presets().get("CogVideo_5b")
    text = load(dense("CogVideo_5b", "a", more="text_length: 3, ")).get("CogVideo_5b")
    assert (text.text_length, text.video_scale) == (3, shipped.video_scale)
    scale = load(dense("CogVideo_5b", "a", more=f"video_scale: {SCALE}, ")).get("CogVideo_5b")
    assert scale.video_scale.model_dump() == {"width_divisor": 8, "height_divisor": 4, "depth_divisor": 2}
    assert scale.text_length == shipped.text_length
    default = load(dense("CogVideo_5b", "a", "psa_balanced", "b", more="default_attention: b, "))
    assert default.get("CogVideo_5b").name == "b"


@pytest.mark.parametrize(
    ("names", "default"),
    [(["b"], "b"), (["b", "a"], "b"), (["b", "psa_balanced", "a"], "psa_balanced")],
    ids=["the only one", "the first", "named like the shipped default"],
)
def test_the_default_of_a_shipped_model(load: Load, names: list[str], default: str) -> None:
    book = load(dense("CogVideo_5b", *names))
    assert book.get("CogVideo_5b").name == default
    assert book.presets("CogVideo_5b") == tuple(names)


def test_shipped_presets_are_not_added(load: Load) -> None:
    book = load(PUBLISHED)
    assert book.models == ("CogVideo_5b",)
    assert book.presets("CogVideo_5b") == ("my_custom_preset",)
    with pytest.raises(PresetError, match='CogVideo_5b: no preset "psa_balanced", expected "my_custom_preset"'):
        book.get("CogVideo_5b", "psa_balanced")
    assert "my_custom_preset" not in load_presets().presets("CogVideo_5b")


def test_a_model_of_another_name_gives_its_geometry(load: Load, problems: Problems) -> None:
    found = problems(dense("tiny-wan", "a") + dense("Wan", "a"))
    assert [(problem.line, problem.column, problem.path, problem.message) for problem in found] == [
        (2, 1, "Wan.video_scale", "missing, expected a mapping"),
        (2, 1, "Wan.text_length", "missing, expected a whole number of 0 or more"),
    ]
    geometry = f"video_scale: {SCALE}, text_length: 7, "
    preset = load(dense("Wan", "a", more=geometry)).get("Wan")
    assert (preset.name, preset.text_length) == ("a", 7)
    (problem,) = problems(dense("Wan", "a", "psa_balanced", more=geometry))
    assert (problem.line, problem.column, problem.path) == (1, 1, "Wan.default_attention")
    assert problem.message == "missing, expected text"


@pytest.mark.parametrize(
    ("text", "path", "message"),
    [
        ("CogVideo_5b: {text_length: 1}", "attention_configs", "missing, expected a mapping that is not empty"),
        ("CogVideo_5b: {attention_configs: {}}", "attention_configs", "got an empty mapping, expected .*"),
        ("CogVideo_5b: {attention_configs: [a]}", "attention_configs", "got a list of 1, expected .*"),
        (dense("CogVideo_5b", "a", more="text_length: , "), "text_length", "got nothing, expected .*"),
        (dense("CogVideo_5b", "a", more="video_scale: {}, "), "video_scale.width_divisor", "missing, .*"),
        (dense("CogVideo_5b", "a", more="default_attention: b, "), "default_attention", 'no preset "b", .*'),
        (dense("CogVideo_5b", "a", more="text_lenght: 1, "), "text_lenght", "unknown key, .*"),
        ("CogVideo_5b: {attention_configs: {a: {type: dens}}}", "attention_configs.a.type", 'got "dens", .*'),
    ],
)
def test_mistakes_are_seen_all_the_same(load: Load, text: str, path: str, message: str) -> None:
    with pytest.raises(PresetError, match=rf":1:\d+: CogVideo_5b\.{path}: {message}") as caught:
        load(text)
    assert {problem.path.split(".")[1] for problem in caught.value.errors} == {path.split(".")[0]}


def test_a_name_that_is_almost_a_shipped_one(problems: Problems) -> None:
    (problem,) = problems(PUBLISHED.replace("CogVideo_5b", "CogVideo_5B"))
    assert (problem.line, problem.column, problem.path) == (1, 1, "CogVideo_5B")
    assert problem.message == (
        'missing video_scale and text_length, which only a shipped model may leave out, did you mean "CogVideo_5b"?'
    )
    two = problems(dense("Tiny-Wan", "a", "b", more="text_length: 3, "))
    assert [problem.message for problem in two] == [
        'missing default_attention and video_scale, which only a shipped model may leave out, did you mean "tiny-wan"?'
    ]


def test_a_model_of_a_name_like_a_shipped_one_may_be_of_its_own(load: Load, problems: Problems) -> None:
    geometry = f"video_scale: {SCALE}, text_length: 7, "
    assert load(dense("CogVideo_5B", "a", more=geometry)).models == ("CogVideo_5B",)
    (problem,) = problems(dense("CogVideo_5B", "a", more=geometry.replace("width_divisor: 8, ", "")))
    assert problem.path == "CogVideo_5B.video_scale.width_divisor"
