"""The code of the README: `python` blocks run, `py` blocks need weights and are only parsed."""

import re
from pathlib import Path

import torch

README = Path(__file__).parents[1] / "README.md"


def blocks(language: str) -> list[str]:
    text = README.read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def test_code_in_the_readme_runs() -> None:
    assert len(blocks("python")) == 2
    with torch.random.fork_rng():
        for block in blocks("python"):
            exec(compile(block, str(README), "exec"), {})


def test_code_that_needs_weights_is_valid_python() -> None:
    assert len(blocks("py")) == 3
    for block in blocks("py"):
        compile(block, str(README), "exec")
