"""Whatever a file holds, reading it gives presets or a PresetError that says where."""

from collections.abc import Callable

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from psa_config import PresetBook, PresetError

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


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_mutated_text(load: Callable[[bytes], PresetBook], form: str, data: st.DataObject) -> None:
    short = "CogVideo_5b:\n" + form[form.index("  attention_configs") :]
    text = data.draw(st.sampled_from([form, short]).flatmap(lambda text: mutated(text=text)))
    result = outcome(load, text)
    if isinstance(result, PresetError):
        assert_says_where(result, text)
    else:
        assert all(result.get(model, name).name == name for model in result.models for name in result.presets(model))
        assert all(result.get(model).name in result.presets(model) for model in result.models)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(alphabet="[]{}:,-?&*!|>'\"\n ab<1~.", max_size=60))
def test_text_of_signs(load: Callable[[bytes], PresetBook], text: str) -> None:
    result = outcome(load, text.encode())
    assert isinstance(result, PresetError)
    assert_says_where(result, text.encode())
