"""Preset files to books of presets."""

import codecs
import os
import pathlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from .errors import PresetError, Problem, any_of, closest, path_text, place_after, quote, unknown
from .explain import explain
from .models import PRESET_FILE, PRESETS, RULE_BROKEN, ModelPresets, Preset, PyramidSparseAttention
from .positions import Node, parse

_OPTIONAL = ("default_attention", "video_scale", "text_length")  # of a shipped model


@dataclass(frozen=True)
class PresetBook:
    """Presets by model. Names are matched exactly; a near miss is answered with the name it is nearest to."""

    source: str
    """Where the presets were read from."""
    _entries: Mapping[str, ModelPresets]

    @property
    def models(self) -> tuple[str, ...]:
        """The names of the models."""
        return tuple(self._entries)

    def presets(self, model: str) -> tuple[str, ...]:
        """The names of a model's presets.

        Raises:
            PresetError: if the book does not hold the model.
            TypeError: if the name is no text.
        """
        return tuple(self._entry(model).attention_configs)

    def get(self, model: str, preset: str | None = None) -> Preset:
        """The named preset of a model, or its `default_attention`.

        Raises:
            PresetError: if the book does not hold the model, or the model not the preset.
            TypeError: if a name is no text.
        """
        entry = self._entry(model)
        name = entry.default_attention if preset is None else _name("preset", preset)
        if name not in entry.attention_configs:
            self._refuse(path_text((model,)), f"no preset {quote(name)}", name, self.presets(model))
        return Preset(
            model=model,
            name=name,
            text_length=entry.text_length,
            video_scale=entry.video_scale,
            attention=entry.attention_configs[name],
        )

    def _entry(self, model: str) -> ModelPresets:
        if _name("model", model) not in self._entries:
            self._refuse("", f"no model {quote(model)}", model, self.models)
        return self._entries[model]

    def _refuse(self, path: str, what: str, name: str, known: tuple[str, ...]) -> None:
        raise PresetError([Problem(self.source, None, None, path, f"{what}, {unknown(name, known)}")])


