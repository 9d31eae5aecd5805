"""How far a video is from another, frame by frame."""

import math

import numpy as np
import torch


def video_metrics(video: np.ndarray, reference: np.ndarray) -> dict[str, object]:
    """PSNR and SSIM of a video against another, as plain values for JSON.

    Args:
        video, reference: [F, H, W, 3] in [0, 1], at least 12 pixels a side.

    Returns:
        `psnr_per_frame` and `ssim_per_frame`, one number a frame; `psnr`, in dB over all pixels; `ssim`, the mean
        over frames. PSNR is None where nothing differs: it would be infinite.

    Raises:
        ValueError: if shapes differ, or there are pixels that are no finite numbers.
    """
    if video.shape != reference.shape:
        raise ValueError(f"video must have the shape of the reference, {reference.shape}, got {video.shape}")
    # Imported here because it takes long to import.
    from torchmetrics.functional.image import structural_similarity_index_measure

    errors, similarities = [], []
    # Frame by frame: SSIM needs many times the memory of what it is given.
    for ours, theirs in zip(video, reference, strict=True):
        if not (np.isfinite(ours).all() and np.isfinite(theirs).all()):
            raise ValueError("the videos to compare must hold finite numbers, got NaN or infinity in a frame")
        errors.append(float(np.square(ours.astype(np.float64) - theirs.astype(np.float64)).mean()))
        pair = (torch.from_numpy(frame).float().permute(2, 0, 1)[None] for frame in (ours, theirs))
        similarity = structural_similarity_index_measure(*pair, data_range=1.0)
        assert isinstance(similarity, torch.Tensor)
        similarities.append(float(similarity))
    return {
        "psnr": _decibel(sum(errors) / len(errors)),
        "ssim": sum(similarities) / len(similarities),
        "psnr_per_frame": [_decibel(error) for error in errors],
        "ssim_per_frame": similarities,
    }


def _decibel(error: float) -> float | None:
    return None if error == 0 else -10 * math.log10(error)
