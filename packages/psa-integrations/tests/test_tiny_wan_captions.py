"""Captions: what a prompt means, what it may not say."""

from typing import Any

import pytest
import torch

from psa_integrations.tiny_wan.captions import (
    BACKGROUNDS,
    COLOURS,
    DIRECTIONS,
    SHAPES,
    VOCABULARY,
    Caption,
    encode_captions,
    evaluation_captions,
    parse_caption,
)


def test_a_full_caption() -> None:
    expected = Caption("red", "circle", "right", "striped")
    assert parse_caption("a red circle moving right on a striped background") == expected
    assert parse_caption("  On the STRIPED background: a Red, circle... moving right!") == expected


def test_synonyms_mean_the_word_of_the_vocabulary() -> None:
    assert parse_caption("a violet disc moving upwards over dots") == Caption("purple", "circle", "up", "dotted")


def test_slots_may_be_empty() -> None:
    assert parse_caption("") == Caption()
    assert parse_caption("a red circle moving right") == Caption("red", "circle", "right", None)


@pytest.mark.parametrize("caption", evaluation_captions(), ids=str)
def test_the_text_of_a_caption_parses_back(caption: Caption) -> None:
    assert parse_caption(str(caption)) == caption


def test_partial_captions_have_text_that_parses_back() -> None:
    for caption in (Caption(), Caption(colour="blue"), Caption(direction="up"), Caption(background="wavy")):
        assert parse_caption(str(caption)) == caption


def test_an_unknown_word_is_named_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="'elephant'") as error:
        parse_caption("a red elephant moving right")
    assert all(word in str(error.value) for word in (*COLOURS, *SHAPES, *DIRECTIONS, *BACKGROUNDS))


def test_two_words_for_one_slot_are_refused() -> None:
    with pytest.raises(ValueError, match="one direction, got 'left' and 'right'"):
        parse_caption("a red circle moving left to right")
    assert parse_caption("a red red circle").colour == "red"


def test_a_prompt_must_be_text() -> None:
    wrong: Any = 3
    with pytest.raises(TypeError, match="prompt must be a string, got int"):
        parse_caption(wrong)


def test_encoding_gives_each_slot_its_word() -> None:
    ids = encode_captions(["a pink ring moving down on a wavy background", "a square"])
    assert ids.dtype == torch.int64
    assert [[VOCABULARY[i] for i in row] for row in ids.tolist()] == [
        ["pink", "ring", "down", "wavy"],
        ["", "square", "", ""],
    ]


def test_the_evaluation_grid_covers_every_word_and_every_colour_with_every_direction() -> None:
    grid = evaluation_captions()
    assert len(grid) == len(set(grid)) == 32
    assert {(c.colour, c.direction) for c in grid} == {(c, d) for c in COLOURS for d in DIRECTIONS}
    assert {c.shape for c in grid} == set(SHAPES)
    assert {c.background for c in grid} == set(BACKGROUNDS)
