"""Every mistake in what a file says is refused, where it stands and in words."""

import pickle
import re
from collections.abc import Callable

import pytest

from psa_config import PresetBook, PresetError, Problem

Problems = Callable[[str | bytes], tuple[Problem, ...]]

B = "Wan.attention_configs.balanced"
R = f"{B}.mask_ratios"

# What is replaced in the form; by what, a ^ before the place the error must name; its path and message.
MISTAKES = [
    # Names
    ("warmup_steps", "^warmup_step", f"{B}.warmup_step", 'unknown key, .*, did you mean "warmup_steps"?'),
    ("width_div", "^width-div", "Wan.video_scale.width-divisor", 'unknown key, .*"width_divisor"?'),
    ("m: 128", "m: 128\n        ^k: 3", f"{B}.block_size.k", 'unknown key, expected "m", "n" or "tile_n"'),
    ("text_length", "^text_len", "Wan.text_len", 'unknown key, .*, did you mean "text_length"?'),
    (
        "type: dense",
        "type: dense\n      ^psa: 1",
        "Wan.attention_configs.baseline.psa",
        'unknown key, expected "type" or "description"',
    ),
    (
        "type: dense",
        "type: dense\n      ^dense: 1",
        "Wan.attention_configs.baseline.dense",
        'unknown key, expected "type" or "description"',
    ),
    ("type: psa", "type: psa\n      ^psa: {psa: 1}", f"{B}.psa", "unknown key, expected .*"),
    ("8: [", "^16: [", f"{R}.16", 'unknown key, expected "1", "2", "4", "8" or "0", .*'),
    (
        "warmup_steps: 12",
        "sim_thresholds: {x2: 0.7, ^x16: 0.5}",
        f"{B}.sim_thresholds.x16",
        'unknown key, expected "x2", "x4" or "x8"',
    ),
    (
        "default_attention: b",
        "default_attention: ^B",
        "Wan.default_attention",
        'no preset "Balanced", expected "balanced" or "baseline", did you mean "balanced"?',
    ),
    (
        "warmup_steps: 12",
        "min_full: 0.1\n      ^min_full_attn_ratio: 0.1",
        f"{B}.min_full_attn_ratio",
        "another spelling of this key is given too, expected one of them",
    ),
    # What is missing stands at its parent
    ("balanced:\n      type: psa", "^balanced:", f"{B}.type", 'missing, expected "dense" or "psa"'),
    ("Wan:\n  default_attention: balanced\n", "^Wan:\n", "Wan.default_attention", "missing, expected text"),
    (
        "video_scale:\n    width_divisor: 16",
        "^video_scale:",
        "Wan.video_scale.width_divisor",
        "missing, expected a whole number of 1 or more",
    ),
    ("block_size:\n        m: 128", "^block_size:", f"{B}.block_size.m", "missing, expected 32, 64 or 128"),
    ("1: [0.0, 0.4]", "^1: [0.0]", f"{R}.1[1]", "missing, expected a number from 0 to 1"),
    (
        "warmup_steps: 12",
        "^tile_size: [2, 8]",
        f"{B}.tile_size[2]",
        "missing, expected a whole number of 1 or more",
    ),
    # Choices
    ("type: psa", "type: ^pas", f"{B}.type", 'got "pas", expected "dense" or "psa", did you mean "psa"?'),
    ("type: psa", "type: ^[psa]", f"{B}.type", 'got a list of 1, expected "dense" or "psa"'),
    ("type: psa", "type: ^1", f"{B}.type", 'got 1, expected "dense" or "psa"'),
    (
        "thresholdbound",
        "^threshold_bound",
        f"{B}.mask_mode",
        'got "threshold_bound", expected "thresholdbound", "topk" or "budget", did you mean "thresholdbound"?',
    ),
    ("warmup_steps: 12", "skip: ^tail", f"{B}.skip", 'got "tail", expected "drop" or "mean"'),
    (
        "warmup_steps: 12",
        "rearrange_method: ^gilbert",
        f"{B}.rearrange_method",
        'got "gilbert", expected "Gilbert", "Cube", "Semantic", "Hybrid" or "KdTree", did you mean "Gilbert"?',
    ),
    (
        "warmup_steps: 12",
        "rearrange_method: Hybrid\n      num_clusters: ^0",
        f"{B}.num_clusters",
        "got 0, expected a whole number of 1 or more",
    ),
    (
        "warmup_steps: 12",
        "cluster_iterations: ^2.5",
        f"{B}.cluster_iterations",
        "got 2.5, expected a whole number of 1 or more",
    ),
    (
        "warmup_steps: 12",
        "cubes_along: ^raster",
        f"{B}.cubes_along",
        'got "raster", expected "Raster" or "Gilbert", did you mean "Raster"?',
    ),
    (
        "warmup_steps: 12",
        "tile_size: ^8",
        f"{B}.tile_size",
        "got 8, expected a list of 3, each a whole number of 1 or more",
    ),
    (
        "warmup_steps: 12",
        "tile_size: ^[2, 8, 8, 8]",
        f"{B}.tile_size",
        "got a list of 4, expected a list of 3, each a whole number of 1 or more",
    ),
    ("warmup_steps: 12", "tile_size: [2, ^0, 8]", f"{B}.tile_size[1]", "got 0, expected a whole number of 1 or more"),
    ("n: 64", "n: ^48", f"{B}.block_size.n", "got 48, expected 32, 64 or 128"),
    ("n: 64", "n: ^64.0", f"{B}.block_size.n", "got 64.0, expected 32, 64 or 128"),
    ("n: 64", "n: ^16", f"{B}.block_size.n", "got 16, expected 32, 64 or 128"),
    ("m: 128", 'm: ^"128"', f"{B}.block_size.m", 'got "128", expected 32, 64 or 128'),
    ("tile_n: 32", "tile_n: ^true", f"{B}.block_size.tile_n", "got true, expected 32, 64 or 128"),
    # Kinds of values
    ("default_attention: balanced", "default_attention: ^3", "Wan.default_attention", "got 3, expected text"),
    ('description: "..."', "description: ^3", f"{B}.description", "got 3, expected text"),
    ("226", "^-1", "Wan.text_length", "got -1, expected a whole number of 0 or more"),
    ("226", "^226.0", "Wan.text_length", "got 226.0, expected a whole number of 0 or more"),
    ("226", '^"226"', "Wan.text_length", 'got "226", expected a whole number of 0 or more'),
    ("226", "^true", "Wan.text_length", "got true, expected a whole number of 0 or more"),
    (
        "text_length: 226",
        "text_length:^",
        "Wan.text_length",
        "got nothing, expected a whole number of 0 or more",
    ),
    (
        "depth_divisor: 4",
        "depth_divisor: ^0",
        "Wan.video_scale.depth_divisor",
        "got 0, expected .* of 1 or more",
    ),
    (
        "use_rearrange: true",
        "use_rearrange: ^yes",
        f"{B}.use_rearrange",
        'got "yes", expected true or false, did you mean true?',
    ),
    (
        "use_rearrange: true",
        'use_rearrange: ^"off"',
        f"{B}.use_rearrange",
        'got "off", expected true or false, did you mean false?',
    ),
    ("use_rearrange: true", "use_rearrange: ^1", f"{B}.use_rearrange", "got 1, expected true or false"),
    (
        "warmup_steps: 12",
        "dense_layers: ^3",
        f"{B}.dense_layers",
        "got 3, expected a list, each item a whole number of 0 or more",
    ),
    (
        "warmup_steps: 12",
        "dense_layers: [1, ^-1]",
        f"{B}.dense_layers[1]",
        "got -1, expected a whole number of .*",
    ),
    (
        "warmup_steps: 12",
        "samples: {q:^}",
        f"{B}.samples.q",
        "got nothing, expected a whole number of 1 or more",
    ),
    ("warmup_steps: 12", "samples: {q: ^0}", f"{B}.samples.q", "got 0, expected a whole number of 1 or more"),
    ("warmup_steps: 12", "seed: ^-3", f"{B}.seed", "got -3, expected a whole number of 0 or more"),
    ("warmup_steps: 12", "warmup_steps: ^10.0", f"{B}.warmup_steps", "got 10.0, expected a whole number of 0 or more"),
    (
        "warmup_steps: 12",
        "seed: ^99999999999999999999999",
        f"{B}.seed",
        "got 9{23}, expected a whole number of 0 or more and at most 9{18}",
    ),
    ("warmup_steps: 12", "samples: {q: ^1" + "0" * 100 + "}", f"{B}.samples.q", "got 10+…, expected .* at most 9{18}"),
    ("warmup_steps: 12", "seed: ^-1" + "0" * 20, f"{B}.seed", "got -10{20}, expected a whole number of 0 or more"),
    ("warmup_steps: 12", "min_full: ^1" + "0" * 400, f"{B}.min_full", "got 10+…, expected a number from 0 to 1"),
    ("warmup_steps: 12", "seed: ^1" + "0" * 9000, f"{B}.seed", 'got "10+…", expected a whole number of 0 or more'),
    (
        "warmup_steps: 12",
        "min_full: ^6",
        f"{B}.min_full",
        "got 6, expected .* from 0 to 1, did you mean 0.06?",
    ),
    ("warmup_steps: 12", "min_full: ^.inf", f"{B}.min_full", "got inf, expected a number from 0 to 1"),
    (
        "warmup_steps: 12",
        "min_full_attn_ratio: ^x",
        f"{B}.min_full_attn_ratio",
        'got "x", expected a number .*',
    ),
    (
        "warmup_steps: 12",
        "sim_thresholds: {x2: ^70}",
        f"{B}.sim_thresholds.x2",
        "got 70, expected a number from -1 to 1, did you mean 0.7?",
    ),
    (
        "warmup_steps: 12",
        "sim_thresholds: ^[0.7, 0.6, 0.5]",
        f"{B}.sim_thresholds",
        "got a list of 3, expected a mapping",
    ),
    # Ranges
    ("1: [0.0, 0.4]", "1: ^0.4", f"{R}.1", "got 0.4, expected a list of 2, each a number from 0 to 1"),
    ("1: [0.0, 0.4]", "1:^", f"{R}.1", "got nothing, expected a list of 2, each a number from 0 to 1"),
    (
        "1: [0.0, 0.4]",
        "1: [0.0, ^40]",
        f"{R}.1[1]",
        "got 40, expected a number from 0 to 1, did you mean 0.4?",
    ),
    ("1: [0.0, 0.4]", "1: [^-0.1, 0.4]", f"{R}.1[0]", "got -0.1, expected a number from 0 to 1"),
    ("1: [0.0, 0.4]", "1: [0.0, ^.nan]", f"{R}.1[1]", "got nan, expected a number from 0 to 1"),
    ("1: [0.0, 0.4]", "1: [0.0, ^40%]", f"{R}.1[1]", 'got "40%", expected a number from 0 to 1'),
    ("1: [0.0, 0.4]", "1: [0.0, ^false]", f"{R}.1[1]", "got false, expected a number from 0 to 1"),
    ("1: [0.0, 0.4]", "1: ^[0.0, 0.2, 0.4]", f"{R}.1", "got a list of 3, expected a list of 2, .*"),
    ("1: [0.0, 0.4]", "1: [^0.1, 0.4]", f"{R}.1[0]", "0.1 leaves a gap after 0.0, expected 0.0"),
    ("2: [0.4, 0.5]", "2: [^0.45, 0.5]", f"{R}.2[0]", "0.45 leaves a gap after 0.4, expected 0.4"),
    ("2: [0.4, 0.5]", "2: [^0.3, 0.5]", f"{R}.2[0]", "0.3 overlaps what ends at 0.4, expected 0.4"),
    ("2: [0.4, 0.5]", "2: ^[0.5, 0.4]", f"{R}.2", "runs backwards from 0.5 to 0.4, expected \\[0.4, 0.5\\]"),
    ("0: [0.8, 1.0]", "0: [0.8, ^0.9]", f"{R}.0[1]", "got 0.9, expected the skipped range to end at 1.0"),
    (
        "warmup_steps: 12",
        "samples: {q: ^129}",
        f"{B}.samples.q",
        "got 129, expected .* block_size.m, which is 128",
    ),
    (
        "warmup_steps: 12",
        "samples: {kv: ^65}",
        f"{B}.samples.kv",
        "got 65, expected .* block_size.n, which is 64",
    ),
    (
        "warmup_steps: 12",
        "importance_method: ^antidiagonals",
        f"{B}.importance_method",
        'got "antidiagonals", expected "sampled" or "antidiagonal".*',
    ),
    (
        "warmup_steps: 12",
        "importance_method: antidiagonal\n      samples: {q: 16, kv: ^7}",
        f"{B}.samples.kv",
        "got 7, expected a divisor of block_size.n, which is 64, for antidiagonals",
    ),
    (
        "warmup_steps: 12",
        "importance_method: antidiagonal\n      samples: {q: 16, kv: ^16}",
        f"{B}.samples.kv",
        "16 makes groups of 4 tokens, expected 8 as samples.q does, for antidiagonals",
    ),
    (
        "warmup_steps: 12",
        "importance_method: antidiagonal\n      samples: {q: ^1}",
        f"{B}.samples.q",
        "1 makes groups of 128 tokens, expected 4 as samples.kv does, for antidiagonals",
    ),
    (
        "warmup_steps: 12",
        "importance_method: antidiagonal\n      importance_reduction: ^error",
        f"{B}.importance_reduction",
        'got "error", expected "max" or "mean" with importance_method antidiagonal',
    ),
    ("warmup_steps: 12", "density: ^15", f"{B}.density", "got 15, expected a number from 0 to 1, did you mean 0.15?"),
    (
        "warmup_steps: 12",
        "density: ^0.15",
        f"{B}.density",
        "given with mask_mode thresholdbound, expected it with budget alone",
    ),
]


