"""Attention calls seen from outside, at torch's dispatcher."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class AttentionCalls(TorchDispatchMode):
    """While entered, notes every call of the operator behind ``pyramid_attention``.

    Attributes:
        plans: ``indices`` and ``offsets`` of the plan of each call.
        steps: the denoising step of each call, by ``next_step`` as a pipeline's callback.
    """

    def __init__(self) -> None:
        super().__init__()
        self.plans: list[tuple[Tensor, Tensor]] = []
        self.steps: list[int] = []
        self._step = 0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.psa_kernels.pyramid_attention.default:
            self.plans.append((args[3], args[4]))
            self.steps.append(self._step)
        return func(*args, **(kwargs or {}))

    def next_step(self, pipeline: Any, step: int, timestep: Any, tensors: Any) -> dict[str, Any]:
        self._step = step + 1
        return {}
