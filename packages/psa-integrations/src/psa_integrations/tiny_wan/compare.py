"""Ways of making the same videos, beside each other: do they show their captions, and how far are they apart?"""

import json
import os
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from psa_config import Preset
from psa_integrations.diffusers.apply import apply_pyramid_sparse_attention
from psa_integrations.report.metrics import video_metrics
from psa_integrations.tiny_wan.captions import Caption
from psa_integrations.tiny_wan.evaluate import judge, totals
from psa_integrations.tiny_wan.pipeline import TinyWanPipeline

MAX_PSNR = 100.0
"""In dB, of equal videos too: a mean over infinities says nothing."""


@dataclass(frozen=True)
class Row:
    """One way of making the videos.

    `forwards` are those of the transformer for one video, `density` the executed one of their self-attention. `colour`,
    `direction` and `both` are shares of videos that show what their caption says. `psnr`, in dB, and `ssim` hold each
    video against the reference's of the same seed; the reference itself has none. `losses` is whatever was handed in.
    """

    name: str
    steps: int
    forwards: int
    density: float
    colour: float
    direction: float
    both: float
    psnr: tuple[float, ...]
    ssim: tuple[float, ...]
    losses: dict[str, float]


class Comparison:
    """Rows over the same captions and seeds; the first is the reference of all others.

    Args:
        captions: one video is made of each, video i from seed i.
        size: (frames, height, width), at least 12 pixels a side.
        batch: videos made at a time.
    """

    def __init__(self, captions: Sequence[Caption], size: tuple[int, int, int], *, batch: int = 16) -> None:
        self.rows: list[Row] = []
        self._captions, self._size, self._batch = captions, size, batch
        self._reference: torch.Tensor | None = None

    def add(
        self,
        name: str,
        pipeline: TinyWanPipeline,
        *,
        steps: int,
        guidance: float,
        preset: Preset | None = None,
        losses: dict[str, float] | None = None,
    ) -> Row:
        """Makes and judges the videos, with the preset's sparse attention for the time if one is given."""
        frames, height, width = self._size
        handle = None if preset is None else apply_pyramid_sparse_attention(pipeline, preset)
        with handle or nullcontext():
            samples, videos = judge(
                pipeline,
                self._captions,
                frames=frames,
                height=height,
                width=width,
                steps=steps,
                guidance=guidance,
                batch=self._batch,
            )
        psnr, ssim = ((), ()) if self._reference is None else likeness(videos, self._reference)
        if self._reference is None:
            self._reference = videos
        colour, direction, both = totals(samples)
        row = Row(
            name=name,
            steps=steps,
            forwards=steps * (2 if guidance > 1 else 1),
            density=1.0 if handle is None else handle.stats().density,
            colour=colour,
            direction=direction,
            both=both,
            psnr=psnr,
            ssim=ssim,
            losses=losses or {},
        )
        self.rows.append(row)
        return row

    def markdown(self) -> str:
        """The rows as a table, PSNR and SSIM as means over the videos."""
        names = list(dict.fromkeys(name for row in self.rows for name in row.losses))
        head = ["weights, attention", "steps", "forwards", "density", "colour right", "direction right", "both"]
        head += ["PSNR", "SSIM", *names]
        lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
        for row in self.rows:
            cells = [row.name, str(row.steps), str(row.forwards), f"{row.density:.3f}"]
            cells += [f"{share:.0%}" for share in (row.colour, row.direction, row.both)]
            cells += [f"{_mean(row.psnr):.2f}", f"{_mean(row.ssim):.3f}"] if row.psnr else ["", ""]
            cells += [f"{row.losses[name]:.5f}" if name in row.losses else "" for name in names]
            lines.append("| " + " | ".join(cells) + " |")
        return "\n".join(lines)

    def write(self, path: Path) -> None:
        """Writes the rows with each video's PSNR and SSIM as JSON; the whole file or none."""
        frames, height, width = self._size
        about = {"videos": len(self._captions), "frames": frames, "height": height, "width": width}
        partial = path.with_name(path.name + ".partial")
        partial.write_text(json.dumps({**about, "rows": [asdict(row) for row in self.rows]}, indent=1) + "\n")
        os.replace(partial, path)


def likeness(videos: torch.Tensor, references: torch.Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """PSNR in dB, at most `MAX_PSNR`, and SSIM of each video of [N, F, H, W, 3] in [0, 1] against its reference."""
    psnr, ssim = [], []
    for video, reference in zip(videos, references, strict=True):
        found = video_metrics(video.numpy(), reference.numpy())
        decibel, similarity = found["psnr"], found["ssim"]
        assert isinstance(similarity, float)
        psnr.append(min(decibel, MAX_PSNR) if isinstance(decibel, float) else MAX_PSNR)
        ssim.append(similarity)
    return tuple(psnr), tuple(ssim)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
