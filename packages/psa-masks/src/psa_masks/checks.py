"""Argument checks shared by the package: every message names the argument, the rule and what came."""

import math
from collections.abc import Sequence
from itertools import pairwise
from numbers import Real

import torch
from torch import Tensor

from psa_kernels import BlockLayout
from psa_kernels import checks as kernel_checks

MAX_BOUNDS = 9  # as many levels as the largest block has
ROUNDING = 2**-50  # what a share may be off by in binary, over itself


def _number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {value!r}")
    return float(value)


def real(name: str, value: object, low: float, high: float) -> float:
    """``value`` as a float in [low, high]."""
    number = _number(name, value)
    if not low <= number <= high:
        raise ValueError(f"{name} must be in [{low:g}, {high:g}], got {value!r}")
    return number


def integer(name: str, value: object, low: int) -> int:
    """``value`` as an int of at least ``low``."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < low:
        raise ValueError(f"{name} must be at least {low}, got {value}")
    return value


def boolean(name: str, value: object) -> None:
    """``value`` is a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {value!r}")


def sequence(name: str, value: object) -> Sequence[object]:
    """``value`` if it is a list, a tuple or the like; a string is not one."""
    if isinstance(value, str | bytes) or not isinstance(value, Sequence):
        raise TypeError(f"{name} must be a sequence, got {value!r}")
    return value


def bounds(value: object) -> tuple[float, ...]:
    """The upper ends of the ranges of levels 1..H: 1 to 9 floats in [0, 1], none below the one before."""
    items = sequence("bounds", value)
    if not 1 <= len(items) <= MAX_BOUNDS:
        raise ValueError(f"bounds must hold 1 to {MAX_BOUNDS} numbers, got {len(items)}: {value!r}")
    ends = tuple(real(f"bounds[{i}]", item, 0.0, 1.0) for i, item in enumerate(items))
    if any(later < earlier for earlier, later in pairwise(ends)):
        raise ValueError(f"bounds are cumulative and must not decrease, got {value!r}")
    return ends


def thresholds(name: str, value: object) -> tuple[float, ...]:
    """Similarity thresholds of levels 2, 3, ..: at least one float, each in [-1, 1]."""
    items = sequence(name, value)
    if not items:
        raise ValueError(f"{name} must hold at least one number (level 2's), got {value!r}")
    return tuple(real(f"{name}[{i}]", item, -1.0, 1.0) for i, item in enumerate(items))


def errors(value: object) -> tuple[float, ...]:
    """Relative errors of levels 2, 3, ..: floats in (0, 1], none below the one before."""
    items = sequence("errors", value)
    relative = tuple(share(f"errors[{i}]", item) for i, item in enumerate(items))
    if any(later < earlier for earlier, later in pairwise(relative)):
        raise ValueError(f"errors must not decrease from a level to the next coarser one, got {value!r}")
    return relative


def share(name: str, value: object) -> float:
    """``value`` as a float in (0, 1]."""
    number = _number(name, value)
    if not 0.0 < number <= 1.0:
        raise ValueError(f"{name} must be in (0, 1], got {value!r}")
    return number


def token_ranges(name: str, value: object) -> tuple[tuple[int, int], ...]:
    """Pairs (start, stop) of token positions with 0 <= start <= stop."""
    ranges = []
    for i, item in enumerate(sequence(name, value)):
        pair = sequence(f"{name}[{i}]", item)
        if len(pair) != 2:
            raise ValueError(f"{name}[{i}] must be a pair (start, stop), got {item!r}")
        start = integer(f"{name}[{i}] start", pair[0], 0)
        ranges.append((start, integer(f"{name}[{i}] stop", pair[1], start)))
    return tuple(ranges)


def importance(value: object) -> Tensor:
    """A floating-point tensor whose last axis holds at least one KV block."""
    if not isinstance(value, Tensor):
        raise TypeError(f"importance must be a torch.Tensor, got {type(value).__name__}")
    kernel_checks.floating("importance", value)
    if value.ndim == 0 or value.shape[-1] == 0:
        raise ValueError(f"importance must have shape [..., num_kv_blocks >= 1], got {list(value.shape)}")
    return value


def num_blocks(value: object, importance: Tensor) -> Tensor | None:
    """``value``, None or an integer tensor [B] for ``importance`` [B, ..., num_kv_blocks], of at most as many blocks as
    there are; nobody waits for its values."""
    if value is None:
        return None
    if not isinstance(value, Tensor) or value.dtype not in (torch.int32, torch.int64):
        kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"num_blocks must be an int32 or int64 tensor or None, got {kind}")
    kernel_checks.strided("num_blocks", value)
    if importance.ndim < 2 or tuple(value.shape) != (importance.shape[0],):
        raise ValueError(
            f"num_blocks must have shape [B] for importance [B, ..., num_kv_blocks] = {list(importance.shape)}, "
            f"got {list(value.shape)}"
        )
    if value.device != importance.device:
        raise ValueError(f"num_blocks must be on importance's device {importance.device}, got {value.device}")
    return value.clamp(max=importance.shape[-1])


def levels(value: object, layout: BlockLayout | None = None) -> Tensor:
    """An int8 tensor [B, H, num_q_blocks, num_kv_blocks]; with a layout, of its block counts. Its values are those of
    the layout, or of the largest block."""
    if not isinstance(value, Tensor):
        raise TypeError(f"levels must be a torch.Tensor, got {type(value).__name__}")
    kernel_checks.strided("levels", value)
    if value.dtype != torch.int8:
        raise TypeError(f"levels must be torch.int8, got {value.dtype}")
    if value.ndim != 4 or 0 in value.shape[2:]:
        raise ValueError(f"levels must have shape [B, H, num_q_blocks, num_kv_blocks], got {list(value.shape)}")
    if layout is not None:
        block_layout(layout)
        if tuple(value.shape[2:]) != (layout.num_q_blocks, layout.num_kv_blocks):
            raise ValueError(
                f"levels must have the layout's {layout.num_q_blocks} x {layout.num_kv_blocks} blocks, "
                f"got {list(value.shape)}"
            )
    kernel_checks.level_values(value, MAX_BOUNDS if layout is None else layout.num_levels)
    return value


def block_layout(value: object) -> None:
    """``value`` is a BlockLayout."""
    if not isinstance(value, BlockLayout):
        raise TypeError(f"layout must be a psa_kernels.BlockLayout, got {type(value).__name__}")


def share_of(count: int, share: float) -> int:
    """ceil(count * share), where a few units of binary rounding in ``share`` add nothing.

    0.07 * 100 is 7.000000000000001 in floating point; seven blocks were asked for, not eight.
    """
    return math.ceil(count * share * (1 - ROUNDING))
