"""Queries, keys and values made of smooth random fields: attention whose nature is set by three numbers."""

import itertools
from dataclasses import dataclass

import torch
from quality_capture import Inputs
from torch import Tensor

from psa_masks import VideoGrid

ALIKE = 0.5
"""Share of the variance that queries and keys have in common, which makes near tokens attend to each other."""


@dataclass(frozen=True)
class Field:
    """What the tensors are like.

    Args:
        smoothness: standard deviation, in tokens, of the Gaussian that blurs white noise along each axis. Values d
            tokens apart correlate by ``exp(-d**2 / (4 smoothness**2))``; 0 is white noise.
        noise: share of the variance, in [0, 1], that is white noise after all.
        sharpness: standard deviation of the logits of unrelated tokens.
    """

    smoothness: float
    noise: float
    sharpness: float

    def __post_init__(self) -> None:
        for name, low, high in (("smoothness", 0.0, None), ("noise", 0.0, 1.0), ("sharpness", 0.0, None)):
            value = getattr(self, name)
            if not (value >= low and (high is None or value <= high)):
                rule = f"at least {low:g}" if high is None else f"in [{low:g}, {high:g}]"
                raise ValueError(f"{name} must be {rule}, got {value!r}")

    def __str__(self) -> str:
        return f"smoothness {self.smoothness:g}, noise {self.noise:g}, sharpness {self.sharpness:g}"


FIELDS = tuple(
    Field(smoothness, noise, sharpness)
    for smoothness, noise, sharpness in itertools.product((1.0, 3.0), (0.05, 0.4), (1.0, 2.0))
)


def blur(size: int, smoothness: float) -> Tensor:
    """float32 ``[size, size]``: Gaussian weights whose squares add up to 1 in every row, so variance stays."""
    if smoothness == 0.0:
        return torch.eye(size)
    places = torch.arange(size)
    weights = torch.exp(-0.5 * ((places[:, None] - places) / smoothness) ** 2)
    return weights / weights.norm(dim=1, keepdim=True)


def smooth_field(grid: VideoGrid, shape: tuple[int, ...], field: Field, generator: torch.Generator) -> Tensor:
    """float32 ``[*shape, grid.video_len]`` of variance 1 on the CPU, smooth over the grid, as ``field`` says."""
    smooth, noise = (torch.randn((*shape, *grid.shape), generator=generator) for _ in range(2))
    for axis, size in zip((-3, -2, -1), grid.shape, strict=True):
        smooth = (smooth.transpose(axis, -1) @ blur(size, field.smoothness).T).transpose(axis, -1)
    mixed = (1.0 - field.noise) ** 0.5 * smooth + field.noise**0.5 * noise
    return mixed.flatten(start_dim=-3)


def make_inputs(
    grid: VideoGrid, field: Field, *, batch: int = 2, heads: int = 4, head_dim: int = 64, seed: int = 0
) -> Inputs:
    """float32 query, key and value ``[batch, heads, grid.video_len, head_dim]`` on the CPU.

    The same noise is drawn for every ``field``, so that fields of one seed differ in what they are set to alone.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    common, query, key, value = (smooth_field(grid, (batch, heads, head_dim), field, generator).mT for _ in range(4))
    query, key = (ALIKE**0.5 * common + (1.0 - ALIKE) ** 0.5 * own for own in (query, key))
    return Inputs(0, 0, field.sharpness * query.contiguous(), key.contiguous(), value.contiguous())
