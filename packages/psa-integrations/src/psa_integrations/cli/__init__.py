"""The `psa` command."""

import argparse
import sys
from collections.abc import Sequence

from psa_integrations.__about__ import __version__
from psa_integrations.cli import compare, demo, generate


def build_parser() -> argparse.ArgumentParser:
    """The parser of `psa`; each subcommand sets `run`, a function of the parsed options."""
    parser = argparse.ArgumentParser(prog="psa", description="Video generation with Pyramid Sparse Attention.")
    parser.add_argument("--version", action="version", version=f"psa-integrations {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    generate.add_parser(commands)
    demo.add_parser(commands)
    compare.add_parser(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status: 0, 1 after an error in one line, 130 when interrupted."""
    options = build_parser().parse_args(argv)
    try:
        options.run(options)
    except KeyboardInterrupt:
        print("psa: interrupted", file=sys.stderr)
        return 130
    except (OSError, ValueError, RuntimeError) as error:
        print(f"psa: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0