@pytest.mark.parametrize(("old", "new", "path", "message"), MISTAKES, ids=[mistake[1][:40] for mistake in MISTAKES])
def test_one_mistake(problems: Problems, form: str, old: str, new: str, path: str, message: str) -> None:
    marked = form.replace(old, new, 1)
    before = marked[: marked.index("^")].split("\n")
    (problem,) = [problem for problem in problems(marked.replace("^", "")) if problem.path == path]
    assert (problem.line, problem.column) == (len(before), len(before[-1]) + 1)
    assert re.fullmatch(message.replace("?", "\\?"), problem.message), problem.message


def as_budget(form: str, settings: str) -> str:
    """The form with a budget in place of the ranges, and further settings."""
    start, end = form.index("      mask_ratios:"), form.index("      warmup_steps")
    return f"{form[:start]}      mask_mode: budget\n      {settings}\n{form[end:]}"


@pytest.mark.parametrize(
    ("settings", "key", "message"),
    [
        ("skip: mean", "density", "missing, expected a number from 0 to 1 with mask_mode budget"),
        ("density: ^0", "density", "got 0.0, expected more than 0"),
        (
            "density: ^0.0156\n      skip: mean",
            "density",
            "got 0.0156, expected more than 0.015625, what the means of all blocks cost",
        ),
        (
            "density: 0.1\n      mask_ratios: ^{1: [0, 0.1]}",
            "mask_ratios",
            "given with mask_mode budget, expected density alone",
        ),
        (
            "density: 0.1\n      use_sim_mask: ^true",
            "use_sim_mask",
            "got true, expected false with mask_mode budget, which the finer levels would exceed",
        ),
        ("density: 0.1\n      budget_per: ^heads", "budget_per", 'got "heads", expected "head" or "layer", .*'),
    ],
)
def test_a_budget_that_cannot_be(problems: Problems, form: str, settings: str, key: str, message: str) -> None:
    marked = as_budget(form, settings)
    (problem,) = problems(marked.replace("^", ""))
    assert problem.path == f"{B}.{key}"
    assert re.fullmatch(message, problem.message), problem.message
    if "^" in marked:
        before = marked[: marked.index("^")].split("\n")
        assert (problem.line, problem.column) == (len(before), len(before[-1]) + 1)
    else:  # what is missing stands at its parent
        assert form.split("\n")[(problem.line or 0) - 1] == "    balanced:"


