"""YAML text to values that remember where they stood.

Built on the events of PyYAML's parser, with scalars as in the core schema of YAML 1.2: only `true` and
`false` are booleans (`yes`, `on` and `no` are text), and `1e-3` is a number. A mapping key is always text, so
`1:` and `"1":` are one key. Anchors, aliases and merge keys (`<<`) work. Refused: tags, second documents, and
whatever nests deeper or unfolds to more values than a preset file can need.
"""

import re
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

import yaml

from .errors import Path, PresetError, Problem, path_text, place_after, quote

MAX_DEPTH = 16
MAX_VALUES = 100_000

_LONGEST_INT = 4000  # signs; int() refuses to read a few hundred more
_INT = re.compile(r"[-+]?[0-9]+")
_FLOAT = re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?")
_SURROGATE = re.compile("[\ud800-\udfff]")
_PAIR = re.compile("[\ud800-\udbff][\udc00-\udfff]")
_INFINITY = re.compile(r"[-+]?\.(?:inf|Inf|INF)")
_WORDS = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL"), None),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
    **dict.fromkeys((".nan", ".NaN", ".NAN"), float("nan")),
}

Scalar = str | int | float | bool | None


class Position(NamedTuple):
    """Line and column, both counted from 1."""

    line: int
    column: int


class Entry(NamedTuple):
    """A mapping's value, and where its key stands."""

    key: Position
    node: "Node"


@dataclass(frozen=True, slots=True, eq=False)
class Node:
    """A value and where it starts.

    `depth` and `size` count the levels of nesting and the values below this one, aliases unfolded.
    """

    position: Position
    value: Scalar | tuple["Node", ...] | dict[str, Entry]
    depth: int = 0
    size: int = 1

    def plain(self) -> object:
        """The value without positions: lists become tuples."""
        if isinstance(self.value, tuple):
            return tuple(item.plain() for item in self.value)
        if isinstance(self.value, dict):
            return {key: entry.node.plain() for key, entry in self.value.items()}
        return self.value


def parse(text: str, file: str) -> tuple[Node | None, list[Problem]]:
    """The one document of a YAML text, or None where it holds none, and the problems that reading survives.

    Raises:
        PresetError: where reading cannot go on, with the problems found up to there.
    """
    try:
        loader: Any = yaml.SafeLoader(text)
    except yaml.reader.ReaderError as error:
        what = f"the character {quote(text[error.position])} is not allowed in YAML"
        raise PresetError([Problem(file, *place_after(text[: error.position]), "", what)]) from error
    builder = _Builder(loader, file)
    try:
        return builder.document(), builder.problems
    except PresetError:
        raise
    except yaml.MarkedYAMLError as error:
        what = ": ".join(part for part in (error.context, error.problem) if part)
        mark = error.problem_mark or error.context_mark or loader.get_mark()
        builder.stop(_position(mark), (), f"not valid YAML: {what}")
    except (ValueError, OverflowError):
        # PyYAML converts escapes and version numbers unchecked: "\\UFFFFFFFF" reaches chr() as it is.
        builder.stop(_position(loader.get_mark()), (), "not valid YAML: a number out of range")


