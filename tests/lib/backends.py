"""The implementations that property tests run on, as values for ``pytest.mark.parametrize``."""

from dataclasses import dataclass

import pytest
import torch


@dataclass(frozen=True)
class Backend:
    """An implementation on the CPU.

    Attributes:
        impl: its name.
        dtypes: those it is right in.
        examples: how many drawn examples are affordable.
        longest: tokens of the longest sequence that is affordable.
    """

    impl: str
    dtypes: tuple[torch.dtype, ...]
    examples: int
    longest: int


TORCH = Backend("torch", (torch.float32, torch.bfloat16, torch.float16), examples=120, longest=300)
# bfloat16 `tl.dot` multiplies bit patterns in the interpreter.
INTERPRETER = Backend("triton", (torch.float32, torch.float16), examples=8, longest=70)

BACKENDS = [
    pytest.param(TORCH, id="torch"),
    pytest.param(INTERPRETER, id="interpreter", marks=pytest.mark.interpreter),
]
