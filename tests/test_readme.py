"""The README at the root tells the truth: its code runs, its links lead somewhere, CI runs its test command."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_python_blocks_run():
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})


def test_examples_for_a_gpu_compile():
    for block in re.findall(r"```py\n(.*?)```", README, flags=re.DOTALL):
        compile(block, "README.md", "exec")


def test_ci_runs_the_test_command():
    command = "pip install nox && nox -s tests"
    assert command in README
    assert command in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


@pytest.mark.parametrize("document", sorted(path.relative_to(ROOT) for path in ROOT.glob("packages/**/*.md")), ids=str)
def test_links_of_packages_lead_somewhere(document):
    check_links(ROOT / document)


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "GLOSSARY.md"])
def test_links_of_the_root_lead_somewhere(name):
    check_links(ROOT / name)


def check_links(document):
    for link in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", document.read_text(encoding="utf-8")):
        if "://" not in link:
            assert (document.parent / link).exists(), f"{document.name} links to {link}"
