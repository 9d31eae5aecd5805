"""The committed JSON Schema is the models', and says what they say."""

import json
from importlib import resources
from typing import Any

import jsonschema
import pytest

from psa_config.models import json_schema
from psa_config.positions import parse


def committed() -> dict[str, Any]:
    schema: dict[str, Any] = json.loads((resources.files("psa_config") / "schema.json").read_text())
    return schema


def plain(text: str) -> Any:
    """The text as an editor sees it: JSON values, with aliases unfolded."""
    node, problems = parse(text, "x.yaml")
    assert node is not None
    assert not problems
    return json.loads(json.dumps(node.plain()))


def test_the_committed_schema_is_the_generated_one() -> None:
    assert committed() == json_schema(), "run: python -m psa_config schema > src/psa_config/schema.json"


def test_the_schema_is_valid() -> None:
    jsonschema.Draft202012Validator.check_schema(committed())


def test_shipped_presets_conform() -> None:
    for file in (resources.files("psa_config") / "presets").iterdir():
        jsonschema.validate(plain(file.read_text()), committed())


def test_a_shipped_model_may_give_presets_alone(form: str) -> None:
    presets = form[form.index("  attention_configs") :]
    jsonschema.validate(plain(f"CogVideo_5b:\n{presets}"), committed())
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(plain("CogVideo_5b: {text_length: 226}"), committed())
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(plain(f"Wan:\n{presets}"), committed())


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("        8: [", "        16: ["),
        ("[0.0, 0.4]", "0.4"),
        ("[0.0, 0.4]", "[0.0, 40]"),
        ("[0.0, 0.4]", "[0.0, 0.2, 0.4]"),
        ("[0.0, 0.4]", ""),
        ("warmup_steps", "warmup_step"),
        ("type: psa", "type: sparse"),
        ("type: dense", "type: dense\n      skip: mean"),
        ("use_rearrange: true", "use_rearrange: yes"),
        ("n: 64", "n: 48"),
        ("  text_length: 226\n", ""),
        ("warmup_steps: 12", "samples: {q:}"),
        ("warmup_steps: 12", "tile_size: [2, 8]"),
        ("warmup_steps: 12", "cubes_along: raster"),
        ("warmup_steps: 12", "min_full_attn_ratio: 6"),
    ],
)
def test_editors_see_mistakes(form: str, old: str, new: str) -> None:
    jsonschema.validate(plain(form), committed())
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(plain(form.replace(old, new, 1)), committed())