def test_ranges_are_missed_where_there_is_no_budget(problems: Problems, form: str) -> None:
    (problem,) = problems(as_budget(form, "").replace("mask_mode: budget", "mask_mode: topk"))
    assert problem.path == R
    assert problem.message == "missing, expected a mapping with mask_mode topk"


def test_all_mistakes_of_a_file_at_once(problems: Problems, form: str) -> None:
    text = form.replace("text_length: 226", "text_length: -1").replace("type: dense", "type: dens")
    text = text.replace("m: 128", "m: 100").replace("2: [0.4", "2: [0.45").replace(": balanced", ": balance", 1)
    text = text.replace("tile_n: 32", "tile_n: 32\n        n: 64")
    found = problems(text)
    assert [problem.path.removeprefix("Wan.attention_configs.") for problem in found] == [
        "Wan.default_attention",
        "Wan.text_length",
        "balanced.block_size.m",
        "balanced.block_size.n",
        "balanced.mask_ratios.2[0]",
        "baseline.type",
    ]
    assert [problem.line for problem in found] == sorted(problem.line or 0 for problem in found)


@pytest.mark.parametrize("ratios", ["{}", "{0: [0, 1]}", "{1: [0, 0], 0: [0, 1]}"])
def test_nothing_kept(problems: Problems, form: str, ratios: str) -> None:
    start, end = form.index("mask_ratios:"), form.index("      mask_mode")
    text = f"{form[:start]}mask_ratios: {ratios}\n{form[end:]}"
    (problem,) = problems(text)
    assert (problem.line, problem.path) == (17, R)
    assert problem.message.startswith("every range above 0 is empty")


