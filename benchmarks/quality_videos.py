"""Whole videos of the tiny model with a policy in place of its self-attention, as far from dense as they come out."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from quality_capture import Attend, Site, Size, sample
from quality_metrics import psnr, ssim
from quality_policies import BLOCK, Decision, Point, Row, attend, decide
from torch import Tensor

from psa_integrations.tiny_wan.captions import evaluation_captions
from psa_integrations.tiny_wan.pipeline import FLOW_SHIFT, TinyWanPipeline
from psa_masks import density

Pair = tuple[str, int]


def make_pairs(count: int) -> list[Pair]:
    """Prompts and seeds: the evaluation captions in turn, each pair with a seed of its own."""
    captions = [str(caption) for caption in evaluation_captions()]
    return [(captions[seed % len(captions)], seed) for seed in range(count)]


@dataclass(frozen=True)
class Run:
    """How videos are made: ``warmup`` of the ``steps`` are dense; ``shift`` and ``guidance`` are the pipeline's own
    unless given."""

    size: Size
    steps: int
    warmup: int
    batch: int
    shift: float = FLOW_SHIFT
    guidance: float = 3.0

    def __post_init__(self) -> None:
        if not 0 <= self.warmup < self.steps:
            raise ValueError(f"--warmup must be at least 0 and below the {self.steps} steps, got {self.warmup}")

    def all_dense(self) -> "Run":
        """The run that makes the dense videos of this one."""
        return replace(self, warmup=0)

    def make(self, pipeline: TinyWanPipeline, pairs: Sequence[Pair], attend: Attend | None = None) -> Tensor:
        """Videos ``[B, F, 3, H, W]`` in [0, 1] of a batch of pairs."""
        own = pipeline.scheduler
        # Not by `set_shift`, which leaves the least noise level where the old shift had it.
        pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=self.shift)
        try:
            frames = sample(pipeline, pairs, size=self.size, steps=self.steps, guidance=self.guidance, attend=attend)
        finally:
            pipeline.scheduler = own
        assert frames is not None, "a run without a last step ends with a video"
        return frames.float()

    def noise_after_warmup(self) -> float:
        """Noise level in [0, 1] that the first sparse step sees; 1 is noise alone."""
        scheduler = FlowMatchEulerDiscreteScheduler(shift=self.shift)
        scheduler.set_timesteps(self.steps)
        return float(scheduler.sigmas[self.warmup])


@dataclass(frozen=True)
class Circumstances:
    """What a video is made under, beside the policy; the defaults are those of the part ``videos``."""

    name: str
    shift: float = FLOW_SHIFT
    steps: int = 20
    warmup: int = 5
    guidance: float = 3.0
    order: str = "Gilbert"
    block: int = BLOCK
    samples: int | None = None

    def run(self, size: Size, batch: int) -> Run:
        return Run(size, self.steps, self.warmup, batch, self.shift, self.guidance)

    def changed(self, row: Row) -> Row:
        """The row under these circumstances, at its first point alone."""
        samples = self.block // 4 if self.samples is None else self.samples
        own = {"block_q": self.block, "block_kv": self.block, "samples_q": samples, "samples_kv": samples}
        return replace(row, order=self.order_of(row), sweep=(), settings={**row.settings, **own})

    def order_of(self, row: Row) -> str:
        """The order of the tokens; a row that sorts keys by a k-d tree does so within these blocks."""
        if row.order == "Gilbert" or self.order == "Gilbert":
            return row.order if self.order == "Gilbert" else self.order
        return f"{row.order} in {self.order}"


CIRCUMSTANCES = (
    Circumstances("as above"),
    Circumstances("flow shift 3", shift=3.0),
    Circumstances("8 of 20 steps dense", warmup=8),
    Circumstances("12 of 20 steps dense", warmup=12),
    Circumstances("flow shift 3, 8 of 20 steps dense", shift=3.0, warmup=8),
    Circumstances("10 of 40 steps dense", steps=40, warmup=10),
    Circumstances("no guidance", guidance=1.0),
    Circumstances("cubes 4x4x4", order="cubes 4x4x4"),
    Circumstances("blocks of 32", block=32),
    Circumstances("blocks of 128", block=128),
    Circumstances("every token as a sample", samples=BLOCK),
    Circumstances("shift 3, cubes, every token as a sample", shift=3.0, order="cubes 4x4x4", samples=BLOCK),
)
"""The last one is that of the trial that promised 8 dB; the others change one or two things."""


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
            self._decisions[where] = decide(self._point, self._grid, query, key, value)
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
    return [run.make(pipeline, batch) for batch in _batches(pairs, run.batch)]


def compare(
    pipeline: TinyWanPipeline, point: Point, pairs: Sequence[Pair], dense: Sequence[Tensor], run: Run
) -> dict[str, object]:
    """Densities, and PSNR and SSIM of each pair's video against its dense one."""
    columns: dict[str, list[float]] = {"psnr": [], "ssim": []}
    of_sparse, of_all = [], []
    for batch, reference in zip(_batches(pairs, run.batch), dense, strict=True):
        attention = PolicyAttention(point, run)
        video = run.make(pipeline, batch, attention)
        columns["psnr"] += psnr(video, reference).tolist()
        columns["ssim"] += ssim(video, reference).tolist()
        sparse, whole = attention.densities()
        of_sparse.append(sparse)
        of_all.append(whole)
    return {"density": float(torch.cat(of_sparse).mean()), "density_of_run": float(torch.cat(of_all).mean()), **columns}


def _batches(pairs: Sequence[Pair], size: int) -> list[Sequence[Pair]]:
    return [pairs[start : start + size] for start in range(0, len(pairs), size)]
