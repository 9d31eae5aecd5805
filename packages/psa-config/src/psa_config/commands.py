"""The commands that need presets alone: `python -m psa_config` runs them, and so does `psa presets`."""

import argparse
import json
import sys
import textwrap
from pathlib import Path
from typing import Any

from .convert import convert
from .errors import PresetError, excerpt, printable
from .files import check_new_file, write_new
from .load import book_of, load_presets, read
from .models import json_schema
from .template import template


def add_commands(commands: Any) -> None:
    """Adds `list`, `check`, `schema`, `new` and `convert` to what `add_subparsers` returned.

    Each sets `run`, a function of the parsed options that returns the exit status; it raises PresetError or OSError
    where it cannot do what it was asked to.
    """
    listing = commands.add_parser("list", help="name the models and their presets")
    listing.add_argument("--presets", type=Path, metavar="FILE", help="of this file, instead of the shipped ones")
    listing.set_defaults(run=_list)

    check = commands.add_parser("check", help="print every error of a preset file, with the line it stands in")
    check.add_argument("file", type=Path, help="the YAML file")
    check.set_defaults(run=_check)

    schema = commands.add_parser("schema", help="print the JSON Schema of a preset file")
    schema.set_defaults(run=_schema)

    new = commands.add_parser("new", help="write a preset file to start from, every key explained")
    new.add_argument("file", type=Path, nargs="?", help="the file to make; left out: print it")
    new.add_argument("--model", default="Wan2.1_1.3b", help="a shipped model to start from (default: %(default)s)")
    new.set_defaults(run=_new)

    conversion = commands.add_parser(
        "convert",
        help="rewrite an attention_config.yaml of the reference project, noting what changed meaning",
    )
    conversion.add_argument("file", type=Path, help="the reference project's file")
    conversion.add_argument("--out", type=Path, metavar="FILE", help="the file to make; left out: print it")
    conversion.set_defaults(run=_convert)


def _list(options: argparse.Namespace) -> int:
    book = load_presets(options.presets)
    for model in book.models:
        default = book.get(model).name
        print(printable(model))
        for name in book.presets(model):
            mark = " (default)" if name == default else ""
            description = " ".join(book.get(model, name).attention.description.split())
            print("  " + "  ".join(filter(None, (f"{printable(name)}{mark}", printable(description)))))
    return 0


def _check(options: argparse.Namespace) -> int:
    data = b""
    try:
        data, name = read(options.file)
        book = book_of(data, name)
    except PresetError as error:
        text = data.decode("utf-8-sig", errors="replace")
        for problem in error.errors:
            print(problem)
            if shown := excerpt(problem, text):
                print(textwrap.indent(shown, "    "))
        if len(error.errors) > 1:
            print(f"{len(error.errors)} errors")
        return 1
    presets = sum(len(book.presets(model)) for model in book.models)
    print(f"{options.file}: ok, models: {len(book.models)}, presets: {presets}")
    return 0


def _schema(options: argparse.Namespace) -> int:
    print(json.dumps(json_schema(), indent=2))
    return 0


def _new(options: argparse.Namespace) -> int:
    if options.file is not None:
        check_new_file(options.file, "file")
    _deliver(template(options.model), options.file, "file")
    return 0


def _convert(options: argparse.Namespace) -> int:
    if options.out is not None:
        check_new_file(options.out, "--out")
    conversion = convert(options.file)
    _deliver(conversion.text, options.out, "--out")
    print(f"{options.file}: notes on what changed meaning: {len(conversion.notes)}", file=sys.stderr)
    return 0


def _deliver(text: str, file: Path | None, argument: str) -> None:
    """Prints a text, or makes a file of it, which `argument` named."""
    if file is None:
        print(text, end="")
        return
    write_new(text, file, argument)
    print(f"{file}: written")
