"""Plain values to the text of a preset file, with comments."""

import re
import textwrap
from collections.abc import Iterator, Mapping

from .errors import Path
from .positions import resolve

_WIDTH = 110
_PLAIN = re.compile(r"[A-Za-z_][\w.-]*", re.ASCII)
_PLAIN_KEY = re.compile(r"\w[\w.-]*", re.ASCII)


def write(values: Mapping[str, object], comments: Mapping[Path, str]) -> str:
    """The values as YAML that reads back as the same values, each comment above the key at its path.

    Args:
        values: mappings with text keys, lists or tuples, text, numbers and booleans.
        comments: by path from the top.
    """
    return "\n".join(_mapping(values, comments, (), "")) + "\n"


def comment(text: str, indent: str = "") -> Iterator[str]:
    """The text as lines of comment."""
    yield from textwrap.wrap(text, _WIDTH, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ")


def _mapping(values: Mapping[str, object], comments: Mapping[Path, str], path: Path, indent: str) -> Iterator[str]:
    for key, value in values.items():
        below = (*path, key)
        if below in comments:
            yield from comment(comments[below], indent)
        if isinstance(value, Mapping) and not _fits_a_line(value, comments, below):
            yield f"{indent}{_key(key)}:"
            yield from _mapping(value, comments, below, f"{indent}  ")
        else:
            yield f"{indent}{_key(key)}: {one_line(value)}"


def _fits_a_line(values: Mapping[str, object], comments: Mapping[Path, str], path: Path) -> bool:
    noted = any(place[: len(path)] == path and len(place) > len(path) for place in comments)
    return not noted and not any(isinstance(value, Mapping | list | tuple) for value in values.values())


def one_line(value: object) -> str:
    """A value as YAML on one line."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_key(key)}: {one_line(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(one_line, value)) + "]"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    text = str(value)
    return text if _PLAIN.fullmatch(text) and resolve(text) == text else _quoted(text)


def _key(key: str) -> str:
    return key if _PLAIN_KEY.fullmatch(key) else _quoted(key)


def _quoted(text: str) -> str:
    return '"' + "".join(map(_escaped, text)) + '"'


def _escaped(sign: str) -> str:
    if sign in '"\\':
        return f"\\{sign}"
    if sign.isprintable():
        return sign
    return f"\\U{ord(sign):08x}"
