"""Files and folders that a command makes: refused before any work, under the name that the user gave."""

import os
import tempfile
from pathlib import Path


def check_folder_of(path: Path, argument: str) -> None:
    """Raises OSError if `path`, which `argument` gave, lies in no folder in which something can be made."""
    folder = path.absolute().parent
    if not folder.is_dir():
        raise FileNotFoundError(f"{argument} must lie in a folder that exists, got {path}")
    try:
        # Permission bits do not tell of everything that keeps a file from being made.
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(f"{argument} must lie in a folder that can be written, got {path}: {error.strerror}") from error


def check_new_file(path: Path, argument: str) -> None:
    """Raises OSError if `path`, which `argument` gave, is there already, or its folder cannot be written."""
    if os.path.lexists(path):
        raise FileExistsError(f"{argument} must be a file that is not there yet, and {path} is left as it is")
    check_folder_of(path, argument)
