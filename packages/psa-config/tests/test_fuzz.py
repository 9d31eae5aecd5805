"""Whatever a file holds, reading it gives presets or a PresetError that says where.

PSA_FUZZ_EXAMPLES is the number of files each test tries, instead of its own few hundred:

    PSA_FUZZ_EXAMPLES=10000 pytest packages/psa-config/tests/test_fuzz.py --timeout 0
"""

import os
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from psa_config import PresetBook, PresetError
from psa_config.models import json_schema
from psa_config.writing import write

SCHEMA = json_schema()


def tries(few: int) -> settings:
    return settings(
        max_examples=int(os.environ.get("PSA_FUZZ_EXAMPLES", few)),
        deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )


FRAGMENTS = [
    *"[]{}:,-?#&*!|>%@`'\"\\\n\t \x00\x85\u2028\ufeff😀",
    *[
        "&a ",
        "*a",
        "<<: *a",
        "<<: ",
        "? ",
        "- ",
        "---\n",
        "...\n",
        "!!python/name:os ",
        "!<x> ",
        "%YAML 1.2\n",
        "~",
    ],
    *[
        "%TAG ! a\n",
        '"\\UFFFFFFFF"',
        '"\\uDFFF"',
        "null",
        "true",
        "yes",
        ".nan",
        "-.inf",
        "1e999",
        "0",
        "1.0",
        "-1",
    ],
    *[
        "psa",
        "dense",
        "type: dense\n",
        "mask_ratios: ",
        "samples: ",
        "[0, 1]",
        "{1: [0, 1]}",
        "9" * 5000,
        "=",
        "0o7",
    ],
]


@st.composite
def mutated(draw: st.DrawFn, *, text: str) -> bytes:
    """The text with a few cuts, copies and foreign fragments, and perhaps a byte that is not text."""
    for _ in range(draw(st.integers(1, 6))):
        start = draw(st.integers(0, len(text)))
        stop = draw(st.integers(start, min(len(text), start + 40)))
        piece = draw(st.sampled_from([*FRAGMENTS, text[start:stop] * 2]) | st.text(max_size=4))
        text = text[:start] + piece + text[stop:]
    data = text.encode(errors="replace")
    if draw(st.integers(0, 19)) == 0:
        data = data[: len(data) // 2] + b"\xff" + data[len(data) // 2 :]
    return data


def outcome(load: Callable[[bytes], PresetBook], text: bytes) -> PresetBook | PresetError:
    try:
        return load(text)
    except PresetError as error:
        return error


def assert_says_where(error: PresetError, text: bytes) -> None:
    lines = len(text.decode(errors="replace").splitlines()) + 1
    assert error.errors
    for problem in error.errors:
        assert problem.line is not None
        assert problem.column is not None
        assert 1 <= problem.line <= lines
        assert problem.column >= 1
        assert problem.message
        assert str(problem).isprintable()


@tries(400)
@given(data=st.data())
def test_mutated_text(load: Callable[[bytes], PresetBook], form: str, data: st.DataObject) -> None:
    short = "CogVideo_5b:\n" + form[form.index("  attention_configs") :]
    text = data.draw(st.sampled_from([form, short]).flatmap(lambda text: mutated(text=text)))
    assert_book_or_place(outcome(load, text), text)


def assert_book_or_place(result: PresetBook | PresetError, text: bytes) -> None:
    if isinstance(result, PresetError):
        assert_says_where(result, text)
    else:
        assert all(result.get(model, name).name == name for model in result.models for name in result.presets(model))
        assert all(result.get(model).name in result.presets(model) for model in result.models)


@tries(200)
@given(text=st.text(alphabet="[]{}:,-?&*!|>'\"\n ab<1~.", max_size=60))
def test_text_of_signs(load: Callable[[bytes], PresetBook], text: str) -> None:
    result = outcome(load, text.encode())
    assert isinstance(result, PresetError)
    assert_says_where(result, text.encode())


JUNK = st.sampled_from([-1, 0, 1, 1.5, 10**30, "", "psa", "mean", True, [], {}, [0.0, 0.5], {"1": [0.0, 1.0]}, "é: #"])


def ratios() -> st.SearchStrategy[dict[str, list[float]]]:
    """Ranges that follow one another, which independent draws hardly ever do."""
    ends = st.lists(st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.75, 1.0]), min_size=4, max_size=4).map(sorted)
    return ends.map(lambda e: dict(zip("1248", map(list, zip([0.0, *e], e, strict=False)), strict=True)))


