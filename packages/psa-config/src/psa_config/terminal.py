"""What commands need of the stream that they print on, whatever it is."""

import io
import os
import sys


def print_anything() -> None:
    """Lets stdout escape what its encoding has no signs for, instead of failing."""
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")


def flush() -> None:
    """Writes what was printed: what cannot be written is known here, not in the interpreter's last breath."""
    if sys.stdout is not None:  # it is, where a shell closed it
        sys.stdout.flush()


def forget_output() -> None:
    """For a reader that has gone, as `head` does: nothing is left to be said to it, and exiting is to try nothing."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
