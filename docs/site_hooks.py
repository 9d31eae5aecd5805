"""What mkdocs needs beyond docs/: the repository's other Markdown as pages, and links between the two.

Pages of docs/ link as they do in the repository, `../GLOSSARY.md`. In the site such a file is a page below
`repository/`, and a link to any other file of the repository becomes its plain text. A link to a file that does not
exist is a warning, which `mkdocs build --strict` turns into an error.
"""

import logging
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
PAGES = ("GLOSSARY.md", "CONTRIBUTING.md", "packages/**/*.md", "benchmarks/results/*.md")
FOLDER = "repository"

_log = logging.getLogger("mkdocs.plugins.site_hooks")
# Code keeps what looks like a link; an image is a link too.
_CODE_OR_LINK = re.compile(
    r"(?P<code>^```.*?^```$|`[^`\n]*`)|(?P<mark>!?)\[(?P<text>[^\]]*)\]\((?P<target>[^)\s]+)\)", re.M | re.S
)
_ROLE = re.compile(r":(?:func|meth|class):(?=<code>)")


def on_files(files: Files, config: Any) -> Files:
    """Adds the repository's pages."""
    for pattern in PAGES:
        for path in sorted(ROOT.glob(pattern)):
            if path.name == "CHANGELOG.md":
                continue
            place = f"{FOLDER}/{path.relative_to(ROOT).as_posix()}"
            files.append(File.generated(config, place, content=path.read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Turns links of the repository into links of the site."""
    here = page.file.src_uri
    source = here.removeprefix(f"{FOLDER}/") if here.startswith(f"{FOLDER}/") else f"docs/{here}"

    def changed(match: re.Match[str]) -> str:
        target = match["target"]
        if match["code"] is not None or target is None or "://" in target or target.startswith(("#", "mailto:")):
            return match[0]
        path, _, anchor = target.partition("#")
        there = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        if not (ROOT / there).exists():
            _log.warning("%s links to %s, which does not exist", source, target)
            return match[0]
        place = there.removeprefix("docs/") if there.startswith("docs/") else f"{FOLDER}/{there}"
        if (ROOT / there).is_dir():
            place = f"{place}/README.md"
        if files.get_file_from_path(place) is None:
            return match["text"]
        link = posixpath.relpath(place, posixpath.dirname(here) or ".")
        return f"{match['mark']}[{match['text']}]({link}{'#' if anchor else ''}{anchor})"

    return _CODE_OR_LINK.sub(changed, markdown)


def on_page_content(html: str, page: Any, config: Any, files: Files) -> str:
    """Docstrings name functions by Sphinx's roles, which Markdown does not know."""
    return _ROLE.sub("", html)
