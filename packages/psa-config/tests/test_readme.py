"""The README's blocks run, in order, in one folder."""

import contextlib
import doctest
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from psa_config import load_presets

README = Path(__file__).parents[1] / "README.md"


def test_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    blocks = re.findall(r"^```(\w+)\n(.*?)^```$", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert [language for language, _ in blocks] == ["python", "yaml", "python", "yaml", "yaml", "console", "yaml"]
    Path("my_presets.yaml").write_text(blocks[1][1])
    Path("my_budget.yaml").write_text(blocks[3][1])
    assert load_presets("my_budget.yaml").get("CogVideo_5b").attention.density == 0.1
    Path("my_model.yaml").write_text(blocks[4][1])
    assert load_presets("my_model.yaml").get("my_model").name == "sparse"
    for language, code in blocks:
        if language == "python":
            run_python(code)
        elif language == "console":
            run_console(code)


def run_python(code: str) -> None:
    """A `print` with a literal in its comment must print that literal."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, str(README), "exec"), {})
    promised = re.findall(r"print\(.*\)  # (.*)", code)
    assert promised
    assert set(promised) <= set(printed.getvalue().splitlines())


def run_console(code: str) -> None:
    """After each `$ command`, what it prints; `...` stands for anything."""
    for step in code.removeprefix("$ ").split("\n$ "):
        command, _, promised = step.partition("\n")
        run = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
        assert run.stderr == ""
        same = doctest.OutputChecker().check_output(f"{promised.rstrip()}\n", run.stdout, doctest.ELLIPSIS)
        assert same or not promised, run.stdout
