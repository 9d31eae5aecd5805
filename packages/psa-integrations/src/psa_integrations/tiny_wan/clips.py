"""Draws the training clips: one coloured shape crossing a grey textured background in a straight line."""

import torch

from psa_integrations.tiny_wan.captions import ABSENT, BACKGROUNDS, COLOURS, DIRECTIONS, SHAPES, SLOTS

# Saturated and far apart: neither a grey background nor an anti-aliased edge passes for one of them.
PALETTE = torch.tensor(
    [
        [0.90, 0.10, 0.10],
        [1.00, 0.55, 0.05],
        [0.95, 0.92, 0.15],
        [0.10, 0.75, 0.20],
        [0.10, 0.85, 0.90],
        [0.12, 0.25, 0.95],
        [0.55, 0.12, 0.80],
        [1.00, 0.40, 0.75],
    ]
)


def draw_attributes(batch: int, generator: torch.Generator) -> torch.Tensor:
    """Uniform colours, shapes, directions and backgrounds: int64 [batch, 4] on the generator's device."""
    columns = [
        torch.randint(len(words), (batch,), generator=generator, device=generator.device) for words in SLOTS.values()
    ]
    return torch.stack(columns, dim=1)


def caption_ids(attributes: torch.Tensor) -> torch.Tensor:
    """Attributes [B, 4] as the vocabulary indices of the full caption, int64 [B, 4]."""
    sizes = torch.tensor([1, len(COLOURS), len(SHAPES), len(DIRECTIONS)], device=attributes.device)
    return attributes + sizes.cumsum(0)


def drop_words(ids: torch.Tensor, generator: torch.Generator, *, caption: float, word: float) -> torch.Tensor:
    """Empties whole captions with probability `caption` and single slots with probability `word`."""
    device = generator.device
    drop = torch.rand(ids.shape, generator=generator, device=device) < word
    drop |= torch.rand((len(ids), 1), generator=generator, device=device) < caption
    return ids.masked_fill(drop, ABSENT)


def draw_clips(
    attributes: torch.Tensor, *, frames: int, height: int, width: int, generator: torch.Generator
) -> torch.Tensor:
    """Draws one clip a row of `attributes`.

    Args:
        attributes: int64 [B, 4] as `draw_attributes` gives, on the generator's device.
        frames, height, width: size of the clips, in frames and pixels.
        generator: draws size, path and texture of each clip.

    Returns:
        float32 [B, 3, frames, height, width] in [-1, 1].
    """
    colour, shape, direction, background = attributes.unbind(1)
    mask = _shape_mask(shape, direction, frames, height, width, generator)
    behind = _texture(background, height, width, generator)
    palette = PALETTE.to(attributes.device)[colour]
    painted = torch.lerp(behind[:, :, None], palette[:, :, None, None, None], mask[:, None])
    return painted * 2 - 1


def _uniform(batch: int, low: float, high: float, generator: torch.Generator) -> torch.Tensor:
    draw = torch.rand(batch, generator=generator, device=generator.device)
    return low + (high - low) * draw


def _shape_mask(
    shape: torch.Tensor,
    direction: torch.Tensor,
    frames: int,
    height: int,
    width: int,
    generator: torch.Generator,
) -> torch.Tensor:
    """Coverage of each pixel by the shape, float32 [B, F, H, W] in [0, 1]."""
    batch, device = len(shape), shape.device
    radius = min(height, width) * _uniform(batch, 0.14, 0.19, generator)
    margin = 1.1 * radius + 1
    room = torch.stack([width - 2 * margin, height - 2 * margin])
    # A shape crosses most of the frame, so no sample is ambiguous about where it went.
    travel = room * _uniform(batch, 0.7, 1.0, generator)
    vertical = (direction >= DIRECTIONS.index("up")).long()
    moves = torch.stack([vertical == 0, vertical == 1])
    start = (room - travel * moves) * torch.rand((2, batch), generator=generator, device=device)
    progress = torch.linspace(0, 1, frames, device=device).expand(batch, frames)
    backwards = (direction == DIRECTIONS.index("left")) | (direction == DIRECTIONS.index("up"))
    progress = torch.where(backwards[:, None], 1 - progress, progress)
    path = (margin + start)[..., None] + (travel * moves)[..., None] * progress

    def offsets(axis: int, size: int) -> torch.Tensor:
        pixels = torch.arange(size, device=device) + 0.5
        return (pixels - path[axis][..., None]) / radius[:, None, None]

    dx = offsets(0, width)[:, :, None, :]
    dy = offsets(1, height)[:, :, :, None]
    distance = torch.hypot(dx, dy)
    signed = torch.stack(
        [
            distance - 1,
            torch.maximum(dx.abs(), dy.abs()) - 0.87,
            torch.maximum(dy - 0.55, 0.866 * dx.abs() - 0.5 * dy - 0.55),
            (distance - 0.72).abs() - 0.28,
        ]
    )
    chosen = signed[shape, torch.arange(batch, device=device)]
    return (0.5 - chosen * radius[:, None, None, None]).clamp(0, 1)


def _texture(kind: torch.Tensor, height: int, width: int, generator: torch.Generator) -> torch.Tensor:
    """Still grey backgrounds, float32 [B, 3, H, W] in [0, 1]."""
    batch, device = len(kind), kind.device

    def draw(low: float, high: float) -> torch.Tensor:
        return _uniform(batch, low, high, generator)[:, None, None]

    period = draw(9, 15)
    x = torch.arange(width, device=device)[None, None, :] / period + draw(0, 1)
    y = torch.arange(height, device=device)[None, :, None] / period + draw(0, 1)
    angle = draw(0, torch.pi)
    turn = 2 * torch.pi
    to_dot = torch.hypot(x % 1 - 0.5, y % 1 - 0.5)
    patterns = torch.stack(
        [
            torch.tanh(2 * torch.sin(turn * (x * angle.cos() + y * angle.sin()))),
            torch.tanh(3 * torch.sin(turn * x / 1.4) * torch.sin(turn * y / 1.4)),
            2 * ((0.3 - to_dot) * period + 0.5).clamp(0, 1) - 1,
            torch.sin(turn * y + 1.5 * torch.sin(turn * x / 2.2)),
        ]
    )
    assert len(patterns) == len(BACKGROUNDS)
    pattern = patterns[kind, torch.arange(batch, device=device)]
    grey = draw(0.3, 0.5) + draw(0.08, 0.16) * pattern
    tint = torch.rand((batch, 3, 1, 1), generator=generator, device=device) * 0.06 - 0.03
    return grey[:, None] + tint
