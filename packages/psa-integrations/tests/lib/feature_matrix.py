"""Tests that run for every form of every model, and the table that says what they prove."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
from tiny_pipelines import FORMS, Form

START, END = "<!-- support table: written by tests/lib/write_support_table.py -->", "<!-- end of support table -->"


@dataclass(frozen=True)
class Feature:
    """One row of the table: what is claimed, of which forms it is not tested, and what is to be said of others."""

    title: str
    but: Mapping[str, str]
    notes: Mapping[str, str]


FEATURES: dict[str, Feature] = {}


def feature(
    title: str, *, but: Mapping[str, str] | None = None, notes: Mapping[str, str] | None = None
) -> Callable[[Any], Any]:
    """Runs a test, as its argument `form`, for the name of every form but those in `but`, and notes it as a feature.

    `notes` are remarks on forms for which the test runs in a lesser form.
    """
    left_out, remarks = dict(but or {}), dict(notes or {})
    assert title not in FEATURES
    assert left_out.keys() | remarks.keys() <= FORMS.keys()
    assert not left_out.keys() & remarks.keys()
    FEATURES[title] = Feature(title, left_out, remarks)
    return pytest.mark.parametrize("form", [name for name in FORMS if name not in left_out])


def forms_where(holds: Callable[[Form], bool], reason: str) -> dict[str, str]:
    """For `but`: the forms of which `holds` is true, each with the reason."""
    return {name: reason for name, form in FORMS.items() if holds(form)}


def support_table() -> str:
    """Features by models: "yes" where every form of the model has its test, else a note on those that have none."""
    models = list(dict.fromkeys(form.model for form in FORMS.values()))
    titles = {model: "; ".join(form.title for form in FORMS.values() if form.model == model) for model in models}
    notes: list[str] = []
    rows = [["", *models], ["---"] * (len(models) + 1), ["forms", *titles.values()]]
    for entry in FEATURES.values():
        row = [entry.title]
        for model in models:
            forms = [name for name, form in FORMS.items() if form.model == model]
            left_out = [name for name in forms if name in entry.but]
            said = {name: text for name, text in {**entry.but, **entry.notes}.items() if name in forms}
            if not said:
                row.append("yes")
                continue
            numbers = []
            for reason in dict.fromkeys(said.values()):
                of = [FORMS[name].title for name in said if said[name] == reason]
                note = reason if len(of) == len(forms) else f"{'; '.join(of)}: {reason}"
                if note not in notes:
                    notes.append(note)
                numbers.append(str(notes.index(note) + 1))
            mark = f"({', '.join(numbers)})"
            row.append(mark if len(left_out) == len(forms) else f"yes {mark}")
        rows.append(row)
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([*lines, "", *(f"{number}. {note}" for number, note in enumerate(notes, start=1))])


def with_table(readme: str) -> str:
    """The README's text with the table between its two marks."""
    before, mark, rest = readme.partition(START)
    _, end, after = rest.partition(END)
    assert mark
    assert end
    return f"{before}{START}\n\n{support_table()}\n\n{END}{after}"
