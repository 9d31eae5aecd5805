"""The `psa` command."""

import argparse
import os
import sys
from collections.abc import Sequence

import torch

from psa_integrations.__about__ import __version__
from psa_integrations.cli import bench, compare, demo, doctor, generate, presets, tune


def build_parser() -> argparse.ArgumentParser:
    """The parser of `psa`; each subcommand sets `run`, a function of the parsed options."""
    parser = argparse.ArgumentParser(prog="psa", description="Video generation with Pyramid Sparse Attention.")
    parser.add_argument("--version", action="version", version=f"psa-integrations {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    generate.add_parser(commands)
    demo.add_parser(commands)
    compare.add_parser(commands)
    presets.add_parser(commands)
    doctor.add_parser(commands)
    bench.add_parser(commands)
    tune.add_parser(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status: what the command's `run` returned, None being 0; 1 after an error in
    one line, 130 when interrupted."""
    options = build_parser().parse_args(argv)
    try:
        status = int(options.run(options) or 0)
        sys.stdout.flush()  # what cannot be written is known here, not in the interpreter's last breath
    except KeyboardInterrupt as error:
        print(f"psa: interrupted{_notes(error)}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader has gone, as `head` does: nothing is left to be said to it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (MemoryError, torch.OutOfMemoryError) as error:
        advice = "a smaller --width, --height or --frames needs less, and so does --dtype bfloat16"
        text = f"psa: error: out of memory: {advice}. {' '.join(str(error).split())}".rstrip()
        print(f"{text}{_notes(error)}", file=sys.stderr)
        return 1
    except (OSError, ValueError, RuntimeError) as error:
        print(f"psa: error: {' '.join(str(error).split())}{_notes(error)}", file=sys.stderr)
        return 1
    return status


def _notes(error: BaseException) -> str:
    """What a command had to say when it failed, for the same line."""
    return "".join(f"; {note}" for note in getattr(error, "__notes__", ()))
