"""Videos as arrays [F, H, W, 3] in [0, 1]: to files, side by side, and how far apart two of them are."""

import logging
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from psa_config.files import check_folder_of, folder_beside

_log = logging.getLogger(__name__)

SMALLEST_SIDE = 12
"""Of a video in pixels, for SSIM, whose window is 11 wide; sides are multiples of 4."""


def check_output(path: Path) -> None:
    """Raises ValueError or OSError, before any work, if no video can be written to `path`."""
    if path.suffix != ".mp4":
        raise ValueError(f"--out must end in .mp4, got {path}")
    check_folder_of(_target(path), "--out")
    if path.is_dir():
        raise IsADirectoryError(f"--out must be a file, and {path} is a folder")


def _target(path: Path) -> Path:
    """Where a file is written: to what a link leads to, and the link stays."""
    return path.resolve() if path.is_symlink() else path


def write_video(video: np.ndarray, path: Path, fps: int) -> None:
    """Writes an mp4 whose final name appears only when the file is complete.

    Raises:
        OSError: it could not be written whole, as on a full disk.
    """
    from diffusers.utils import export_to_video

    target = _target(path)
    with folder_beside(target) as folder:
        partial = folder / path.name
        try:
            # A macro block of 2 is the least that the encoder's colour format allows; more would rescale.
            export_to_video(list(video), str(partial), fps=fps, quality=9.0, macro_block_size=2)
            _check_complete(partial, len(video))
            partial.replace(target)
        except OSError as error:
            # Below its first line an error of the encoder has all that the encoder said.
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            free = shutil.disk_usage(target.parent).free
            raise OSError(f"{path} was not written: {reason}; its disk has {free:,} bytes free") from error
    _log.info("wrote %s", path)


def _check_complete(partial: Path, frames: int) -> None:
    """The encoder, a process of its own, says on a full disk what happened but not that it failed."""
    import imageio_ffmpeg

    with partial.open("rb+") as file:
        os.fsync(file.fileno())  # some file systems find only now that they have no room
    try:
        written = int(imageio_ffmpeg.count_frames_and_secs(str(partial))[0])
    except RuntimeError:
        written = 0
    if written != frames:
        raise OSError(f"the encoder got {written} of {frames} frames onto the disk")


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
