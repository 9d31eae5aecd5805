"""Values of the benchmarks' options."""

import argparse


def whole(text: str) -> int:
    """A whole number of at least 1, for ``type`` of an argument."""
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text}")
    return int(text)
