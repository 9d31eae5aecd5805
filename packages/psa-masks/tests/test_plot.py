import struct
import zlib

import pytest
import torch

from psa_masks.plot import LEVEL_COLOURS, LEVEL_COLOURS_DARK, encode_png, level_image


def luminance(colour: str) -> float:
    """Relative luminance as WCAG 2 defines it."""
    parts = [channel / 255 for channel in bytes.fromhex(colour[1:])]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def decode_png(png: bytes) -> torch.Tensor:
    """Pixels of a PNG of eight bits, three channels and unfiltered rows; checks lengths and checksums."""
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    chunks, at = {}, 8
    while at < len(png):
        (length,) = struct.unpack(">I", png[at : at + 4])
        kind, content = png[at + 4 : at + 8], png[at + 8 : at + 8 + length]
        assert struct.unpack(">I", png[at + 8 + length : at + 12 + length]) == (zlib.crc32(kind + content),)
        chunks[kind] = content
        at += 12 + length
    assert list(chunks) == [b"IHDR", b"IDAT", b"IEND"]
    width, height, *form = struct.unpack(">IIBBBBB", chunks[b"IHDR"])
    assert form == [8, 2, 0, 0, 0]
    rows = torch.tensor(list(zlib.decompress(chunks[b"IDAT"])), dtype=torch.uint8).view(height, 1 + 3 * width)
    assert (rows[:, 0] == 0).all()
    return rows[:, 1:].reshape(height, width, 3)


@pytest.mark.parametrize("dark", [False, True])
def test_each_block_pair_has_the_colour_of_its_level(dark: bool) -> None:
    levels = torch.tensor([[[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]], dtype=torch.int8)
    image = level_image(levels, cell=3, dark=dark)
    assert image.shape == (1, 6, 15, 3)
    assert image.dtype == torch.uint8
    colours = LEVEL_COLOURS_DARK if dark else LEVEL_COLOURS
    for y in range(6):
        for x in range(15):
            level = levels[0, y // 3, x // 3].item()
            assert "#" + bytes(image[0, y, x].tolist()).hex() == colours[level]


@pytest.mark.parametrize(("colours", "sign"), [(LEVEL_COLOURS, 1), (LEVEL_COLOURS_DARK, -1)], ids=["light", "dark"])
def test_lightness_alone_tells_the_levels_apart(colours: tuple[str, ...], sign: int) -> None:
    lightness = [sign * luminance(colour) for colour in colours]
    assert len(colours) == 10
    assert lightness[1:] == sorted(lightness[1:])
    assert len(set(lightness)) == len(lightness)


def test_a_png_holds_the_picture() -> None:
    image = torch.randint(0, 256, (5, 7, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    assert torch.equal(decode_png(encode_png(image)), image)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: level_image(torch.zeros(2, 2)), TypeError, "levels must be a torch.int8 tensor, got torch.float32"),
        (lambda: level_image(torch.zeros(2, dtype=torch.int8)), ValueError, r"levels must have shape .* got \[2\]"),
        (lambda: level_image(torch.full((1, 1), 10, dtype=torch.int8)), ValueError, r"in 0\.\.9, got 10\.\.10"),
        (lambda: level_image(torch.zeros(1, 1, dtype=torch.int8), cell=0), ValueError, "cell must be at least 1"),
        (lambda: level_image(torch.zeros(1, 1, dtype=torch.int8), dark=1), TypeError, "dark must be a bool, got 1"),
        (lambda: encode_png([[0]]), TypeError, "image must be a torch.uint8 tensor, got list"),
        (
            lambda: encode_png(torch.zeros(2, 3, dtype=torch.uint8)),
            ValueError,
            r"image must have shape .* got \[2, 3\]",
        ),
    ],
    ids=range(7),
)
def test_what_is_no_map_or_picture_is_refused(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call()


def test_pictures_lie_on_the_cpu_whatever_the_default_device() -> None:
    levels = torch.tensor([[1, 0], [2, 3]], dtype=torch.int8)
    with torch.device("meta"):
        image = level_image(levels)
        png = encode_png(image)
    assert torch.equal(decode_png(png), level_image(levels))
