"""Frames and arrays as text that a page can hold."""

import base64
import io
import zlib

import numpy as np
from PIL import Image

EXACT_BYTES = 16 << 20
"""Raw pixels of all videos of a page up to which its frames are lossless and of full size."""
LONGEST_SIDE = 480
"""Of a frame in pixels, in pages beyond that."""
_JPEG_QUALITY = 88


def frame_size(width: int, height: int, *, exact: bool) -> tuple[int, int]:
    """Width and height of a frame on the page."""
    longest = max(width, height)
    if exact or longest <= LONGEST_SIDE:
        return width, height
    return max(1, round(width * LONGEST_SIDE / longest)), max(1, round(height * LONGEST_SIDE / longest))


def encode_frames(video: np.ndarray, *, exact: bool) -> list[str]:
    """The frames of a video [F, H, W, 3] in [0, 1] as data URIs: PNG where `exact`, else JPEG, smaller."""
    size = frame_size(video.shape[2], video.shape[1], exact=exact)
    uris = []
    for frame in video:
        picture = Image.fromarray((np.clip(frame, 0, 1) * 255).round().astype(np.uint8))
        if picture.size != size:
            picture = picture.resize(size, Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        if exact:
            picture.save(buffer, "PNG", optimize=True)
        else:
            picture.save(buffer, "JPEG", quality=_JPEG_QUALITY, subsampling=0)
        kind = "png" if exact else "jpeg"
        uris.append(f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}")
    return uris


def pack(array: np.ndarray) -> str:
    """The bytes of an array, deflated (zlib), in base64."""
    return base64.b64encode(zlib.compress(np.ascontiguousarray(array).tobytes(), 9)).decode("ascii")
