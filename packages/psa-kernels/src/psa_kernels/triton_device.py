"""Where a Triton kernel runs: the tensor's own device, or the interpreter on the CPU."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

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


def is_interpreted() -> bool:
    """Whether kernels run in Triton's interpreter."""
    return bool(knobs.runtime.interpret)


def shared_memory_limit(device: torch.device) -> int:
    """Bytes of shared memory a program may have on ``device``; the interpreter on the CPU has no limit of its own
    and is given that of an sm_90."""
    if device.type != "cuda":
        return 227 * 1024
    properties: Any = torch.cuda.get_device_properties(device)  # torch's stub lacks the field below
    return int(properties.shared_memory_per_block_optin)


def has_tensor_memory_access(device: torch.device) -> bool:
    """Whether ``device`` copies whole tiles by descriptor (TMA, capability 9.0 and up); the interpreter can."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (9, 0)


def num_multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a GPU."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def can_copy_by_descriptor(x: Tensor) -> bool:
    """Whether the strides and the address of ``x`` are ones that a tensor descriptor takes."""
    aligned = all(stride > 0 and stride * x.element_size() % 16 == 0 for stride in x.stride()[:-1])
    return aligned and x.stride(-1) == 1 and x.data_ptr() % 16 == 0 and 0 not in x.shape
