"""Drawn clips show what their caption says, and the rule-based check reads it back."""

import pytest
import torch

from psa_integrations.tiny_wan.captions import (
    ABSENT,
    BACKGROUNDS,
    COLOURS,
    DIRECTIONS,
    SHAPES,
    VOCABULARY,
    Caption,
)
from psa_integrations.tiny_wan.clips import PALETTE, caption_ids, draw_attributes, draw_clips, drop_words
from psa_integrations.tiny_wan.evaluate import (
    Reading,
    Sample,
    check_the_check,
    contact_sheet,
    markdown_table,
    read_video,
    totals,
)


def every_attribute() -> torch.Tensor:
    """Every colour with every direction, all shapes and backgrounds among them."""
    rows = [
        (c, (c + d) % len(SHAPES), d, (c // 2 + d) % len(BACKGROUNDS))
        for c in range(len(COLOURS))
        for d in range(len(DIRECTIONS))
    ]
    return torch.tensor(rows)


@pytest.mark.parametrize("size", [(16, 64, 64), (24, 64, 96)], ids=str)
def test_every_colour_and_direction_is_read_back(size: tuple[int, int, int]) -> None:
    frames, height, width = size
    attributes = every_attribute()
    generator = torch.Generator().manual_seed(1)
    clips = draw_clips(attributes, frames=frames, height=height, width=width, generator=generator)
    assert clips.shape == (len(attributes), 3, *size)
    assert clips.dtype == torch.float32
    assert clips.abs().max() <= 1
    for row, clip in zip(attributes.tolist(), clips, strict=True):
        reading = read_video((clip / 2 + 0.5).permute(1, 2, 3, 0))
        assert reading == Reading(COLOURS[row[0]], DIRECTIONS[row[2]])


def test_clips_depend_on_the_generator_alone() -> None:
    def draw(seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return draw_clips(every_attribute()[:4], frames=4, height=32, width=32, generator=generator)

    before = torch.get_rng_state()
    assert torch.equal(draw(0), draw(0))
    assert not torch.equal(draw(0), draw(1))
    assert torch.equal(torch.get_rng_state(), before)


def test_caption_ids_are_the_words_of_the_attributes() -> None:
    ids = caption_ids(torch.tensor([[0, 0, 0, 0], [7, 3, 3, 3]]))
    words = [[VOCABULARY[i] for i in row] for row in ids.tolist()]
    assert words == [["red", "circle", "left", "striped"], ["pink", "ring", "down", "wavy"]]


def test_dropping_words() -> None:
    generator = torch.Generator().manual_seed(0)
    ids = caption_ids(draw_attributes(512, generator))
    assert torch.equal(drop_words(ids, generator, caption=0, word=0), ids)
    assert not drop_words(ids, generator, caption=1, word=0).any()
    some = drop_words(ids, generator, caption=0.5, word=0)
    empty = (some == ABSENT).all(1)
    assert 0 < empty.sum() < len(ids)
    assert torch.equal(some[~empty], ids[~empty])


def test_the_check_sees_nothing_in_grey_and_no_direction_in_a_still() -> None:
    grey = torch.full((8, 32, 32, 3), 0.4)
    assert read_video(grey) == Reading(None, None)
    still = grey.clone()
    still[:, 8:16, 8:16] = PALETTE[COLOURS.index("green")]
    assert read_video(still) == Reading("green", None)


def test_the_check_is_not_fooled_by_a_wrong_caption() -> None:
    sample = Sample(Caption("red", "circle", "left"), Reading("red", "right"))
    assert sample.colour_right
    assert not sample.direction_right
    right = Sample(Caption("red", "circle", "left"), Reading("red", "left"))
    assert totals([sample, right]) == (1.0, 0.5, 0.5)
    table = markdown_table([sample, right], "Title")
    assert "both 50%" in table
    assert "| a red circle moving left | red | right | no |" in table


def test_the_check_is_right_on_drawn_clips() -> None:
    assert check_the_check(16, 64, 64, clips=64) == 1.0


def test_a_contact_sheet_holds_every_video() -> None:
    videos = torch.stack([torch.full((8, 4, 6, 3), i / 4) for i in range(5)])
    sheet = contact_sheet(videos, shown=2)
    assert sheet.shape == (3 * 4, 2 * 2 * 6, 3)
    assert sorted(set(sheet.ravel().tolist())) == [0, 64, 128, 191, 255]