def test_no_presets(problems: Problems) -> None:
    scale = "{width_divisor: 1, height_divisor: 1, depth_divisor: 1}"
    text = f"W: {{default_attention: a, text_length: 0, video_scale: {scale}, attention_configs: {{}}}}"
    (problem,) = problems(text)
    assert problem.column == text.index("{}") + 1
    assert problem.message == "got an empty mapping, expected a mapping that is not empty"


def test_a_mistake_behind_an_alias_is_named_once_where_it_stands(problems: Problems, form: str) -> None:
    text = form.replace("    balanced:", "    balanced: &b").replace("warmup_steps: 12", "warmup_steps: x")
    text += "    tail:\n      <<: *b\n      skip: mean\n"
    (problem,) = problems(text)
    line = text[: text.index("warmup_steps")].count("\n") + 1
    assert (problem.line, problem.column, problem.path) == (line, 21, f"{B}.warmup_steps")


def test_a_wrong_key_hides_no_broken_rule(problems: Problems, form: str) -> None:
    form = form.replace("thresholdbound", "budget\n      use_sim_mask: true\n      density: 0.1")
    form = form.replace("warmup_steps: 12", "warmup_step: 12\n      samples: {q: 500}")
    assert [(problem.path, problem.message.partition(",")[0]) for problem in problems(form)] == [
        (f"{B}.mask_ratios", "given with mask_mode budget"),
        (f"{B}.use_sim_mask", "got true"),
        (f"{B}.warmup_step", "unknown key"),
        (f"{B}.samples.q", "got 500"),
    ]
    # What is wrong itself is not missing as well.
    (problem,) = problems(form[: form.index("      mask_ratios")] + "      mask_ratios: 5\n      mask_mode: topk\n")
    assert problem.message == "got 5, expected a mapping"


