"""The captions the tiny model understands: one moving shape on a textured background.

A caption has four slots, colour, shape, direction and background, and any of them may be left out. Everything
else in a prompt is either a filler word, which is ignored, or an error.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch

COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink")
SHAPES = ("circle", "square", "triangle", "ring")
DIRECTIONS = ("left", "right", "up", "down")
BACKGROUNDS = ("striped", "checkered", "dotted", "wavy")

SLOTS: dict[str, tuple[str, ...]] = {
    "colour": COLOURS,
    "shape": SHAPES,
    "direction": DIRECTIONS,
    "background": BACKGROUNDS,
}
ABSENT = 0
VOCABULARY = ("", *COLOURS, *SHAPES, *DIRECTIONS, *BACKGROUNDS)

_SYNONYMS = {
    "violet": "purple", "magenta": "pink", "turquoise": "cyan",
    "disc": "circle", "disk": "circle", "ball": "circle", "box": "square", "donut": "ring",
    "leftward": "left", "leftwards": "left", "rightward": "right", "rightwards": "right",
    "upward": "up", "upwards": "up", "downward": "down", "downwards": "down",
    "stripes": "striped", "checks": "checkered", "checked": "checkered", "chequered": "checkered",
    "dots": "dotted", "waves": "wavy",
}  # fmt: skip
_FILLERS = frozenset(
    {
        "a", "an", "the", "this", "one", "on", "in", "to", "with", "and", "of", "over", "is", "are", "that",
        "which", "moving", "moves", "move", "going", "goes", "travelling", "across", "towards", "toward",
        "background", "backdrop", "pattern", "video", "clip", "shape",
    }
)  # fmt: skip
_SLOT_OF = {word: slot for slot, words in SLOTS.items() for word in words}
_IDS = {word: index for index, word in enumerate(VOCABULARY)}


@dataclass(frozen=True)
class Caption:
    """What a prompt says; None where it leaves the choice to the model."""

    colour: str | None = None
    shape: str | None = None
    direction: str | None = None
    background: str | None = None

    @property
    def ids(self) -> tuple[int, ...]:
        """One vocabulary index a slot, `ABSENT` for an empty one."""
        words = (getattr(self, field.name) for field in fields(self))
        return tuple(ABSENT if word is None else _IDS[word] for word in words)

    def __str__(self) -> str:
        words = [self.colour, self.shape or "shape"]
        if self.direction:
            words += ["moving", self.direction]
        if self.background:
            words += ["on a", self.background, "background"]
        return " ".join(["a", *filter(None, words)])


def parse_caption(prompt: str, argument: str = "prompt") -> Caption:
    """Reads a prompt such as "a red circle moving right on a striped background".

    Case, punctuation, word order and filler words do not matter; an empty prompt is an empty caption. `argument` is
    what errors call it.

    Raises:
        TypeError: `prompt` is no string.
        ValueError: a word is neither known nor a filler, or two words fill one slot.
    """
    if not isinstance(prompt, str):
        raise TypeError(f"{argument} must be a string, got {type(prompt).__name__}")
    found: dict[str, str] = {}
    for raw in re.findall(r"[^\W_]+", prompt.lower()):
        word = _SYNONYMS.get(raw, raw)
        if word in _FILLERS:
            continue
        slot = _SLOT_OF.get(word)
        if slot is None:
            known = "; ".join(f"{name}: {', '.join(words)}" for name, words in SLOTS.items())
            raise ValueError(f"{argument} has the word {raw!r}, which the tiny model does not know. It knows {known}")
        if found.setdefault(slot, word) != word:
            raise ValueError(f"{argument} must name one {slot}, got {found[slot]!r} and {word!r}")
    return Caption(**found)


def encode_captions(prompts: Sequence[str], argument: str = "prompt") -> torch.Tensor:
    """Prompts to vocabulary indices, int64 [len(prompts), 4]; raises as `parse_caption` does."""
    ids = [parse_caption(prompt, argument).ids for prompt in prompts]
    return torch.tensor(ids, dtype=torch.int64).reshape(-1, len(SLOTS))


def direction_vectors(ids: torch.Tensor) -> torch.Tensor:
    """The way that captions point: int64 [B, 4] vocabulary indices to float32 [B, 2], right and down positive."""
    steps = torch.zeros(len(VOCABULARY), 2, device=ids.device)
    for word, axis, step in (("left", 0, -1), ("right", 0, 1), ("up", 1, -1), ("down", 1, 1)):
        steps[_IDS[word], axis] = step
    return steps[ids].sum(dim=1)


def evaluation_captions() -> list[Caption]:
    """Every colour with every direction, 32 captions, going round the shapes and backgrounds alike."""
    captions = []
    for c, colour in enumerate(COLOURS):
        for d, direction in enumerate(DIRECTIONS):
            background = BACKGROUNDS[(c + d) % len(BACKGROUNDS)]
            captions.append(Caption(colour, SHAPES[(c // 2 + d) % len(SHAPES)], direction, background))
    return captions
