"""What YAML itself gets wrong, or may not do here."""

from collections.abc import Callable

import pytest

from psa_config import Problem

Problems = Callable[[str | bytes], tuple[Problem, ...]]

# A text; line, column and path of one of its errors; how that message begins.
BROKEN = [
    ("", 1, 1, "", "the file is empty, expected a mapping of models"),
    ("# nothing\n", 1, 1, "", "the file is empty"),
    ("---\n", 1, 1, "", "the file is empty"),
    ("{}", 1, 1, "", "got an empty mapping, expected a mapping that is not empty"),
    ("- Wan", 1, 1, "", "got a list of 1, expected a mapping"),
    ("Wan", 1, 1, "", 'got "Wan", expected a mapping'),
    ("Wan: 3", 1, 6, "Wan", "got 3, expected a mapping"),
    ("Wan:", 1, 5, "Wan", "got nothing, expected a mapping"),
    ("Wan: [", 1, 7, "", "not valid YAML: while parsing a flow node"),
    ("Wan:\n  a: 1\n b: 2", 3, 2, "", "not valid YAML"),
    ("Wan:\n\ta: 1", 2, 1, "", "not valid YAML: while scanning for the next token: found character '\\t'"),
    ("Wan: 'x", 1, 8, "", "not valid YAML: while scanning a quoted scalar"),
    ("Wan: \x00", 1, 6, "", 'the character "\\x00" is not allowed in YAML'),
    ('Wan: "\\UFFFFFFFF"', 1, 9, "", "not valid YAML: a number out of range"),
    ("%YAML 1." + "9" * 5000 + "\n---\nWan: 1", 1, 9, "", "not valid YAML: a number out of range"),
    ("Wan: 1\n---\nWan: 2", 2, 1, "", "a second document starts here, expected one"),
    (
        "Wan: {a: 1}\nWan: {b: 1}",
        2,
        1,
        "Wan",
        "duplicate key, first given at line 1, column 1, expected once",
    ),
    ('{Wan: {1: 0, "1": 0}}', 1, 14, "Wan.1", "duplicate key, first given at line 1, column 8"),
    ("Wan: {<<: {}, <<: {}}", 1, 15, "Wan.<<", "duplicate key"),
    ("Wan: {<<: 3}", 1, 11, "Wan.<<", "not a mapping, expected an alias of one"),
    ("Wan: {<<: [{}, 3]}", 1, 16, "Wan.<<", "not a mapping"),
    ("Wan: *other", 1, 6, "Wan", 'unknown alias "*other", expected an anchor above it'),
    ("Wan: &a {x: *a}", 1, 13, "Wan.x", 'unknown alias "*a"'),
    (
        "Wan: !!python/object:os.system {}",
        1,
        6,
        "Wan",
        'the tag "tag:yaml.org,2002:python/object:os.system" is not',
    ),
    ("Wan: !!str 3", 1, 6, "Wan", 'the tag "tag:yaml.org,2002:str" is not supported'),
    ("[Wan]: 3", 1, 1, "", "a key that is not plain text, expected a name"),
    ("&a Wan: 3", 1, 1, "", "a key that is not plain text"),
    ("? \n: 3", 1, 2, "", "a key without a readable name"),
    ('"\\uD800": 3', 1, 1, "", "a key without a readable name"),
    ('Wan: "\\uD800"', 1, 6, "Wan", "half of a surrogate pair"),
    ("Wan: " + "9" * 5000, 1, 6, "Wan", 'got "99999'),
    ("Wan: 0x10", 1, 6, "Wan", 'got "0x10", expected a mapping'),
    ("Wan: 1_000", 1, 6, "Wan", 'got "1_000", expected a mapping'),
    ("Wan: 12:30:00", 1, 6, "Wan", 'got "12:30:00", expected a mapping'),
    ("Wan: 2020-01-01", 1, 6, "Wan", 'got "2020-01-01", expected a mapping'),
    ("Wan: on", 1, 6, "Wan", 'got "on", expected a mapping'),
    (b"Wan: 1\n# \xc3\xbc\xff", 2, 4, "", "byte 0xff is not UTF-8, expected a file in UTF-8"),
    (b"Wan: 1\r# \xc3\xbc\xff", 2, 4, "", "byte 0xff is not UTF-8"),
    (b"Wan: 1\xc2\x85# \xff", 2, 3, "", "byte 0xff is not UTF-8"),
    ("Wan: 1\r\u2028# \x07", 3, 3, "", 'the character "\\x07" is not allowed'),
    ("Wan: 1".encode("utf-16"), 1, 1, "", "byte 0xff is not UTF-8"),
    ("[" * 100_000, 1, 18, "[0]" * 17, "nested deeper than 16 levels, expected fewer"),
    ("- " * 100_000, 1, 35, "[0]" * 17, "nested deeper than 16 levels"),
    ("{a: " * 100_000, 1, 69, "a" + ".a" * 16, "nested deeper than 16 levels"),
]


@pytest.mark.parametrize(
    ("text", "line", "column", "path", "message"), BROKEN, ids=[str(row[0])[:24] for row in BROKEN]
)
def test_broken_yaml(problems: Problems, text: str | bytes, line: int, column: int, path: str, message: str) -> None:
    (problem,) = [problem for problem in problems(text) if problem.message.startswith(message)]
    assert (problem.line, problem.column, problem.path) == (line, column, path)


def test_aliases_cannot_unfold_without_end(problems: Problems) -> None:
    lines = ["a0: &a0 {x: 1}"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    (problem,) = problems("\n".join(lines))
    assert problem.message == "the file unfolds to more than 100000 values, expected fewer"


def test_merges_cannot_unfold_without_end(problems: Problems) -> None:
    wide = ", ".join(f"k{i}: 1" for i in range(1000))
    lines = [f"a: &a {{{wide}}}", *(f"b{i}: {{<<: *a}}" for i in range(1000))]
    (problem,) = problems("\n".join(lines))
    assert problem.message == "the file unfolds to more than 100000 values, expected fewer"


def test_aliases_cannot_nest_without_end(problems: Problems) -> None:
    lines = ["a0: &a0 []", *(f"a{i}: &a{i} [*a{i - 1}]" for i in range(1, 40))]
    (problem,) = problems("\n".join(lines))
    assert problem.message == "nested deeper than 16 levels, expected fewer"


def test_duplicates_do_not_hide_what_else_is_wrong(problems: Problems, form: str) -> None:
    found = problems(form.replace("text_length: 226", "text_length: x\n  text_length: 226"))
    assert [(problem.line, problem.message.split(",")[0]) for problem in found] == [
        (7, 'got "x"'),
        (8, "duplicate key"),
    ]
