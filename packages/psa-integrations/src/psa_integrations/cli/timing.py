"""Times of calls on a device, and what follows from times at several lengths."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median

import torch


def measure(calls: Mapping[str, Callable[[], object]], device: torch.device, repeats: int) -> dict[str, float]:
    """Seconds of each call, the calls taken in turn after one round that does not count.

    On a GPU the median by its own clock; elsewhere the best, since a shared machine only ever adds time.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for counts in (False, *[True] * repeats):
        for name, call in calls.items():
            taken = _timed(call, device)
            if counts:
                seconds[name].append(taken)
    pick = median if device.type == "cuda" else min
    return {name: pick(values) for name, values in seconds.items()}


def _timed(call: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        began = time.perf_counter()
        call()
        return time.perf_counter() - began
    with torch.cuda.device(device):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
    return float(start.elapsed_time(end)) / 1000


def break_even(
    lengths: Sequence[int], dense: Sequence[float], sparse: Sequence[float]
) -> tuple[int | None, int | None]:
    """Between which two measured lengths sparse attention becomes faster, and stays so up to the longest.

    Args:
        lengths: rising.
        dense, sparse: seconds at each.

    Returns:
        The longest length at which it was not yet faster, None where it is faster at all; and the next one, from which
        on it is faster, None where it is not even at the longest.
    """
    slower = [i for i, (d, s) in enumerate(zip(dense, sparse, strict=True)) if s >= d]
    if not slower:
        return None, lengths[0]
    last = slower[-1]
    return lengths[last], lengths[last + 1] if last + 1 < len(lengths) else None


def at_length(length: int, lengths: Sequence[int], seconds: Sequence[float]) -> float:
    """Seconds at a length, from those measured around it.

    On the line through the two nearest measured lengths in the logarithms of both, which a power of the length lies on
    exactly; beyond the ends on the outermost of these lines.
    """
    if len(lengths) == 1:
        return seconds[0] * (length / lengths[0]) ** 2
    above = next((i for i, known in enumerate(lengths) if known >= length), len(lengths) - 1)
    i = max(above, 1)
    steep = math.log(seconds[i] / seconds[i - 1]) / math.log(lengths[i] / lengths[i - 1])
    return float(seconds[i] * (length / lengths[i]) ** steep)
