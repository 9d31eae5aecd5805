"""A preset file of the reference project in this project's form, with a note wherever a field changed meaning."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from .errors import Path, printable
from .load import book_of, decode, read
from .models import BlockSize, PyramidSparseAttention
from .positions import parse
from .writing import comment, write

_POOLS = {"1": 1, "2": 2, "4": 4, "8": 8}
_TILE_ROWS = 32
_HEADER = (
    "A sequence whose length is no multiple of the block is not filled up with copies of its last token any more, and "
    "the tokens that importance is estimated from follow from `seed`, not from the process's random state.",
)


@dataclass(frozen=True)
class Note:
    """What a field means now, where that is not what it meant in the reference project."""

    path: Path
    text: str


@dataclass(frozen=True)
class Conversion:
    """The new file's text, in which every note stands as a comment above its field."""

    text: str
    notes: tuple[Note, ...]


def convert(path: str | os.PathLike[str]) -> Conversion:
    """Rewrites a file of the form that the reference project calls `attention_config.yaml`.

    The values stay what they are: only spellings that this project has another name for are replaced, and anchors
    and merge keys unfolded. The reference project's own comments are not kept.

    Raises:
        PresetError: with everything that is wrong with the file.
    """
    data, file = read(path)  # once, as a pipe can be read no second time
    book = book_of(data, file)
    node, _ = parse(decode(data, file), file)
    assert node is not None
    models: Any = node.plain()
    notes: list[Note] = []
    for model, fields in models.items():
        notes += _model_notes((model,), fields)
        for name, values in fields["attention_configs"].items():
            attention = book.get(model, name).attention
            if isinstance(attention, PyramidSparseAttention):
                here = (model, "attention_configs", name)
                notes += _preset_notes(here, values, attention)
                fields["attention_configs"][name] = _renamed(values)
    header = [
        f"# Converted from {printable(os.path.basename(file))}.",
        *(line for text in _HEADER for line in comment(text)),
    ]
    text = "\n".join([*header, write(models, {note.path: note.text for note in notes})])
    return Conversion(text, tuple(notes))


def _renamed(values: dict[str, object]) -> dict[str, object]:
    return {"min_full" if key == "min_full_attn_ratio" else key: value for key, value in values.items()}


def _model_notes(path: Path, fields: dict[str, Any]) -> Iterator[Note]:
    if "video_scale" in fields:
        yield Note(
            (*path, "video_scale"),
            "For estimates only: a run reads the token grid from the tensors that the model gets.",
        )
    if fields.get("text_length"):
        yield Note(
            (*path, "text_length"),
            "For estimates only: the number is read from the model. Text is protected wherever it stands, whatever "
            "the mask_mode.",
        )


def _preset_notes(path: Path, values: dict[str, Any], attention: PyramidSparseAttention) -> Iterator[Note]:
    if attention.use_rearrange:
        yield Note(
            (*path, "use_rearrange"),
            "Tokens are reordered once a forward, not in every layer, along a curve that makes no jumps on sizes "
            "that are no power of two.",
        )
    if "tile_n" in values["block_size"]:
        yield Note((*path, "block_size", "tile_n"), "A hint: the kernels choose their tiles to suit the device.")
    levels = _misread_levels(attention)
    if levels:
        yield Note(
            (*path, "block_size", "n"),
            f"At this size the reference project's kernel read rows of other blocks at level {' and '.join(levels)}; "
            "here every level reads its own block, so results differ.",
        )
    if "mask_ratios" in values:
        yield Note((*path, "mask_ratios"), " ".join(_about_ratios(values["mask_ratios"], attention)))
    if attention.warmup_steps:
        yield Note(
            (*path, "warmup_steps"),
            "Denoising steps, as the pipeline counts them: guidance, a second run and an aborted run change nothing.",
        )
    if "min_full_attn_ratio" in values:
        yield Note((*path, "min_full"), "Called min_full_attn_ratio before. Zero unless it is given, in both modes.")


def _misread_levels(attention: PyramidSparseAttention) -> list[str]:
    """The levels in use whose blocks have fewer rows than half a tile."""
    if attention.mask_ratios is None:
        return []
    block: BlockSize = attention.block_size
    ends = (0.0, *attention.mask_ratios.bounds)
    used = {name: end > start for name, start, end in zip(_POOLS, ends, ends[1:], strict=False)}
    return [name for name, pool in _POOLS.items() if used[name] and 2 * (block.n // pool) < _TILE_ROWS]


def _about_ratios(ratios: dict[str, object], attention: PyramidSparseAttention) -> Iterator[str]:
    missing = [name for name in (*_POOLS, "0") if name not in ratios]
    if attention.mask_mode == "thresholdbound":
        yield "The block that crosses a bound belongs to the finer side, so the most important block is never skipped."
        if not attention.min_full:
            yield "No share of the blocks is kept at level 1 unasked: `min_full: 0.06` is the reference's hidden floor."
    else:
        yield "Shares of the number of blocks, rounded up: a row keeps at least one block at level 1."
    if missing:
        yield f"A level left out (here {', '.join(missing)}) is an empty range and shifts no other level."
