"""Level maps as pictures."""

import struct
import zlib

import torch
from torch import Tensor

from psa_kernels import checks as kernel_checks
from psa_masks import checks

# Steps of viridis, whose lightness alone tells them apart: they hold for every colour vision and in grey. They are
# wider among levels 1 to 4, which most maps are made of. Entry 0 is for skipped blocks.
LEVEL_COLOURS: tuple[str, ...] = (
    "#e4e6ea",
    *("#440154", "#35608d", "#21918c", "#4ac16d", "#7ad151", "#a2da37", "#c2df23", "#dde318", "#fde725"),
)
"""`#rrggbb` of levels 0 (skipped) to 9 on a light ground: the finer, the darker."""
LEVEL_COLOURS_DARK: tuple[str, ...] = (
    "#23262d",
    *("#fde725", "#8fd744", "#35b779", "#21918c", "#2c7a8e", "#31688e", "#3f5590", "#4a4390", "#542f88"),
)
"""The same on a dark ground: the finer, the lighter."""


def level_image(levels: Tensor, *, cell: int = 1, dark: bool = False) -> Tensor:
    """A picture of a level map, query blocks downwards and KV blocks to the right.

    Args:
        levels: int8 ``[..., num_q_blocks, num_kv_blocks]``, 0 to 9.
        cell: pixels along each side of a block pair.
        dark: take LEVEL_COLOURS_DARK instead of LEVEL_COLOURS.

    Returns:
        uint8 ``[..., num_q_blocks * cell, num_kv_blocks * cell, 3]`` on the CPU.

    Raises:
        TypeError, ValueError: an argument breaks a rule above.
    """
    if not isinstance(levels, Tensor) or levels.dtype != torch.int8:
        kind = levels.dtype if isinstance(levels, Tensor) else type(levels).__name__
        raise TypeError(f"levels must be a torch.int8 tensor, got {kind}")
    kernel_checks.strided("levels", levels)
    if levels.ndim < 2 or 0 in levels.shape:
        raise ValueError(f"levels must have shape [..., num_q_blocks, num_kv_blocks], got {list(levels.shape)}")
    checks.integer("cell", cell, 1)
    checks.boolean("dark", dark)
    levels = levels.cpu()
    low, high = int(levels.min()), int(levels.max())
    if low < 0 or high > checks.MAX_BOUNDS:
        raise ValueError(f"levels must be in 0..{checks.MAX_BOUNDS}, got {low}..{high}")
    colours = LEVEL_COLOURS_DARK if dark else LEVEL_COLOURS
    palette = torch.tensor([list(bytes.fromhex(colour[1:])) for colour in colours], dtype=torch.uint8, device="cpu")
    image = palette[levels.long()]
    return image.repeat_interleave(cell, dim=-3).repeat_interleave(cell, dim=-2)


def encode_png(image: Tensor) -> bytes:
    """The bytes of a PNG file of a picture.

    Args:
        image: uint8 ``[height, width, 3]``.

    Raises:
        TypeError, ValueError: ``image`` is something else.

    The format is that of the W3C recommendation (PNG, third edition): eight bits a channel, no row filter.
    """
    if not isinstance(image, Tensor) or image.dtype != torch.uint8:
        kind = image.dtype if isinstance(image, Tensor) else type(image).__name__
        raise TypeError(f"image must be a torch.uint8 tensor, got {kind}")
    kernel_checks.strided("image", image)
    if image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise ValueError(f"image must have shape [height, width, 3], got {list(image.shape)}")
    height, width = image.shape[:2]
    filters = torch.zeros(height, 1, dtype=torch.uint8, device="cpu")
    rows = torch.cat((filters, image.cpu().reshape(height, width * 3)), dim=1)
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(rows.flatten().tolist()), 9)
    chunks = (_chunk(b"IHDR", header), _chunk(b"IDAT", pixels), _chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