def of_one_mode(values: dict[str, Any]) -> dict[str, Any]:
    """With what the mask mode needs and without what it refuses; nearly every draw breaks one of these rules."""
    budget = values["mask_mode"] == "budget"
    needed: dict[str, Any] = {"density": 0.2} if budget else {"mask_ratios": {"1": [0.0, 0.5]}}
    others = ("mask_ratios",) if budget else ("density", "budget_per")
    return {name: value for name, value in (needed | values).items() if name not in others}


def of_schema(schema: dict[str, Any]) -> st.SearchStrategy[Any]:
    """Values of a part of the schema, now and then another in its place."""
    if "$ref" in schema:
        name = schema["$ref"].removeprefix("#/$defs/")
        valid = of_schema(SCHEMA["$defs"][name])
        return ratios() | valid if name == "MaskRatios" else valid
    if "oneOf" in schema:
        return st.one_of(*map(of_schema, schema["oneOf"]))
    if "const" in schema or "enum" in schema:
        values: st.SearchStrategy[Any] = st.sampled_from(schema.get("enum") or [schema["const"]])
    else:
        values = by_type(schema)
    return st.integers(0, 24).flatmap(lambda n: JUNK if n == 24 else values)


def by_type(schema: dict[str, Any]) -> st.SearchStrategy[Any]:
    match schema["type"]:
        case "object" if "properties" in schema:
            parts = {name: of_schema(part) for name, part in schema["properties"].items()}
            required = set(schema.get("required", ()))
            made = st.fixed_dictionaries(
                {name: part for name, part in parts.items() if name in required},
                optional={name: part for name, part in parts.items() if name not in required},
            )
            return made.map(of_one_mode) | made if "mask_mode" in parts else made
        case "object":
            names = st.sampled_from(["a", "psa_balanced", "1.0", "<", "true", "日本"])
            return st.dictionaries(names, of_schema(schema["additionalProperties"]), min_size=1, max_size=3)
        case "array":
            items = of_schema(schema["prefixItems"][0] if "prefixItems" in schema else schema["items"])
            return st.lists(items, min_size=schema.get("minItems", 0), max_size=schema.get("maxItems", 4))
        case "integer":
            return st.integers(schema.get("minimum", -9), schema.get("maximum", 200))
        case "number":
            return st.floats(schema.get("minimum", -2.0), schema.get("maximum", 2.0))
        case "boolean":
            return st.booleans()
        case _:
            return st.text(max_size=5)


@st.composite
def files(draw: st.DrawFn) -> dict[str, Any]:
    """A file of the schema: one or two models, shipped ones among them."""
    names = draw(st.lists(st.sampled_from(["tiny-wan", "CogVideo_5b", "mine"]), min_size=1, max_size=2, unique=True))
    model = SCHEMA["properties"]["tiny-wan"]
    return {name: draw(of_schema(model)) for name in names}


@tries(80)
@given(values=files())
def test_files_of_the_schema(load: Callable[[bytes], PresetBook], values: dict[str, Any]) -> None:
    text = write(values, {}).encode()
    assert_book_or_place(outcome(load, text), text)


def test_the_schema_s_files_are_no_mere_errors(load: Callable[[bytes], PresetBook]) -> None:
    loaded = []

    @settings(max_examples=60, deadline=None, derandomize=True, database=None)
    @given(values=files())
    def count(values: dict[str, Any]) -> None:
        loaded.append(isinstance(outcome(load, write(values, {}).encode()), PresetBook))

    count()
    assert 3 < sum(loaded) < len(loaded)
