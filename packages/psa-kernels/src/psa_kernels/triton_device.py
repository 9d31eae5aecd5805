"""Where a Triton kernel runs: the tensor's own device, or the interpreter on the CPU."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from triton import knobs


def on_device(tensor: Tensor) -> AbstractContextManager[object]:
    """A context in which launches go to the device of ``tensor``.

    Raises:
        ValueError: ``tensor`` lies on a device that Triton cannot launch on.
    """
    if tensor.device.type == "cuda":
        return torch.cuda.device(tensor.device)
    if tensor.device.type == "cpu" and knobs.runtime.interpret:
        return nullcontext()
    raise ValueError(f"impl='triton' needs tensors on a GPU, got {tensor.device}; use impl='torch' or 'reference'")
