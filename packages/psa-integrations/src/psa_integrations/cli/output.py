"""What commands print alike: JSON for programs, counts in words, a log for people who ask for it."""

import json
import logging
import math
import sys
from collections.abc import Mapping
from importlib import metadata

import torch

from psa_integrations.__about__ import __version__


def print_json(report: Mapping[str, object]) -> None:
    """Prints a report on one line; what is infinite or not a number is null, as JSON has neither."""
    print(json.dumps(_finite(report), allow_nan=False))


def counted(number: int, noun: str) -> str:
    """`1 frame`, `2 frames`."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def versions() -> dict[str, str]:
    """Of what a result depends on."""
    return {
        "psa_integrations": __version__,
        "torch": torch.__version__,
        "diffusers": metadata.version("diffusers"),
        "transformers": metadata.version("transformers"),
    }


def set_up_logging(*, verbose: bool, quiet: bool) -> None:
    """Shows the log of this project on stderr where `verbose`, and hides the bars of loading where `quiet`."""
    log = logging.getLogger("psa_integrations")
    log.setLevel(logging.DEBUG if verbose else logging.NOTSET)
    for handler in [handler for handler in log.handlers if handler.get_name() == __name__]:
        log.removeHandler(handler)
    if verbose:
        handler = logging.StreamHandler(sys.stderr)
        handler.set_name(__name__)
        handler.setFormatter(logging.Formatter("%(asctime)s %(name)s: %(message)s"))
        log.addHandler(handler)
    if quiet:
        # Imported here because they take seconds to import.
        import diffusers
        import transformers

        diffusers.utils.logging.disable_progress_bar()
        transformers.utils.logging.disable_progress_bar()


def _finite(value: object) -> object:
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
