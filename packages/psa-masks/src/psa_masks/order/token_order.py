"""A permutation of a sequence that can be taken back."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Self

import torch
from torch import Tensor

from psa_kernels import checks as kernel_checks
from psa_masks import checks
from psa_masks.grid import VideoGrid, check_grid


@contextmanager
def ordinary_cpu_tensors() -> Iterator[None]:
    """Orders are cached and shared, so they lie on the CPU and may take part in autograd, whatever default device or
    inference mode surrounds the first call."""
    with torch.inference_mode(False), torch.device("cpu"):
        yield


class TokenOrder:
    """An order of tokens and its exact inverse.

    Args:
        order: int64 ``[n]``, a permutation of 0..n-1; ``order[i]`` is the original index of the token that
            comes i-th. The tensor is copied to the CPU.

    Attributes:
        order: the argument, on the CPU. Orders are shared between callers: don't write to it.
        inverse: int64 ``[n]`` on the CPU; ``inverse[j]`` is the new place of original token j.

    Raises:
        TypeError, ValueError: ``order`` is no int64 permutation.
    """

    def __init__(self, order: Tensor) -> None:
        if not isinstance(order, Tensor) or order.dtype != torch.int64:
            kind = order.dtype if isinstance(order, Tensor) else type(order).__name__
            raise TypeError(f"order must be an int64 tensor, got {kind}")
        kernel_checks.strided("order", order)
        if order.ndim != 1:
            raise ValueError(f"order must have shape [n], got {list(order.shape)}")
        with ordinary_cpu_tensors():
            self._settle(order.detach().to("cpu", copy=True))
        self._on_device: dict[tuple[torch.device, bool], Tensor] = {}

    def _settle(self, order: Tensor) -> None:
        self.order = order
        places = torch.arange(len(self.order))
        if not torch.equal(self.order.sort().values, places):
            raise ValueError(f"order must hold each of 0..{len(places) - 1} once, got {order.tolist()[:16]}")
        self.inverse = torch.empty_like(self.order).scatter_(0, self.order, places)

    @classmethod
    def identity(cls, length: int) -> Self:
        """The order that leaves ``length`` tokens where they are."""
        return cls(torch.arange(checks.integer("length", length, 0), device="cpu"))

    @classmethod
    def of_video(cls, grid: VideoGrid, video: Tensor) -> Self:
        """The order of a grid's whole sequence from one of its video tokens; text stays where it is.

        Args:
            grid: the sequence.
            video: int64 ``[grid.video_len]``, a permutation of the video tokens counted from 0.

        Raises:
            TypeError, ValueError: ``grid`` is no VideoGrid, or ``video`` no such permutation.
        """
        check_grid(grid)
        if not isinstance(video, Tensor) or video.dtype != torch.int64:
            kind = video.dtype if isinstance(video, Tensor) else type(video).__name__
            raise TypeError(f"video must be an int64 tensor, got {kind}")
        if tuple(video.shape) != (grid.video_len,):
            raise ValueError(f"video must have shape [{grid.video_len}] for {grid}, got {list(video.shape)}")
        order = torch.arange(grid.seq_len, device="cpu")
        start, stop = grid.video_range
        order[start:stop] = video + start
        return cls(order)

    def __len__(self) -> int:
        return len(self.order)

    def __repr__(self) -> str:
        return f"TokenOrder({len(self)} tokens)"

    def apply(self, x: Tensor, dim: int) -> Tensor:
        """``x`` with the tokens along ``dim`` in this order; a new tensor on ``x``'s device.

        Raises:
            TypeError, ValueError: ``x`` has not as many tokens along ``dim`` as the order.
        """
        return self._select(x, dim, inverse=False)

    def undo(self, x: Tensor, dim: int) -> Tensor:
        """``x`` with the tokens along ``dim`` back in their original order: ``undo(apply(x)) == x``.

        Raises:
            TypeError, ValueError: ``x`` has not as many tokens along ``dim`` as the order.
        """
        return self._select(x, dim, inverse=True)

    def _select(self, x: Tensor, dim: int, *, inverse: bool) -> Tensor:
        if not isinstance(x, Tensor):
            raise TypeError(f"x must be a tensor, got {type(x).__name__}")
        kernel_checks.strided("x", x)
        if not -x.ndim <= kernel_checks.integer("dim", dim) < x.ndim:
            raise ValueError(f"dim must be an axis of x with shape {list(x.shape)}, got {dim}")
        if x.shape[dim] != len(self):
            raise ValueError(f"x must have {len(self)} tokens along dim {dim}, got shape {list(x.shape)}")
        return x.index_select(dim, self.index(x.device, inverse=inverse))

    def index(self, device: torch.device, *, inverse: bool = False) -> Tensor:
        """The order, or its inverse, on ``device``: copied there once, and kept."""
        key = (device, inverse)
        index = self._on_device.get(key)
        if index is None:
            with torch.inference_mode(False):  # the index is kept, and later callers may want gradients
                index = (self.inverse if inverse else self.order).to(device)
            self._on_device[key] = index
        return index
