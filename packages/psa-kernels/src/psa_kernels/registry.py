"""Registration with torch.library, so that the operators survive torch.compile and CUDA graphs whole.

An operator's folder holds one module an implementation, each with a function ``forward`` of the operator's
signature. They are imported when the operator runs: importing the package needs neither Triton nor a GPU.
"""

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch

from psa_kernels import checks

_LIBRARY = torch.library.Library("psa_kernels", "DEF")
_MODULES = {"reference": "reference", "torch": "torch_impl", "triton": "triton_fwd"}


@functools.cache
def implementation(package: str, impl: str) -> Callable[..., Any]:
    """``forward`` of implementation ``impl`` of the operator in ``package``."""
    forward: Callable[..., Any] = importlib.import_module(f"{package}.{_MODULES[impl]}").forward
    return forward


def register(package: str, signature: str, fake: Callable[..., Any]) -> Callable[..., Any]:
    """Define the operator ``psa_kernels::<signature>``, whose last argument is ``str impl``, a name or ``"auto"``.

    Args:
        package: the operator's folder as a dotted name.
        signature: name, arguments without ``impl`` and results, in the schema language of torch.library.
        fake: shapes and dtypes of the results, from the same arguments without ``impl``.

    Returns:
        The operator, to be called with positional arguments, ``impl`` last.
    """
    head, results = signature.split(" -> ")
    name = head.partition("(")[0]
    _LIBRARY.define(f"{head[:-1]}, str impl) -> {results}")

    def run(*args: Any) -> Any:
        # Precision is the implementation's own affair: statistics are float32 whatever surrounds the call.
        device = args[0].device
        with torch.autocast(device.type, enabled=False):
            return implementation(package, checks.impl_to_run(args[-1], device))(*args[:-1])

    def run_fake(*args: Any) -> Any:
        return fake(*args[:-1])

    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"psa_kernels::{name}", run_fake, lib=_LIBRARY)
    operator: Callable[..., Any] = getattr(torch.ops.psa_kernels, name).default
    return operator
