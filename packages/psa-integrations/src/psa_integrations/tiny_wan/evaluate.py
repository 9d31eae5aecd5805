"""Does a video show what its caption says? A rule-based check of colour and direction, and a table of it.

Run as `python -m psa_integrations.tiny_wan.evaluate`; the table is Markdown.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import torch

from psa_integrations.tiny_wan.captions import COLOURS, DIRECTIONS, Caption, evaluation_captions
from psa_integrations.tiny_wan.clips import PALETTE, draw_attributes, draw_clips
from psa_integrations.tiny_wan.pipeline import TinyWanPipeline, load_pipeline

# Backgrounds reach a chroma of 0.06, the dullest colour of the palette has 0.6.
_MIN_CHROMA = 0.3
# Training clips cross about half the frame; less than this is no movement.
_MIN_TRAVEL = 0.15


@dataclass(frozen=True)
class Reading:
    """What the check sees in a video: None where nothing coloured is there or it does not move."""

    colour: str | None
    direction: str | None


def read_video(video: torch.Tensor) -> Reading:
    """Finds the dominant colour of a video and where that colour's centroid moves.

    Args:
        video: float [F, H, W, 3] in [0, 1], at least two frames.

    Returns:
        The palette colour of most coloured pixels, and the direction of the straight line through the
        centroids of that colour, provided they travel 15% of the frame.
    """
    video = video.float().cpu()
    coloured = video.amax(-1) - video.amin(-1) > _MIN_CHROMA
    nearest = torch.cdist(video.reshape(-1, 3), PALETTE).argmin(1).reshape(coloured.shape)
    counts = torch.bincount(nearest[coloured], minlength=len(COLOURS))
    if not counts.any():
        return Reading(None, None)
    colour = int(counts.argmax())
    mask = (coloured & (nearest == colour)).float()
    return Reading(COLOURS[colour], _direction(mask))


def _direction(mask: torch.Tensor) -> str | None:
    """Direction of the centroid of a mask [F, H, W], frames without a pixel left out."""
    frames, height, width = mask.shape
    mass = mask.sum((1, 2))
    seen = mass > 0
    if seen.sum() < 2:
        return None
    y = mask.sum(2)[seen] @ (torch.arange(height) / height) / mass[seen]
    x = mask.sum(1)[seen] @ (torch.arange(width) / width) / mass[seen]
    time = torch.linspace(-1, 1, frames)[seen]
    time = time - time.mean()
    # Least squares: the slope over the whole clip, in fractions of the frame.
    across, down = (float(2 * (time @ line) / (time @ time)) for line in (x, y))
    if max(abs(across), abs(down)) < _MIN_TRAVEL:
        return None
    if abs(across) >= abs(down):
        return "right" if across > 0 else "left"
    return "down" if down > 0 else "up"


@dataclass(frozen=True)
class Sample:
    """One judged video."""

    caption: Caption
    reading: Reading

    @property
    def colour_right(self) -> bool:
        return self.reading.colour == self.caption.colour

    @property
    def direction_right(self) -> bool:
        return self.reading.direction == self.caption.direction


def judge(
    pipeline: TinyWanPipeline,
    captions: Sequence[Caption],
    *,
    frames: int,
    height: int,
    width: int,
    steps: int = 25,
    guidance: float = 3.0,
    seed: int = 0,
    batch: int = 8,
) -> tuple[list[Sample], torch.Tensor]:
    """Generates a video for each caption and reads it; video i starts from noise of seed + i.

    Returns:
        The samples, and the videos, float32 [len(captions), frames, height, width, 3] on the CPU.
    """
    samples, videos = [], []
    for first in range(0, len(captions), batch):
        chunk = captions[first : first + batch]
        generated = pipeline(
            [str(caption) for caption in chunk],
            num_frames=frames,
            height=height,
            width=width,
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=[torch.Generator().manual_seed(seed + first + i) for i in range(len(chunk))],
        ).frames
        for caption, video in zip(chunk, torch.from_numpy(generated), strict=True):
            samples.append(Sample(caption, read_video(video)))
            videos.append(video)
    return samples, torch.stack(videos)


def check_the_check(frames: int, height: int, width: int, clips: int = 256) -> float:
    """Share of drawn clips, whose caption is known, that `read_video` reads rightly."""
    generator = torch.Generator().manual_seed(0)
    attributes = draw_attributes(clips, generator)
    drawn = draw_clips(attributes, frames=frames, height=height, width=width, generator=generator)
    videos = (drawn / 2 + 0.5).permute(0, 2, 3, 4, 1)
    right = 0
    for row, video in zip(attributes.tolist(), videos, strict=True):
        reading = read_video(video)
        right += reading.colour == COLOURS[row[0]] and reading.direction == DIRECTIONS[row[2]]
    return right / clips


def totals(samples: Sequence[Sample]) -> tuple[float, float, float]:
    """Shares of samples with the right colour, the right direction, and both."""
    count = len(samples)
    return (
        sum(s.colour_right for s in samples) / count,
        sum(s.direction_right for s in samples) / count,
        sum(s.colour_right and s.direction_right for s in samples) / count,
    )


def markdown_table(samples: Sequence[Sample], title: str) -> str:
    """The samples and their totals as a Markdown section."""
    colour, direction, both = totals(samples)
    lines = [
        f"### {title}",
        "",
        f"Of {len(samples)} samples: colour right {colour:.0%}, direction {direction:.0%}, both {both:.0%}.",
        "",
        "| prompt | colour seen | direction seen | right |",
        "|---|---|---|---|",
    ]
    for sample in samples:
        seen, verdict = sample.reading, "yes" if sample.colour_right and sample.direction_right else "no"
        lines.append(f"| {sample.caption} | {seen.colour or 'none'} | {seen.direction or 'none'} | {verdict} |")
    return "\n".join([*lines, ""])


def contact_sheet(videos: torch.Tensor, shown: int = 4) -> np.ndarray:
    """Videos [N, F, H, W, 3] as one picture: uint8, two videos a row, `shown` frames of each."""
    picks = torch.linspace(0, videos.shape[1] - 1, shown).round().long()
    strips = torch.cat(videos[:, picks].unbind(1), dim=2)
    half = (len(strips) + 1) // 2
    columns = [torch.cat(part.unbind(0), dim=0) for part in torch.split(strips, half)]
    missing = columns[0].shape[0] - columns[-1].shape[0]
    columns[-1] = torch.nn.functional.pad(columns[-1], (0, 0, 0, 0, 0, missing))
    sheet = torch.cat(columns, dim=1) if len(columns) > 1 else columns[0]
    pixels: np.ndarray = (sheet * 255).round().to(torch.uint8).numpy()
    return pixels


def _size(text: str) -> tuple[int, int, int]:
    match = re.fullmatch(r"(\d+)x(\d+)x(\d+)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"must be FRAMESxHEIGHTxWIDTH such as 16x64x64, got {text!r}")
    return int(match[1]), int(match[2]), int(match[3])


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m psa_integrations.tiny_wan.evaluate", description=__doc__)
    parser.add_argument("--weights", type=Path, help="folder of weights; the shipped ones by default")
    parser.add_argument("--size", type=_size, action="append", help="FRAMESxHEIGHTxWIDTH, may be repeated")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--prompts", type=int, default=32, help="the first N of the 32 prompts")
    parser.add_argument("--out", type=Path, help="also write the table here")
    parser.add_argument("--sheet", type=Path, help="write a picture of the first size's videos here")
    options = parser.parse_args(argv)

    pipeline = load_pipeline(options.device, getattr(torch, options.dtype), folder=options.weights)
    pipeline.set_progress_bar_config(disable=True)
    captions = evaluation_captions()[: options.prompts]
    sections = []
    for frames, height, width in options.size or [(16, 64, 64)]:
        samples, videos = judge(
            pipeline,
            captions,
            frames=frames,
            height=height,
            width=width,
            steps=options.steps,
            guidance=options.guidance,
            seed=options.seed,
            batch=options.batch,
        )
        trusted = check_the_check(frames, height, width)
        section = markdown_table(samples, f"{frames} frames of {width}x{height}, {options.steps} steps")
        section += f"\nThe same check reads {trusted:.1%} of 256 drawn clips of this size rightly.\n"
        sys.stdout.write(section + "\n")
        sections.append(section)
        if options.sheet and len(sections) == 1:
            iio.imwrite(options.sheet, contact_sheet(videos))
    if options.out:
        options.out.write_text("\n".join(sections))
    return 0


if __name__ == "__main__":
    sys.exit(main())
