"""Backends that the operators are tested on, and the profile of the property tests."""

import os
from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, settings

if not torch.cuda.is_available():
    # Read by Triton when it is first imported, which happens when a Triton operator first runs.
    os.environ.setdefault("TRITON_INTERPRET", "1")

settings.register_profile(
    "kernels",
    deadline=None,
    derandomize=True,
    # `backend` is the same value for every example.
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("kernels")


@dataclass(frozen=True)
class Backend:
    """An implementation on a device, with the dtypes that it is right in."""

    impl: str
    device: str
    dtypes: tuple[torch.dtype, ...]

    @property
    def examples(self) -> int:
        """How many drawn examples are affordable: a GPU compiles kernels for nearly every one."""
        return {"torch": 40, "triton": 15 if self.device == "cuda" else 6}[self.impl]


TORCH = Backend("torch", "cpu", (torch.float32, torch.bfloat16, torch.float16))
# bfloat16 `tl.dot` multiplies bit patterns in the interpreter, so it is refused there.
INTERPRETER = Backend("triton", "cpu", (torch.float32, torch.float16))
GPU = Backend("triton", "cuda", (torch.float32, torch.bfloat16, torch.float16))


_TRITON = [
    pytest.param(INTERPRETER, id="interpreter", marks=pytest.mark.interpreter),
    pytest.param(GPU, id="gpu", marks=pytest.mark.gpu),
]


@pytest.fixture(params=[pytest.param(TORCH, id="torch"), *_TRITON])
def backend(request: pytest.FixtureRequest) -> Backend:
    return request.param


@pytest.fixture(params=_TRITON)
def triton_backend(request: pytest.FixtureRequest) -> Backend:
    return request.param
