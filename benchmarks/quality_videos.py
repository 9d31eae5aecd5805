"""Whole videos of the tiny model with a policy in place of its self-attention, as far from dense as they come out."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from quality_capture import Site, Size, sample
from quality_metrics import psnr, ssim
from quality_policies import Decision, Point, attend, decide
from torch import Tensor

from psa_integrations.tiny_wan.captions import evaluation_captions
from psa_integrations.tiny_wan.pipeline import TinyWanPipeline
from psa_masks import density

Pair = tuple[str, int]


def make_pairs(count: int) -> list[Pair]:
    """Prompts and seeds: the evaluation captions in turn, each pair with a seed of its own."""
    captions = [str(caption) for caption in evaluation_captions()]
    return [(captions[seed % len(captions)], seed) for seed in range(count)]


@dataclass(frozen=True)
class Run:
    """How videos are made: ``warmup`` of the ``steps`` are dense."""

    size: Size
    steps: int
    warmup: int
    batch: int

    def __post_init__(self) -> None:
        if not 0 <= self.warmup < self.steps:
            raise ValueError(f"--warmup must be at least 0 and below the {self.steps} steps, got {self.warmup}")


class PolicyAttention:
    """A policy as the self-attention of a run; one object makes one batch of videos."""

    def __init__(self, point: Point, run: Run) -> None:
        self._point, self._run = point, run
        self._grid = run.size.grid
        self._decisions: dict[tuple[int, int], Decision] = {}
        self._densities: list[Tensor] = []
        self._dense_calls = 0

    def __call__(self, site: Site, query: Tensor, key: Tensor, value: Tensor, dense: Callable[[], Tensor]) -> Tensor:
        if site.step < self._run.warmup:
            self._dense_calls += 1
            return dense()
        query, key = query.to(value.dtype), key.to(value.dtype)  # as psa_integrations does
        where = site.forward, site.layer
        if (site.step - self._run.warmup) % (self._point.row.reuse + 1) == 0:
            self._decisions[where] = decide(self._point, self._grid, query, key)
        decision = self._decisions[where]
        self._densities.append(density(decision.levels, decision.layout).mean(dim=1))
        return attend(decision, query, key, value)

    def densities(self) -> tuple[Tensor, Tensor]:
        """Executed density ``[B]`` of the sparse steps alone, and of all calls, the dense ones counted as 1."""
        total = torch.stack(self._densities).double().sum(dim=0)
        sparse_calls = len(self._densities)
        return total / sparse_calls, (total + self._dense_calls) / (sparse_calls + self._dense_calls)


def dense_videos(pipeline: TinyWanPipeline, pairs: Sequence[Pair], run: Run) -> list[Tensor]:
    """The batches of videos that all others are held against."""
    return [_video(sample(pipeline, batch, size=run.size, steps=run.steps)) for batch in _batches(pairs, run.batch)]


def compare(
    pipeline: TinyWanPipeline, point: Point, pairs: Sequence[Pair], dense: Sequence[Tensor], run: Run
) -> dict[str, object]:
    """Densities, and PSNR and SSIM of each pair's video against its dense one."""
    columns: dict[str, list[float]] = {"psnr": [], "ssim": []}
    of_sparse, of_all = [], []
    for batch, reference in zip(_batches(pairs, run.batch), dense, strict=True):
        attention = PolicyAttention(point, run)
        video = _video(sample(pipeline, batch, size=run.size, steps=run.steps, attend=attention))
        columns["psnr"] += psnr(video, reference).tolist()
        columns["ssim"] += ssim(video, reference).tolist()
        sparse, whole = attention.densities()
        of_sparse.append(sparse)
        of_all.append(whole)
    return {"density": float(torch.cat(of_sparse).mean()), "density_of_run": float(torch.cat(of_all).mean()), **columns}


def _video(frames: Tensor | None) -> Tensor:
    assert frames is not None
    return frames.float()


def _batches(pairs: Sequence[Pair], size: int) -> list[Sequence[Pair]]:
    return [pairs[start : start + size] for start in range(0, len(pairs), size)]