class _Builder:
    def __init__(self, loader: Any, file: str) -> None:
        self.file = file
        self.problems: list[Problem] = []
        self._next = loader.get_event
        self._anchors: dict[str, Node] = {}
        self._values = 0

    def document(self) -> Node | None:
        self._next()
        if isinstance(self._next(), yaml.StreamEndEvent):
            return None
        node = self._node(self._next(), (), 0)
        self._next()
        end = self._next()
        if not isinstance(end, yaml.StreamEndEvent):
            self.stop(_position(end.start_mark), (), "a second document starts here, expected one")
        return node

    def stop(self, position: Position, path: Path, message: str) -> NoReturn:
        self._note(position, path, message)
        raise PresetError(self.problems)

    def _note(self, position: Position, path: Path, message: str) -> None:
        self.problems.append(Problem(self.file, *position, path_text(path), message))

    def _node(self, event: Any, path: Path, depth: int) -> Node:
        position = _position(event.start_mark)
        if isinstance(event, yaml.AliasEvent):
            return self._alias(str(event.anchor), position, path, depth)
        self._spend(1, depth, position, path)
        if event.tag is not None:
            what = f"the tag {quote(event.tag)} is not supported, expected a value without one"
            self._note(position, path, what)
        if isinstance(event, yaml.ScalarEvent):
            text = _joined(event.value)
            if _SURROGATE.search(text):
                self.stop(position, path, "half of a surrogate pair, expected whole characters")
            node = Node(position, resolve(text) if event.implicit[0] else text)
        elif isinstance(event, yaml.SequenceStartEvent):
            node = self._sequence(position, path, depth)
        else:
            node = self._mapping(position, path, depth)
        if event.anchor is not None:
            self._anchors[event.anchor] = node
        return node

    def _alias(self, name: str, position: Position, path: Path, depth: int) -> Node:
        # An anchor is known only once its value is complete, so no value can hold itself.
        node = self._anchors.get(name)
        if node is None:
            self.stop(position, path, f"unknown alias {quote('*' + name)}, expected an anchor above it")
        self._spend(node.size, depth + node.depth, position, path)
        return node

    def _spend(self, values: int, depth: int, position: Position, path: Path) -> None:
        self._values += values
        if self._values > MAX_VALUES:
            self.stop(position, path, f"the file unfolds to more than {MAX_VALUES} values, expected fewer")
        if depth > MAX_DEPTH:
            self.stop(position, path, f"nested deeper than {MAX_DEPTH} levels, expected fewer")

    def _sequence(self, position: Position, path: Path, depth: int) -> Node:
        items: list[Node] = []
        while not isinstance(event := self._next(), yaml.SequenceEndEvent):
            items.append(self._node(event, (*path, len(items)), depth + 1))
        return _collection(position, tuple(items), items)

    def _mapping(self, position: Position, path: Path, depth: int) -> Node:
        entries: dict[str, Entry] = {}
        merge: Entry | None = None
        while not isinstance(event := self._next(), yaml.MappingEndEvent):
            at = _position(event.start_mark)
            key = self._key(event, at, path)
            entry = Entry(at, self._node(self._next(), (*path, key), depth + 1))
            is_merge = key == "<<"
            earlier = merge if is_merge else entries.get(key)
            if earlier is not None:
                where = f"first given at line {earlier.key.line}, column {earlier.key.column}"
                self._note(at, (*path, key), f"duplicate key, {where}, expected once")
            elif is_merge:
                merge = entry
            else:
                entries[key] = entry
        if merge is not None:
            self._merge(entries, merge.node, (*path, "<<"))
        return _collection(position, entries, [entry.node for entry in entries.values()])

    def _key(self, event: Any, position: Position, path: Path) -> str:
        if not isinstance(event, yaml.ScalarEvent) or event.tag is not None or event.anchor is not None:
            self.stop(position, path, "a key that is not plain text, expected a name")
        text = _joined(event.value)
        if not text or _SURROGATE.search(text):
            self.stop(position, path, "a key without a readable name, expected one")
        return text

    def _merge(self, entries: dict[str, Entry], source: Node, path: Path) -> None:
        for node in source.value if isinstance(source.value, tuple) else (source,):
            if isinstance(node.value, dict):
                for key, entry in node.value.items():
                    entries.setdefault(key, entry)
            else:
                self._note(node.position, path, "not a mapping, expected an alias of one")


def _collection(position: Position, value: tuple[Node, ...] | dict[str, Entry], below: list[Node]) -> Node:
    depth = 1 + max((node.depth for node in below), default=0)
    return Node(position, value, depth, 1 + sum(node.size for node in below))


def _joined(text: str) -> str:
    """The text with each surrogate pair as the character it stands for, as JSON escapes characters beyond 16 bits."""
    return _PAIR.sub(lambda pair: pair[0].encode("utf-16", "surrogatepass").decode("utf-16"), text)


def _position(mark: Any) -> Position:
    return Position(mark.line + 1, mark.column + 1)


def resolve(text: str) -> Scalar:
    """What an unquoted scalar stands for."""
    if text in _WORDS:
        return _WORDS[text]
    if _INT.fullmatch(text):
        return int(text) if len(text) <= _LONGEST_INT else text
    if _FLOAT.fullmatch(text):
        return float(text)
    if _INFINITY.fullmatch(text):
        return float(text.replace(".", ""))
    return text
