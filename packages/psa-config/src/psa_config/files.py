"""Files and folders that a command makes: refused before any work, under the name that the user gave."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def check_folder_of(path: Path, argument: str) -> None:
    """Raises OSError if `path`, which `argument` gave, lies in no folder in which something of its name can be made."""
    folder = path.absolute().parent
    if not folder.is_dir():
        raise FileNotFoundError(f"{argument} must lie in a folder that exists, got {path}")
    try:
        os.lstat(path)
    except FileNotFoundError:
        pass
    except OSError as error:  # such as a name that is too long
        raise OSError(f"{argument} must be a name that can be made, got {path}: {error.strerror}") from error
    try:
        # Permission bits do not tell of everything that keeps a file from being made.
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(f"{argument} must lie in a folder that can be written, got {path}: {error.strerror}") from error


def check_new_file(path: Path, argument: str) -> None:
    """Raises OSError if `path`, which `argument` gave, is there already, or its folder cannot be written."""
    if os.path.lexists(path):
        raise _there_already(path, argument)
    check_folder_of(path, argument)


@contextmanager
def folder_beside(path: Path) -> Iterator[Path]:
    """A folder in which to make what becomes `path` by `Path.replace` once it is complete; it is gone afterwards."""
    start = path.name[:32]  # the whole name may be as long as a name can be
    with tempfile.TemporaryDirectory(dir=path.absolute().parent, prefix=f".{start}-") as folder:
        yield Path(folder)


def write_new(text: str, path: Path, argument: str) -> None:
    """Makes a text file in UTF-8, which is whole or absent.

    Raises:
        OSError: `path`, which `argument` gave, is there already, or cannot be written.
    """
    with folder_beside(path) as folder:
        partial = folder / path.name
        try:
            partial.write_text(text, encoding="utf-8")
        except OSError as error:
            raise OSError(f"{argument} {path} was not written: {error.strerror}") from error
        try:
            path.touch(exist_ok=False)  # takes the name, which no one else can then
        except FileExistsError as error:
            raise _there_already(path, argument) from error
        partial.replace(path)


def _there_already(path: Path, argument: str) -> FileExistsError:
    return FileExistsError(f"{argument} must be a file that is not there yet, and {path} is left as it is")
