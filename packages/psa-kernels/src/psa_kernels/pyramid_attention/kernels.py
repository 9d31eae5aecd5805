"""Which forward kernels a device has."""

from dataclasses import dataclass
from importlib import import_module

import torch

from psa_kernels import checks


@dataclass(frozen=True)
class AttentionKernels:
    """What computes the forward pass of ``pyramid_attention`` on a device, where ``impl`` is None.

    Attributes:
        forward: modules of the operator's folder, the first for the calls that it takes, the next for the rest:
            ``("hopper_fwd", "triton_fwd")`` on a GPU of capability 9.0, ``("triton_fwd",)`` on every other one of at
            least 8.0, ``("torch_impl",)`` elsewhere.
        without_hopper: why a GPU of capability 9.0 goes without ``hopper_fwd``; empty where it does not, and elsewhere.
    """

    forward: tuple[str, ...]
    without_hopper: str = ""


def attention_kernels(device: torch.device | str) -> AttentionKernels:
    """The forward kernels that ``device`` has. Which of two a call runs is decided by what it asks for.

    Args:
        device: a device, or what ``torch.device`` makes one of, such as ``"cuda"``.

    Raises:
        TypeError, RuntimeError: of ``torch.device``, for what is no device.
    """
    device = torch.device(device)
    capability = checks.gpu_capability(device)
    if capability is None or capability < checks.MIN_CAPABILITY:
        return AttentionKernels(("torch_impl",))
    if not checks.is_hopper(device):
        return AttentionKernels(("triton_fwd",))
    try:
        import_module("psa_kernels.pyramid_attention.hopper_fwd")
    except ImportError as error:  # no Triton, or one whose Gluon is not the one that it is written in
        return AttentionKernels(("triton_fwd",), str(error))
    return AttentionKernels(("hopper_fwd", "triton_fwd"))
