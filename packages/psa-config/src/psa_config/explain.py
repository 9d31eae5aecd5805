"""Pydantic's errors to problems at a line and column, said in the words of the schema."""

from functools import cache
from typing import Any, NamedTuple

from pydantic_core import ErrorDetails

from .errors import Path, Problem, any_of, closest, path_text, quote, unknown
from .models import LARGEST, RULE_BROKEN, json_schema
from .positions import Node, Position

Schema = dict[str, Any]

_BOOLEANS = {"true": "true", "yes": "true", "on": "true", "false": "false", "no": "false", "off": "false"}


class _Spot(NamedTuple):
    """Where an error points: the path as the file spells it, and what the file and the schema have there.

    `node` is None where the file has nothing; `key` is then where the parent stands.
    """

    path: Path
    schema: Schema
    node: Node | None
    key: Position


def explain(error: ErrorDetails, root: Node, file: str) -> list[Problem]:
    """What one error of validating `root.plain()` says, placed in the file the node was read from."""
    kind = error["type"]
    spot = _walk(_Spot((), _schema(), root, root.position), error["loc"])
    if kind == RULE_BROKEN:
        found = [(_walk(spot, below), message) for below, message in error["ctx"]["problems"]]
        return [_problem(file, at, at.node.position if at.node else at.key, message) for at, message in found]
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        spot = _tag(spot)
    if kind == "extra_forbidden":
        parent = _walk(_Spot((), _schema(), root, root.position), error["loc"][:-1])
        return [_problem(file, spot, spot.key, _extra(str(spot.path[-1]), parent))]
    if spot.node is None:
        return [_problem(file, spot, spot.key, f"missing, expected {_expected(spot.schema)}")]
    expected = _expected(spot.schema)
    if spot.schema.get("maximum") == LARGEST and isinstance(spot.node.value, int) and spot.node.value > LARGEST:
        expected += f" and at most {LARGEST}"
    message = f"got {_describe(spot.node)}, expected {expected}{_hint(spot)}"
    return [_problem(file, spot, spot.node.position, message)]


def _problem(file: str, spot: _Spot, position: Position, message: str) -> Problem:
    return Problem(file, *position, path_text(spot.path), message)


@cache
def _schema() -> Schema:
    return json_schema()


def _walk(spot: _Spot, steps: Path) -> _Spot:
    for step in steps:
        schema = spot.schema
        if "discriminator" in schema:
            # Pydantic names the chosen member of a tagged union in its path; the file has no such level.
            spot = spot._replace(schema=_resolved({"$ref": schema["discriminator"]["mapping"][step]}))
        elif isinstance(step, int):
            items = schema.get("prefixItems", [])
            spot = _down(spot, step, items[step] if step < len(items) else schema.get("items", {}))
        else:
            below = schema.get("properties", {}).get(step) or schema.get("additionalProperties") or {}
            spot = _down(spot, step, below)
    return spot


def _down(spot: _Spot, step: str | int, schema: Schema) -> _Spot:
    path = (*spot.path, step)
    value = spot.node.value if spot.node else None
    if isinstance(value, dict) and step in value:
        return _Spot(path, _resolved(schema), value[str(step)].node, value[str(step)].key)
    if isinstance(value, tuple) and isinstance(step, int) and step < len(value):
        return _Spot(path, _resolved(schema), value[step], value[step].position)
    return _Spot(path, _resolved(schema), None, spot.key)


def _resolved(schema: Schema) -> Schema:
    if "$ref" in schema:
        definition: Schema = _schema()["$defs"][schema["$ref"].removeprefix("#/$defs/")]
        return definition
    return schema


def _tag(spot: _Spot) -> _Spot:
    tags = {"type": "string", "enum": list(spot.schema["discriminator"]["mapping"])}
    return _down(spot, spot.schema["discriminator"]["propertyName"], tags)


def _extra(key: str, parent: _Spot) -> str:
    known = parent.schema["properties"]
    if key in known:
        return "another spelling of this key is given too, expected one of them"
    return f"unknown key, {unknown(key, list(known))}"


def _expected(schema: Schema) -> str:
    if "enum" in schema or "const" in schema:
        return any_of([_literal(value) for value in schema.get("enum") or [schema["const"]]])
    match schema.get("type"):
        case "boolean":
            return "true or false"
        case "integer" | "number" as kind:
            noun = "a whole number" if kind == "integer" else "a number"
            low, high = schema.get("minimum"), schema.get("maximum")
            # Nobody needs to be told of the largest number but who exceeds it.
            return f"{noun} of {low} or more" if high in (None, LARGEST) else f"{noun} from {low} to {high}"
        case "array":
            length = schema.get("maxItems")
            items = _expected(schema["prefixItems"][0] if "prefixItems" in schema else schema["items"])
            return f"a list, each item {items}" if length is None else f"a list of {length}, each {items}"
        case "string":
            return "text"
        case _:
            return "a mapping that is not empty" if schema.get("minProperties") else "a mapping"


def _describe(node: Node) -> str:
    value = node.value
    if value is None:
        return "nothing"
    if isinstance(value, dict):
        return "a mapping" if value else "an empty mapping"
    if isinstance(value, tuple):
        return f"a list of {len(value)}"
    return _literal(value)


def _literal(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return quote(value) if isinstance(value, str) else quote(str(value))[1:-1]


def _hint(spot: _Spot) -> str:
    value = spot.node.value if spot.node else None
    guess = None
    match spot.schema:
        case {"enum": choices} if isinstance(value, str):
            word = closest(value, [choice for choice in choices if isinstance(choice, str)])
            guess = quote(word) if word is not None else None
        case {"type": "boolean"} if isinstance(value, str):
            guess = _BOOLEANS.get(value.casefold())
        case {"type": "number", "maximum": 1} if isinstance(value, int | float) and 1 < value <= 100:
            guess = str(value / 100)
    return f", did you mean {guess}?" if guess else ""
