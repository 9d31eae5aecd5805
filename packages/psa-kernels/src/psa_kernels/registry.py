"""Registration with torch.library, so that the operators survive torch.compile and CUDA graphs whole.

An operator's folder holds one module an implementation, each with a function ``forward`` of the operator's
signature; those of its gradients, where it has any, hold a function ``backward``. They are imported when the operator
runs: importing the package needs neither Triton nor a GPU.
"""

import functools
import importlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from psa_kernels import checks

_LIBRARY = torch.library.Library("psa_kernels", "DEF")
_MODULES = {
    "forward": {"reference": "reference", "torch": "torch_impl", "triton": "triton_fwd"},
    "backward": {"torch": "torch_bwd", "triton": "triton_bwd"},
}


@functools.cache
def implementation(package: str, impl: str, direction: str = "forward") -> Callable[..., Any]:
    """``forward`` or ``backward`` of implementation ``impl`` of the operator in ``package``."""
    module = importlib.import_module(f"{package}.{_MODULES[direction][impl]}")
    function: Callable[..., Any] = getattr(module, direction)
    return function


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """A context in which precision is what the code says, whatever surrounds the call. Devices that have no autocast,
    such as meta, refuse to switch it off."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def register(
    package: str, signature: str, fake: Callable[..., Any], *, direction: str = "forward"
) -> Callable[..., Any]:
    """Define the operator ``psa_kernels::<signature>``, whose last argument is ``str impl``, a name or ``"auto"``.

    Args:
        package: the operator's folder as a dotted name.
        signature: name, arguments without ``impl`` and results, in the schema language of torch.library.
        fake: shapes and dtypes of the results, from the same arguments without ``impl``.
        direction: the function that implements it, ``"forward"`` or ``"backward"``.

    Returns:
        The operator, to be called with positional arguments, ``impl`` last.
    """
    head, results = signature.split(" -> ")
    name, _, arguments = head.partition("(")
    first = arguments.rstrip(")").split(",")[0].split()[1]
    _LIBRARY.define(f"{head[:-1]}, str impl) -> {results}")

    def run(*args: Any) -> Any:
        # Precision is the implementation's own affair: statistics are float32 whatever surrounds the call.
        x, asked = args[0], args[-1]
        impl = checks.impl_for_dtype(checks.impl_to_run(asked, x.device), asked != checks.AUTO, first, x)
        with without_autocast(x.device):
            return implementation(package, impl, direction)(*args[:-1])

    def run_fake(*args: Any) -> Any:
        return fake(*args[:-1])

    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"psa_kernels::{name}", run_fake, lib=_LIBRARY)
    operator: Callable[..., Any] = getattr(torch.ops.psa_kernels, name).default
    return operator


def register_gradient(name: str, backward: Callable[..., Any], setup_context: Callable[..., Any] | None = None) -> None:
    """Give the operator ``psa_kernels::<name>`` a gradient, as ``torch.library.register_autograd`` takes it."""
    torch.library.register_autograd(f"psa_kernels::{name}", backward, setup_context=setup_context, lib=_LIBRARY)