def test_missing_keys_of_one_parent_are_each_named(problems: Problems, form: str) -> None:
    found = problems(form.replace("    width_divisor: 16\n    height_divisor: 16\n", ""))
    assert [(problem.line, problem.path) for problem in found] == [
        (3, "Wan.video_scale.width_divisor"),
        (3, "Wan.video_scale.height_divisor"),
    ]


def test_the_text_of_an_error(load: Callable[[str], PresetBook], form: str) -> None:
    with pytest.raises(PresetError) as caught:
        load(form.replace("n: 64", "n: 65").replace("type: dense", "type: sparse"))
    error = caught.value
    file = error.errors[0].file
    assert file.endswith("attention_config.yaml")
    assert str(error).splitlines() == [
        f"{file}:15:12: {B}.block_size.n: got 65, expected 32, 64 or 128",
        f'{file}:26:13: Wan.attention_configs.baseline.type: got "sparse", expected "dense" or "psa"',
    ]
    assert isinstance(error, ValueError)
    assert pickle.loads(pickle.dumps(error)).errors == error.errors


def test_odd_names_stay_on_one_line(problems: Problems) -> None:
    (problem,) = problems(f'"a\\n\\e{"b" * 100}": 3')
    assert problem.path.startswith("a\\n\\x1bbbb")
    assert len(problem.path) < 70
