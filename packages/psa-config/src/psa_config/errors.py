"""The one exception of this package, and the words its messages are made of."""

import difflib
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

Path = tuple[str | int, ...]
"""Keys and list indices from the top of a file down to one value."""

LINE_BREAK = re.compile("\r\n|[\n\r\x85\u2028\u2029]")
"""What ends a line in YAML."""

_LONGEST_QUOTE = 60
_LONGEST_LINE = 110


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a preset file; lines and columns count from 1.

    `line` and `column` are None where no place in the text is meant: a file that cannot be read, or a name
    asked of a `PresetBook` that it does not hold.
    """

    file: str
    line: int | None
    column: int | None
    path: str
    message: str

    def __str__(self) -> str:
        place = self.file if self.line is None else f"{self.file}:{self.line}:{self.column}"
        return f"{place}: {self.path}: {self.message}" if self.path else f"{place}: {self.message}"


class PresetError(ValueError):
    """A preset file, or a name looked up in one, is wrong.

    `errors` holds every problem found, in the order of the file; `str()` gives one line for each.
    """

    errors: tuple[Problem, ...]

    def __init__(self, errors: Iterable[Problem]) -> None:
        self.errors = tuple(sorted(errors, key=lambda problem: (problem.line or 0, problem.column or 0)))
        super().__init__("\n".join(map(str, self.errors)))

    def __reduce__(self) -> tuple[type["PresetError"], tuple[tuple[Problem, ...]]]:
        return type(self), (self.errors,)


def excerpt(problem: Problem, text: str) -> str:
    """The line that a problem stands in and a caret below its column; empty where it stands in no line of the text.

    Args:
        problem: of the file that the text is.
        text: without a byte order mark. Of a long line only the part around the column is shown.
    """
    lines = LINE_BREAK.split(text)
    if problem.line is None or problem.column is None or problem.line > len(lines):
        return ""
    line, column = lines[problem.line - 1], problem.column - 1
    cut = max(0, column - _LONGEST_LINE // 2) if len(line) > _LONGEST_LINE else 0
    shown = "".join(c if c.isprintable() else " " for c in line[cut : cut + _LONGEST_LINE])
    before = shown[: column - cut]
    # A terminal gives the signs of some scripts two columns, and accents none of their own.
    width = sum(2 if unicodedata.east_asian_width(c) in "WF" else int(not unicodedata.combining(c)) for c in before)
    number = str(problem.line)
    return f"{number} | {shown}\n{' ' * len(number)} | {' ' * width}^"


def quote(text: str) -> str:
    """The text between double quotes: on one line, printable and cut short."""
    shown = text if len(text) <= _LONGEST_QUOTE else text[: _LONGEST_QUOTE - 1] + "…"
    return f'"{printable(shown)}"'


def printable(text: str) -> str:
    """The text with escapes in place of what would move a terminal's cursor or turn its writing around."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def place_after(text: str) -> tuple[int, int]:
    """Line and column, counted from 1, of what follows the text."""
    lines = LINE_BREAK.split(text)
    return len(lines), len(lines[-1]) + 1


def path_text(path: Path) -> str:
    """`("a", "b", 0)` as `a.b[0]`."""
    text = ""
    for step in path:
        if isinstance(step, int):
            text += f"[{step}]"
        else:
            text += ("." if text else "") + quote(step)[1:-1]
    return text


def any_of(choices: Sequence[str], last: str = "or") -> str:
    """The choices as `a, b or c`, or with another word before the last one."""
    return choices[0] if len(choices) == 1 else f"{', '.join(choices[:-1])} {last} {choices[-1]}"


def closest(word: str, known: Iterable[str]) -> str | None:
    """The known word most like this one, or None; case, `-` and `_` do not count."""
    folded = {_fold(name): name for name in known}
    matches = difflib.get_close_matches(_fold(word), folded, n=1)
    return folded[matches[0]] if matches else None


def unknown(word: str, known: Sequence[str]) -> str:
    """`expected "a" or "b"`, with `, did you mean "a"?` where one is close to the word."""
    guess = closest(word, known)
    hint = f", did you mean {quote(guess)}?" if guess is not None else ""
    return f"expected {any_of([quote(name) for name in known])}{hint}"


def _fold(word: str) -> str:
    return word.casefold().replace("-", "_")