def _name(argument: str, value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{argument} must be a str, got {type(value).__name__} {value!r}")
    return value


def load_presets(path: str | os.PathLike[str] | None = None) -> PresetBook:
    """The presets of one YAML file, or the shipped ones.

    A file's book holds the presets that stand in the file and no others. A model of a shipped name may leave out
    `video_scale` and `text_length`, which are then the shipped model's, and `default_attention`, which is then the
    preset named like the shipped default or else the first. Any other model may leave out only `default_attention`,
    and only if it has a single preset.

    Raises:
        PresetError: with everything that is wrong with the file.
        TypeError: if `path` is none.
    """
    return _shipped() if path is None else book_of(*read(path))


def read(path: str | os.PathLike[str]) -> tuple[bytes, str]:
    """The bytes of a preset file, and its name as errors say it.

    Raises:
        PresetError: if it cannot be read.
        TypeError: if `path` is none.
    """
    if not isinstance(path, str | os.PathLike) or not isinstance(os.fspath(path), str):
        raise TypeError(f"path must be a str, a path or None, got {type(path).__name__} {path!r}")
    file = pathlib.Path(path)
    try:
        data = file.read_bytes()
    except (OSError, ValueError) as error:  # a ValueError where the name holds a null character
        reason = getattr(error, "strerror", None) or str(error)
        raise PresetError([Problem(str(file), None, None, "", f"cannot be read: {reason}")]) from error
    return data, str(file)


def book_of(data: bytes, file: str) -> PresetBook:
    """The book of a file's bytes, see `load_presets`."""
    return PresetBook(file, _presets(data, file, _shipped()._entries))


@cache
def _shipped() -> PresetBook:
    entries: dict[str, ModelPresets] = {}
    for file in sorted(PRESETS.iterdir(), key=lambda file: file.name):
        entries.update(_presets(file.read_bytes(), str(file), {}))
    return PresetBook(str(PRESETS), entries)


def _presets(data: bytes, file: str, shipped: Mapping[str, ModelPresets]) -> dict[str, ModelPresets]:
    node, problems = parse(decode(data, file), file)
    if node is None or node.value is None:
        empty = Problem(file, 1, 1, "", "the file is empty, expected a mapping of models")
        raise PresetError([*problems, empty])
    problems += _wrong_defaults(node, file)
    values = _completed(node.plain(), shipped)
    try:
        entries = PRESET_FILE.validate_python(values)
    except ValidationError as error:
        misnamed: dict[str, list[str]] = {}
        found = error.errors(include_url=False)
        for details in (*found, *_hidden(values, found)):
            model, field = [str(step) for step in details["loc"]] if len(details["loc"]) == 2 else ("", "")
            if details["type"] == "missing" and field in _OPTIONAL and _meant(model, shipped) is not None:
                misnamed.setdefault(model, []).append(field)
            else:
                problems += explain(details, node, file)
        problems += [_misnamed(model, fields, node, shipped, file) for model, fields in misnamed.items()]
    if problems:
        raise PresetError(_once_each(problems))
    return entries


def _hidden(values: Any, found: list[ErrorDetails]) -> Iterator[ErrorDetails]:
    """The broken rules over several keys of a preset that stand beside a wrong key, which keeps pydantic from them.

    They are those of the preset without its wrong keys, as far as they are about others.
    """
    wrong: dict[tuple[str, str], set[str]] = {}
    for details in found:
        match details["loc"]:
            case (str(model), "attention_configs", str(name), "psa", str(key), *_):
                wrong.setdefault((model, name), set()).add(key)
    for (model, name), keys in wrong.items():
        preset = values[model]["attention_configs"][name]
        try:
            PyramidSparseAttention.model_validate({key: value for key, value in preset.items() if key not in keys})
        except ValidationError as error:
            for details in error.errors(include_url=False):
                if details["type"] == RULE_BROKEN:
                    problems = [
                        (below, text) for below, text in details["ctx"]["problems"] if below and below[0] not in keys
                    ]
                    place = (model, "attention_configs", name, "psa", *details["loc"])
                    yield {**details, "loc": place, "ctx": {"problems": problems}}


def _meant(model: str, shipped: Mapping[str, ModelPresets]) -> str | None:
    """The shipped model whose name is like this one without being it."""
    return None if model in shipped else closest(model, shipped)


def _misnamed(model: str, fields: list[str], root: Node, shipped: Mapping[str, ModelPresets], file: str) -> Problem:
    """Of a model that leaves out what only shipped ones may, under a name that is almost one of theirs."""
    assert isinstance(root.value, dict), "it has a model"
    meant = quote(str(_meant(model, shipped)))
    what = f"missing {any_of(fields, 'and')}, which only a shipped model may leave out, did you mean {meant}?"
    return Problem(file, *root.value[model].key, path_text((model,)), what)


def _completed(models: object, shipped: Mapping[str, ModelPresets]) -> object:
    """A file's values with what its models may leave out, as `load_presets` says; whatever is no mapping stays."""
    if not isinstance(models, dict):
        return models
    return {
        model: {**_left_out(fields, shipped.get(model)), **fields} if isinstance(fields, dict) else fields
        for model, fields in models.items()
    }


def _left_out(fields: dict[str, object], shipped: ModelPresets | None) -> dict[str, object]:
    configs = fields.get("attention_configs")
    names = list(configs) if isinstance(configs, dict) else []
    if shipped is None:
        return {"default_attention": names[0]} if len(names) == 1 else {}
    default = shipped.default_attention
    return {
        # Without a preset there is no default either: only what is wrong with attention_configs is to be reported.
        "default_attention": names[0] if names and default not in names else default,
        "video_scale": shipped.video_scale,
        "text_length": shipped.text_length,
    }


def decode(data: bytes, file: str) -> str:
    """The text of a preset file; raises PresetError where it is not UTF-8."""
    data = data.removeprefix(codecs.BOM_UTF8)
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        place = place_after(data[: error.start].decode())
        message = f"byte 0x{data[error.start]:02x} is not UTF-8, expected a file in UTF-8"
        raise PresetError([Problem(file, *place, "", message)]) from error


def _once_each(problems: list[Problem]) -> list[Problem]:
    """Without the repeats of a mistake that stands once in the text and reaches several presets by an alias."""
    seen: dict[tuple[object, ...], Problem] = {}
    for problem in problems:
        name = problem.path.rpartition(".")[2]
        seen.setdefault((problem.line, problem.column, name, problem.message), problem)
    return list(seen.values())


def _wrong_defaults(root: Node, file: str) -> list[Problem]:
    """Checked on the nodes, so that a mistake inside a preset does not hide one in the default's name."""
    problems = []
    for model, entry in root.value.items() if isinstance(root.value, dict) else ():
        fields = entry.node.value
        if not isinstance(fields, dict) or not {"default_attention", "attention_configs"} <= fields.keys():
            continue
        default, configs = fields["default_attention"].node, fields["attention_configs"].node
        if isinstance(default.value, str) and isinstance(configs.value, dict) and configs.value:
            if default.value in configs.value:
                continue
            message = f"no preset {quote(default.value)}, {unknown(default.value, list(configs.value))}"
            path = path_text((model, "default_attention"))
            problems.append(Problem(file, *default.position, path, message))
    return problems
