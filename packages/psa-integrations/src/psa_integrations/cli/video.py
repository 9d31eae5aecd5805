"""Videos as arrays [F, H, W, 3] in [0, 1]: to files, side by side, and how far apart two of them are."""

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

SMALLEST_SIDE = 12
"""Of a video in pixels, for SSIM, whose window is 11 wide; sides are multiples of 4."""


def check_output(path: Path) -> None:
    """Raises ValueError or OSError, before any work, if no video can be written to `path`."""
    if path.suffix != ".mp4":
        raise ValueError(f"--out must end in .mp4, got {path}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"--out must lie in a folder that exists, got {path}")
    if path.is_dir():
        raise IsADirectoryError(f"--out must be a file, and {path} is a folder")
    try:
        # Permission bits do not tell of everything that keeps a file from being made.
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise OSError(f"--out must lie in a folder that can be written, got {path}: {error.strerror}") from error


def write_video(video: np.ndarray, path: Path, fps: int) -> None:
    """Writes an mp4 whose final name appears only when the file is complete."""
    from diffusers.utils import export_to_video

    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.stem}-") as folder:
        partial = Path(folder) / path.name
        # A macro block of 2 is the least that the encoder's colour format allows; more would rescale.
        export_to_video(list(video), str(partial), fps=fps, quality=9.0, macro_block_size=2)
        partial.replace(path)


def side_by_side(videos: Sequence[np.ndarray], scale: int) -> np.ndarray:
    """One video of several of one size, each pixel enlarged to scale x scale, with a white gap between."""
    frames, height = videos[0].shape[:2]
    gap = np.ones((frames, height, 2, 3), dtype=videos[0].dtype)
    parts = [part for video in videos for part in (gap, video)][1:]
    joined: np.ndarray = np.concatenate(parts, axis=2).repeat(scale, axis=1).repeat(scale, axis=2)
    return joined


def psnr_and_ssim(video: np.ndarray, reference: np.ndarray) -> tuple[float, float]:
    """PSNR in dB over all pixels, infinite for equal videos, and the mean SSIM of the frames."""
    # Imported here because it takes long to import, and only a comparison needs it.
    from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

    ours, theirs = (torch.from_numpy(v).float().permute(0, 3, 1, 2) for v in (video, reference))
    psnr = peak_signal_noise_ratio(ours, theirs, data_range=1.0)
    ssim = structural_similarity_index_measure(ours, theirs, data_range=1.0)
    assert isinstance(ssim, torch.Tensor)
    return float(psnr), float(ssim)
