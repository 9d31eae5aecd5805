"""The README at the root tells the truth: its code runs, its links lead somewhere, CI runs its test command."""

import re
import shlex
from pathlib import Path

import pytest

from psa_config import load_presets
from psa_integrations.cli import build_parser
from psa_integrations.cli.models import MODELS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_examples_for_a_gpu_compile():
    blocks = re.findall(r"```py\n(.*?)```", README, flags=re.DOTALL)
    assert blocks
    for block in blocks:
        compile(block, "README.md", "exec")
        model, name = re.search(r'"(\S+)/(\w+)"\) as psa', block).groups()
        load_presets().get(model, name)


def test_commands_are_understood():
    lines = [line for block in re.findall(r"```\n(.*?)```", README, flags=re.DOTALL) for line in block.splitlines()]
    calls = [shlex.split(line)[1:] for line in lines if line.startswith("psa ")]
    assert calls
    for arguments in calls:
        options = build_parser().parse_args(arguments)
        load_presets().get(MODELS[options.model].presets, options.preset)


def test_figures_stand_in_the_results_it_links_to():
    links = set(re.findall(r"\]\((benchmarks/results/\S+\.md)\)", README))
    known = [
        float(number)
        for link in links
        for number in re.findall(r"\d+\.?\d*", (ROOT / link).read_text(encoding="utf-8"))
    ]
    # But for decibels at a density, which are of docs/quality.md.
    figures = re.findall(r"(\d+(?:\.\d+)?) (?:ms|s|dB)\b(?! at density)", README)
    assert len(figures) > 14
    for figure in figures:
        digits = len(figure.partition(".")[2])
        assert any(f"{number:.{digits}f}" == figure for number in known), f"{figure} has no source"
    # Of each row, the last number is the ratio of the two before.
    rows = re.findall(r"\| (\S+) ms \| (\S+) ms \| (\S+)x \|", README)
    assert rows
    for dense, sparse, ratio in rows:
        assert f"{float(dense) / float(sparse):.1f}" == ratio


def test_it_is_a_screen_and_a_half():
    lines = README.splitlines()
    assert len(lines) <= 80
    assert max(map(len, lines)) <= 120


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
