"""Several prompts, and this process's share of them."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


def read_prompts(path: Path, option: str = "--prompt-file") -> list[str]:
    """The prompts of a UTF-8 text file, one a line; empty lines are none.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not UTF-8, or holds no prompt.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise OSError(f"{option} must be a file that can be read, got {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{option} must be UTF-8 text, and {path} is not: {error}") from error
    prompts = [line.strip() for line in text.splitlines() if line.strip()]
    if not prompts:
        raise ValueError(f"{option} must hold a prompt a line, and {path} has none")
    return prompts


def numbered(out: Path, index: int) -> Path:
    """The file of a prompt: `fox.mp4` is `fox-0003.mp4` for the one of index 3."""
    return out.with_stem(f"{out.stem}-{index:04d}")


@dataclass(frozen=True)
class Share:
    """One of `size` processes that divide the prompts; `local_rank` counts those of its machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @classmethod
    def of(cls, environment: Mapping[str, str] = os.environ) -> "Share":
        """As `accelerate launch` and `torchrun` say it: RANK, WORLD_SIZE and LOCAL_RANK; without them one process.

        Raises:
            ValueError: one of them is no number, or they do not go together.
        """
        values = []
        for name, default in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")):
            text = environment.get(name, default)
            if not text.isdecimal():
                raise ValueError(f"the environment's {name} must be a number, got {text!r}")
            values.append(int(text))
        share = cls(*values)
        if share.rank >= share.size:
            raise ValueError(f"the environment's RANK must be below its WORLD_SIZE {share.size}, got {share.rank}")
        return share

    def indices(self, count: int) -> range:
        """Which of `count` prompts are this process's: every `size`-th, so that shares differ by one at most."""
        return range(self.rank, count, self.size)
