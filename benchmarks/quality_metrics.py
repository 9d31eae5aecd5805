"""How far from dense: the error of attention, the softmax mass read in full, PSNR and SSIM, and how sure that is."""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from quality_capture import Inputs
from quality_policies import Decision, Point, attend, decide, take
from torch import Tensor
from torch.nn.functional import conv2d, pad, scaled_dot_product_attention

from psa_kernels import BlockLayout
from psa_masks import VideoGrid, density

LARGEST_SCORES = 1 << 24
"""Attention weights held at once."""
SPREAD_QUERIES = 256
FEWEST = 8
"""Values from which an interval is given: fewer are too few to resample."""
MAX_PSNR = 100.0
"""In dB, of equal videos too: a mean over infinities says nothing."""


def weights(query: Tensor, key: Tensor) -> Tensor:
    """Softmax of ``query`` ``[B, H, M, D]`` over ``key`` ``[B, H, L, D]`` in float32, ``[B, H, M, L]``."""
    return (query.float() @ key.float().mT * query.shape[-1] ** -0.5).softmax(dim=-1)


def membership(length: int, block: int, device: torch.device) -> Tensor:
    """float32 ``[length, num_blocks]``: 1 where the token lies in the block."""
    blocks = torch.arange(length, device=device) // block
    return torch.nn.functional.one_hot(blocks, -(-length // block)).float()


def block_mass(query: Tensor, key: Tensor, layout: BlockLayout) -> Tensor:
    """Softmax mass of each block pair, float32 ``[B, H, num_q_blocks, num_kv_blocks]`` that adds up to 1 a head."""
    batch, heads, q_len, _ = query.shape
    q_member = membership(q_len, layout.block_q, query.device)
    kv_member = membership(key.shape[2], layout.block_kv, query.device)
    rows = max(1, LARGEST_SCORES // (batch * heads * key.shape[2]))
    total = torch.zeros((), device=query.device)
    for start in range(0, q_len, rows):
        seen = weights(query[:, :, start : start + rows], key) @ kv_member
        total = total + q_member[start : start + rows].mT @ seen
    return total / q_len


@dataclass(frozen=True)
class Measured:
    """Of one attention, float32 ``[B]`` each: relative error, executed density, softmax mass of level-1 blocks."""

    error: Tensor
    density: Tensor
    mass: Tensor


class Case:
    """One attention, with what all policies are held against computed once."""

    def __init__(self, inputs: Inputs, grid: VideoGrid) -> None:
        self.inputs, self.grid = inputs, grid
        self._mass: dict[tuple[str, int, int, int], Tensor] = {}

    @cached_property
    def dense(self) -> Tensor:
        inputs = self.inputs
        return scaled_dot_product_attention(inputs.query.float(), inputs.key.float(), inputs.value.float())

    def measure(self, point: Point, before: Inputs | None = None) -> Measured:
        """The policy on this attention, its levels chosen from ``before``, an earlier step's, if that is given."""
        inputs = self.inputs
        seen = inputs if before is None else before
        decision = decide(point, self.grid, seen.query, seen.key, seen.value)
        out = attend(decision, inputs.query, inputs.key, inputs.value).float()
        error = (out - self.dense).flatten(1).norm(dim=1) / self.dense.flatten(1).norm(dim=1)
        full = (self._mass_of(point, decision, seen.step) * (decision.levels == 1)).sum(dim=(-1, -2))
        return Measured(error, density(decision.levels, decision.layout).mean(dim=1), full.mean(dim=1))

    def _mass_of(self, point: Point, decision: Decision, seen_step: int) -> Tensor:
        layout = decision.layout
        name = (point.row.order, seen_step, layout.block_q, layout.block_kv)  # all that the order of tokens follows
        if name not in self._mass:
            query, key = take(self.inputs.query, decision.q_index), take(self.inputs.key, decision.kv_index)
            self._mass[name] = block_mass(query, key, layout)
        return self._mass[name]


def geometric_mean(errors: Sequence[Tensor]) -> Tensor:
    """Of errors ``[B]``, one of each layer and step, for each sample; an exact 0 counts as the smallest number."""
    stacked = torch.stack(list(errors)).double().clamp(min=torch.finfo(torch.float32).tiny)
    return stacked.log().mean(dim=0).exp()


def spread(query: Tensor, key: Tensor) -> dict[str, float]:
    """How concentrated attention is, over ``SPREAD_QUERIES`` queries evenly apart.

    ``effective`` is exp(entropy) / kv_len, the mean over queries, heads and samples: 1 where all keys count alike,
    1 / kv_len where one key is all. ``top5`` and ``top15`` are the mass of the best 5% and 15% of the keys.
    """
    every = max(1, query.shape[2] // SPREAD_QUERIES)
    mass = weights(query[:, :, ::every], key)
    kv_len = key.shape[2]
    entropy = -torch.special.xlogy(mass, mass).sum(dim=-1)
    ordered = mass.sort(dim=-1, descending=True).values.cumsum(dim=-1)
    found = {"effective": float(entropy.exp().mean() / kv_len)}
    for percent in (5, 15):
        found[f"top{percent}"] = float(ordered[..., math.ceil(kv_len * percent / 100) - 1].mean())
    return found


def psnr(video: Tensor, reference: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of each video ``[B, F, C, H, W]`` in [0, 1]; ``[B]``, at most ``MAX_PSNR``."""
    error = (video - reference).square().flatten(1).mean(dim=1)
    return (-10.0 * error.log10()).clamp(max=MAX_PSNR)


def ssim(video: Tensor, reference: Tensor) -> Tensor:
    """Mean structural similarity of the frames of each video ``[B, F, C, H, W]`` in [0, 1]; ``[B]``.

    Wang et al. 2004: a Gaussian window of 11 pixels and sigma 1.5, frames mirrored at their edges, each channel alone.
    As torchmetrics computes it, which not every machine that measures has.

    Raises:
        ValueError: a side is shorter than the window.
    """
    if min(video.shape[-2:]) < 11:
        raise ValueError(f"video must be at least 11 pixels on a side, got {list(video.shape[-2:])}")
    batch = video.shape[0]
    x, y = (pad(frames.flatten(0, 2)[:, None], (5, 5, 5, 5), mode="reflect") for frames in (video, reference))
    places = torch.arange(-5, 6, dtype=x.dtype, device=x.device)
    window = torch.exp(-0.5 * (places / 1.5) ** 2)
    window = window / window.sum()

    def local_mean(image: Tensor) -> Tensor:
        return conv2d(conv2d(image, window.view(1, 1, 11, 1)), window.view(1, 1, 1, 11))

    mean_x, mean_y = local_mean(x), local_mean(y)
    var_x = (local_mean(x * x) - mean_x**2).clamp(min=0)
    var_y = (local_mean(y * y) - mean_y**2).clamp(min=0)
    covariance = local_mean(x * y) - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    similarity = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    similarity = similarity / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))
    return similarity.view(batch, -1).mean(dim=1)


def interval(values: Sequence[float], *, draws: int = 2000, seed: int = 0) -> tuple[float, float, float]:
    """Mean, and the ends of its 95% bootstrap interval by percentiles; below ``FEWEST`` values the ends are the mean.

    Raises:
        ValueError: there is no value.
    """
    if not values:
        raise ValueError("values must not be empty")
    mean = math.fsum(values) / len(values)
    if len(values) < FEWEST:
        return mean, mean, mean
    chance = random.Random(seed)
    means = sorted(math.fsum(chance.choices(values, k=len(values))) / len(values) for _ in range(draws))
    return mean, means[round(0.025 * (draws - 1))], means[round(0.975 * (draws - 1))]


def geometric_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """`interval` of the logarithms: the geometric mean and its ends."""
    mean, low, high = interval([math.log(value) for value in values])
    return math.exp(mean), math.exp(low), math.exp(high)
