"""Numbers on the command line, for argparse."""

import argparse
import math
import re
from collections.abc import Sequence
from typing import Any

LARGEST = 2**31 - 1
"""Of the numbers of pixels, frames, tokens, ... that an option takes: far beyond what can be run."""
_MOST_FPS = 1000


def positive(text: str) -> int:
    """Parses a positive integer."""
    return _within(text, LARGEST)


def frames_per_second(text: str) -> int:
    """Parses a frame rate that video files have."""
    return _within(text, _MOST_FPS)


def finite(text: str) -> float:
    """Parses a finite number."""
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number, got {text!r}") from None
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"must be finite, got {text}")
    return value


def text(text: str) -> str:
    """Parses text that UTF-8 can hold, which bytes of another encoding are not."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError(f"must be text in UTF-8, got {text!r}") from None
    return text


def seed(text: str) -> int:
    """Parses what torch takes as a seed."""
    value = _integer(text)
    if not -(2**63) <= value < 2**64:
        raise argparse.ArgumentTypeError(f"must fit 64 bits, got {text}")
    return value


def _within(text: str, most: int) -> int:
    value = _integer(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    if value > most:
        raise argparse.ArgumentTypeError(f"must be at most {most}, got {text}")
    return value


def _integer(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a whole number, got {text!r}") from None


class Numbers(argparse.Action):
    """An option with whole numbers from `least` to LARGEST, with commas or spaces between them: sorted, each once."""

    def __init__(self, option_strings: Sequence[str], dest: str, *, least: int, **more: Any) -> None:
        super().__init__(option_strings, dest, nargs="+", **more)
        self._least = least

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        text = " ".join(values).strip()
        parts = re.split(r"\s*,\s*|\s+", text)
        if not all(re.fullmatch(r"[0-9]{1,10}", part) and self._least <= int(part) <= LARGEST for part in parts):
            rule = f"must be whole numbers from {self._least} to {LARGEST} with commas or spaces between them"
            raise argparse.ArgumentError(self, f"{rule}, got {text!r}")
        setattr(namespace, self.dest, tuple(sorted({int(part) for part in parts})))
