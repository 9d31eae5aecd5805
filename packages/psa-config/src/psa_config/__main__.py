"""`python -m psa_config`: print the JSON Schema of preset files, or everything that is wrong with one."""

import argparse
import json
import sys
from collections.abc import Sequence

from .errors import PresetError
from .load import load_presets
from .models import json_schema


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the exit code is 1 if a checked file is wrong, 0 otherwise."""
    parser = argparse.ArgumentParser(prog="python -m psa_config", description="Check attention preset files.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("schema", help="print the JSON Schema of a preset file")
    check = commands.add_parser("check", help="print every error of a preset file")
    check.add_argument("file", help="the YAML file")
    options = parser.parse_args(arguments)
    if options.command == "schema":
        print(json.dumps(json_schema(), indent=2))
        return 0
    try:
        book = load_presets(options.file)
    except PresetError as error:
        print(error)
        return 1
    presets = sum(len(book.presets(model)) for model in book.models)
    print(f"{options.file}: ok, models: {len(book.models)}, presets: {presets}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
