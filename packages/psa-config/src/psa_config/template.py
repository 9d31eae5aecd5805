"""A preset file to start from."""

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from .errors import Path
from .load import load_presets
from .models import ModelPresets, PyramidSparseAttention
from .writing import comment, one_line, write

_HEADER = (
    "Attention presets of one model, every key of one explained. `psa presets check` says what is wrong with a file."
)
_RANGES = (
    " From 0 to 1 without gap or overlap, in shares of the importance (thresholdbound) or of the number of blocks "
    "(topk). A level that is left out is an empty range."
)
_BUDGET = " With budget, `density: 0.15` and `budget_per: head` or `layer` stand in place of mask_ratios."
_SAMPLES = " Left out: a quarter of the block."


def template(model: str, *, name: str = "mine") -> str:
    """The text of a preset file: every setting of a shipped model's default preset, each with what it means.

    Args:
        model: a shipped model.
        name: of the preset in the new file.

    Raises:
        PresetError: if there is no such model, or its default is not a sparse preset.
    """
    preset = load_presets().get(model)
    assert isinstance(preset.attention, PyramidSparseAttention)
    values = preset.attention.model_dump()
    values["description"] = f"A start: the settings of {preset.name}."
    samples = {"q": preset.attention.block_size.m // 4, "kv": preset.attention.block_size.n // 4}
    values["samples"] = {**samples, **values["samples"]}
    fields = {
        "default_attention": name,
        "video_scale": preset.video_scale.model_dump(),
        "text_length": preset.text_length,
        "attention_configs": {name: values, "dense": {"type": "dense"}},
    }
    comments = {(model, *path): text for path, text in _described(ModelPresets).items()}
    here = (model, "attention_configs", name)
    comments |= {(*here, *path): text for path, text in _described(PyramidSparseAttention).items()}
    comments[(*here, "mask_ratios")] += _RANGES
    comments[(*here, "mask_mode")] += _BUDGET
    comments[(*here, "samples")] += _SAMPLES
    schema = "# yaml-language-server: $schema=schema.json  (written by: psa presets schema > schema.json)"
    return "\n".join([schema, *comment(_HEADER), write({model: fields}, comments)])


def _described(model: type[BaseModel]) -> dict[Path, str]:
    return {(name,): _words(field) for name, field in model.model_fields.items() if field.description}


def _words(field: FieldInfo) -> str:
    assert field.description is not None
    words = [field.description]
    choices = [choice for choice in getattr(field.annotation, "__args__", ()) if isinstance(choice, str)]
    if not all(choice in field.description for choice in choices):
        words.append(f"One of {', '.join(choices)}.")
    default = None if field.is_required() else field.get_default(call_default_factory=True, validated_data={})
    if isinstance(default, BaseModel):
        default = default.model_dump() or None
    if default not in (None, ""):
        words.append(f"Left out: {one_line(default)}.")
    return " ".join(words)
