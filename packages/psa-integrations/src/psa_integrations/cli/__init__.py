"""The `psa` command."""

import argparse
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

from psa_config.terminal import flush, forget_output, print_anything
from psa_integrations.__about__ import __version__
from psa_integrations.cli import bench, compare, demo, doctor, generate, presets, tune
from psa_integrations.cli.load import is_out_of_memory


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
    one line, 128 and the number of the signal when interrupted, which is 130 for Ctrl-C."""
    options = build_parser().parse_args(argv)
    print_anything()
    try:
        with _signals_interrupt():
            status = int(options.run(options) or 0)
            flush()
    except KeyboardInterrupt as error:
        stopped = error.signal if isinstance(error, _Stopped) else signal.SIGINT
        how = "interrupted" if stopped is signal.SIGINT else f"stopped by {stopped.name}"
        print(f"psa: {how}{_notes(error)}", file=sys.stderr)
        return 128 + stopped
    except BrokenPipeError:
        forget_output()
        return 1
    except (OSError, ValueError, RuntimeError, MemoryError) as error:
        text = " ".join(str(error).split())
        if is_out_of_memory(error):
            sizes = "--lengths" if hasattr(options, "lengths") else "--width, --height or --frames"
            advice = f"a smaller {sizes} needs less, and so does --dtype bfloat16"
            text = f"out of memory: {advice}. {text}".rstrip()
        print(f"psa: error: {text}{_notes(error)}", file=sys.stderr)
        return 1
    return status


class _Stopped(KeyboardInterrupt):
    """A signal other than that of Ctrl-C."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.signal = signal.Signals(number)


def _stop(number: int, frame: Any) -> NoReturn:
    raise _Stopped(number)


@contextmanager
def _signals_interrupt() -> Iterator[None]:
    """Lets what ends a process by default interrupt it, so that it leaves no half file behind."""
    numbers = [number for number in (signal.SIGTERM, getattr(signal, "SIGHUP", None)) if number is not None]
    in_main = threading.current_thread() is threading.main_thread()  # no other thread may ask for signals
    ours = [number for number in numbers if in_main and signal.getsignal(number) is signal.SIG_DFL]
    for number in ours:
        signal.signal(number, _stop)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)


def _notes(error: BaseException) -> str:
    """What a command had to say when it failed, for the same line."""
    return "".join(f"; {note}" for note in getattr(error, "__notes__", ()))
