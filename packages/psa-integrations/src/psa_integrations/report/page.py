"""The page: its template, style and scripts in one file with the data, escaped."""

import base64
import hashlib
import html
import json
from collections.abc import Mapping
from importlib.resources import files
from string import Template

# In a script element the HTML parser looks for `</script` and `<!--`; the last two end a line in old JavaScript.
_ESCAPES = {ord(sign): f"\\u{ord(sign):04x}" for sign in "<>&\u2028\u2029"}

_SCRIPTS = ("base", "videos", "charts", "density", "levels", "strip", "page")


def render_page(data: Mapping[str, object], *, title: str) -> str:
    """One HTML document that needs no other file and no network.

    Args:
        data: what its scripts show, plain values for JSON.
        title: of the document, any text.

    Raises:
        ValueError: if `data` holds NaN or infinity, which JSON has no word for.
    """
    folder = files(__package__) / "template"
    style = (folder / "report.css").read_text(encoding="utf-8")
    parts = [(folder / "scripts" / f"{name}.js").read_text(encoding="utf-8") for name in _SCRIPTS]
    # One block, so that names are theirs alone and the order of functions does not matter.
    script = "\n".join(['"use strict";', "{", *parts, "}"])
    # Substitution looks at the template alone, so no text of the user's is ever taken for a place to fill.
    return Template((folder / "report.html").read_text(encoding="utf-8")).substitute(
        title=html.escape(title),
        script_hash=_hash(script),
        style_hash=_hash(style),
        style=style,
        script=script,
        data=json_for_script(data),
    )


def json_for_script(data: object) -> str:
    """JSON that can stand in an HTML script element, whatever the texts in it say."""
    return json.dumps(data, allow_nan=False, ensure_ascii=True, separators=(",", ":")).translate(_ESCAPES)


def _hash(text: str) -> str:
    """The source expression that lets a content security policy admit this text and no other."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode('utf-8')).digest()).decode('ascii')}'"
