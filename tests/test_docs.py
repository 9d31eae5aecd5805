"""The pages of docs/ tell the truth: code runs, commands parse, presets load, links lead somewhere."""

import ast
import importlib
import inspect
import pkgutil
import re
import shlex
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import diffusers
import pytest
from lib.model_pages import page_of, with_facts

from psa_config import PyramidSparseAttention, load_presets
from psa_integrations.build import sparse_attention_of
from psa_integrations.cli import build_parser
from psa_integrations.cli.models import MODELS, ModelSpec
from psa_integrations.diffusers.adapter import Adapter
from psa_integrations.diffusers.apply import ADAPTERS

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))
FIGURE = re.compile(
    r"([\d,]*\d(?:\.\d+)?) (?:ms|s|GiB)\b|(\d+,\d{3}) tokens|density (\d\.\d+)|from (\d\.\d{3})|to (\d\.\d{3})"
)
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
        target = (DOCS / page).parent / link if link else DOCS / page
        assert target.exists(), f"{page} links to {link}"
        if anchor and target.suffix == ".md":
            headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), flags=re.M)
            assert anchor in [re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings]


def test_adding_a_model_names_what_an_adapter_says_and_the_adapters_there_are() -> None:
    text = (DOCS / "adding-a-model.md").read_text(encoding="utf-8")
    members = [name for name in {*vars(Adapter), *Adapter.__annotations__} if not name.startswith("_")]
    beside = Path(inspect.getfile(Adapter)).parent.glob("*.py")
    files = [path.name for path in beside if "Adapter(Adapter):" in path.read_text(encoding="utf-8")]
    assert len(files) == len(ADAPTERS)
    for name in (*members, "ADAPTERS", *files):
        assert f"`{name}`" in text, name
    assert (ROOT / re.findall(r"psa presets schema > ([^`]*)`", text)[0]).is_file()


@pytest.mark.parametrize("package", ["psa_kernels", "psa_masks", "psa_config", "psa_integrations"])
def test_the_api_page_has_every_public_name(package: str) -> None:
    page = (DOCS / "api.md").read_text(encoding="utf-8")
    listed = set(re.findall(rf"^::: {package}\.(\w+)$", page, flags=re.M))
    assert listed >= set(importlib.import_module(package).__all__) - {"__version__"}
    for name in listed:
        pkgutil.resolve_name(f"{package}.{name}")


def test_every_setting_of_a_preset_is_named_to_those_who_come_from_the_reference() -> None:
    page = (DOCS / "from-the-reference.md").read_text(encoding="utf-8")
    named = set(re.findall(r"\w+", " ".join(re.findall(r"`([^`]*)`", page))))
    assert named >= set(PyramidSparseAttention.model_fields)
    assert named >= set(get_args(PyramidSparseAttention.model_fields["rearrange_method"].annotation))


def test_every_mask_mode_is_among_those_to_choose_from() -> None:
    page = (DOCS / "choosing-a-preset.md").read_text(encoding="utf-8")
    modes = get_args(PyramidSparseAttention.model_fields["mask_mode"].annotation)
    assert set(re.findall(r"^\| `(\w+)` \|", page, flags=re.M)) >= set(modes)


def test_every_page_of_the_navigation_exists() -> None:
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    pages = re.findall(r"^ +- (?:\w+: )?(\S+\.md)$", text[text.index("\nnav:") :], flags=re.M)
    assert "index.md" in pages
    for page in pages:
        assert (ROOT / page.removeprefix("repository/") if page.startswith("repository/") else DOCS / page).is_file()


@pytest.mark.parametrize("spec", MODELS.values(), ids=lambda spec: spec.name)
def test_every_model_has_a_page_that_says_what_the_code_does(spec: ModelSpec) -> None:
    text = page_of(spec.name).read_text(encoding="utf-8")
    assert text == with_facts(text, spec), "write it anew: python tests/lib/model_pages.py"
    assert f"      - models/{spec.name}.md\n" in (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    calls = commands(f"models/{spec.name}.md")
    used = {options[options.index("--model") + 1] for options in calls if "--model" in options}
    used |= {options[2] for options in calls if options[:2] == ["presets", "show"]}
    assert used == {spec.name}
    index = (DOCS / "models.md").read_text(encoding="utf-8")
    (row,) = re.findall(rf"^\| \[.*\]\(models/{re.escape(spec.name)}\.md\) .*$", index, flags=re.M)
    assert f" | `{spec.name}` | `{spec.presets}` | " in row
    default = load_presets().get(spec.presets).attention
    assert ("Untuned" in default.description) == row.endswith("| untuned |")


@pytest.mark.parametrize("spec", MODELS.values(), ids=lambda spec: spec.name)
def test_examples_of_a_model_are_of_its_size_and_presets(spec: ModelSpec) -> None:
    """Calls of a pipeline have the default size, presets their model's name, and the pipeline takes the arguments."""
    run, seen = spec.defaults, 0
    for block in blocks(f"models/{spec.name}.md", "py"):
        calls = [node for node in ast.walk(ast.parse(block)) if isinstance(node, ast.Call)]
        named = {ast.unparse(call.func): call for call in calls}
        model, _, name = named["apply_pyramid_sparse_attention"].args[1].value.partition("/")
        assert model == spec.presets
        load_presets().get(model, name)
        if spec.hub is None:
            continue
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in named["pipe"].keywords}
        size = {"height": run.height, "width": run.width, "num_frames": run.frames}
        assert {name: int(given[name]) for name in size} == size
        pipeline = getattr(diffusers, next(name for name in named if name.endswith(".from_pretrained")).split(".")[0])
        assert given.keys() <= inspect.signature(pipeline.__call__).parameters.keys()
        seen += 1
    assert seen or spec.hub is None


def test_presets_of_the_language_model_are_all_on_its_page() -> None:
    text = (DOCS / "models/transformers.md").read_text(encoding="utf-8")
    for name in load_presets().presets("Qwen2.5-VL_7b"):
        attention = sparse_attention_of(load_presets().get("Qwen2.5-VL_7b", name))
        (row,) = re.findall(rf"^\| `{name}`.*$", text, flags=re.M)
        if attention is not None:
            assert f"| {', '.join(f'{bound:g}' for bound in attention.mask_ratios.bounds)}; " in row
            assert f"| {attention.block_size.m} x {attention.block_size.n} |" in row


def test_figures_are_not_made_up() -> None:
    """Each number of seconds, GiB or error on these pages stands in a file that its paragraph or table row links to."""
    checked = 0
    for page in ("index.md", "choosing-a-preset.md", *(page for page in PAGES if page.startswith("models"))):
        text = re.sub(
            r"<!-- written by.*?<!-- end -->|```.*?```", "", (DOCS / page).read_text(encoding="utf-8"), flags=re.S
        )
        for part in re.split(r"\n\n|\n\||\n\d\. ", text):
            links = [link for link, _ in LINK.findall(part) if "benchmarks/results" in link]
            known = "".join(((DOCS / page).parent / link).read_text(encoding="utf-8") for link in links)
            for groups in FIGURE.findall(part):
                number = "".join(groups)
                assert rounds_to(number.replace(",", ""), known.replace(",", "")), f"{page}: {number} has no source"
                checked += 1
    assert checked > 30


def rounds_to(number: str, text: str) -> bool:
    digits = len(number.partition(".")[2])
    return any(f"{float(found):.{digits}f}" == number for found in re.findall(r"\d+(?:\.\d+)?", text))
