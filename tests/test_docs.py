"""The pages of docs/ tell the truth: code runs, commands parse, presets load, links lead somewhere."""

import re
import shlex
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from psa_config import load_presets
from psa_integrations.cli import build_parser
from psa_integrations.cli.models import MODELS

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(path.name for path in DOCS.glob("*.md"))
LINK = re.compile(r"\]\(([^)#\s]*)(?:#([^)\s]*))?\)")


def blocks(page: str, language: str) -> Iterator[str]:
    """The code blocks of a page in one language, those inside lists too."""
    text = (DOCS / page).read_text(encoding="utf-8")
    for block in re.finditer(rf"^( *)```{language}\n(.*?)^\1```$", text, flags=re.M | re.S):
        yield textwrap.dedent(block[2])


def commands(page: str) -> list[list[str]]:
    """The arguments of every call of psa."""
    lines = [line for block in blocks(page, "sh") for line in block.replace("\\\n", " ").splitlines()]
    return [words[1:] for line in lines if (words := shlex.split(line, comments=True)) and words[0] == "psa"]


def with_blocks(language: str) -> list[str]:
    return [page for page in PAGES if any(blocks(page, language))]


@pytest.mark.parametrize("page", with_blocks("python"))
def test_python_blocks_run_in_order(page: str) -> None:
    names: dict[str, object] = {}
    for block in blocks(page, "python"):
        exec(compile(block, page, "exec"), names)


@pytest.mark.parametrize("page", with_blocks("py"))
def test_examples_that_need_weights_compile(page: str) -> None:
    for block in blocks(page, "py"):
        compile(block, page, "exec")


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)])
def test_commands_are_understood(page: str) -> None:
    for arguments in commands(page):
        options = build_parser().parse_args(arguments)
        if arguments[0] == "generate" and options.presets is None:
            load_presets().get(MODELS[options.model].presets, options.preset)


def test_the_quick_start_has_commands() -> None:
    assert len(commands("quickstart.md")) >= 5


@pytest.mark.parametrize("page", with_blocks("yaml"))
def test_presets_load(page: str, tmp_path: Path) -> None:
    for block in blocks(page, "yaml"):
        file = tmp_path / "presets.yaml"
        file.write_text(block, encoding="utf-8")
        assert load_presets(file).models


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    prose = re.sub(r"```.*?```|`[^`\n]*`", "", (DOCS / page).read_text(encoding="utf-8"), flags=re.S)
    for link, anchor in LINK.findall(prose):
        if "://" in link:
            continue
        target = DOCS / link if link else DOCS / page
        assert target.exists(), f"{page} links to {link}"
        if anchor and target.suffix == ".md":
            headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), flags=re.M)
            assert anchor in [re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings]


def test_every_page_of_the_navigation_exists() -> None:
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    pages = re.findall(r"^ +- (?:\w+: )?(\S+\.md)$", text[text.index("\nnav:") :], flags=re.M)
    assert "index.md" in pages
    for page in pages:
        assert (ROOT / page.removeprefix("repository/") if page.startswith("repository/") else DOCS / page).is_file()


def test_the_models_page_has_every_model() -> None:
    text = (DOCS / "models.md").read_text(encoding="utf-8")
    for spec in MODELS.values():
        run = spec.defaults
        row = next(line for line in text.splitlines() if line.startswith(f"| `{spec.name}` | `{spec.presets}`"))
        assert f"{run.width}x{run.height}, {run.frames} frames" in row
        attention = load_presets().get(spec.presets).attention
        assert row.endswith(f"| {run.steps}, {attention.warmup_steps} |")
        assert spec.hub is None or spec.hub in row
        assert text.count(f"| `{spec.name}` |") == 2


def test_figures_are_not_made_up() -> None:
    """Each number of seconds, GiB or error on these pages stands in a file that its paragraph or table row links to."""
    checked = 0
    for page in ("index.md", "models.md", "choosing-a-preset.md"):
        for part in re.split(r"\n\n|\n\||\n\d\. ", (DOCS / page).read_text(encoding="utf-8")):
            sources = [DOCS / link for link, _ in LINK.findall(part) if "benchmarks/results" in link]
            known = "".join(source.read_text(encoding="utf-8") for source in sources)
            for groups in re.findall(r"(\d+\.\d+) (?:ms|s|GiB)\b|from (\d\.\d{3})|to (\d\.\d{3})", part):
                number = "".join(groups)
                assert rounds_to(number, known), f"{page}: {number} has no source"
                checked += 1
    assert checked > 10


def rounds_to(number: str, text: str) -> bool:
    digits = len(number.split(".")[1])
    return any(f"{float(found):.{digits}f}" == number for found in re.findall(r"\d+\.\d+", text))
