"""Gradient checkpointing of diffusers: blocks are computed anew as they were computed first."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from torch import is_grad_enabled

AsItWas = Callable[[bool], AbstractContextManager[None]]
"""Makes a context that a block is computed in; it is told whether the block is computed anew."""


class BoundCheckpoint:
    """A transformer's checkpoint function, bound to the forward under way.

    Blocks are computed anew in the backward pass, when no forward is under way, or another one was since.

    Args:
        transformer: of diffusers.
        keep: keeps what the block that comes next is computed with.
    """

    def __init__(self, transformer: Any, keep: Callable[[], AsItWas]) -> None:
        self._transformer = transformer
        self._keep = keep
        self._functions: tuple[Callable[..., Any], Callable[..., Any]] | None = None

    def bind(self) -> None:
        """For the forward that begins."""
        self.release()
        if not (getattr(self._transformer, "gradient_checkpointing", False) and is_grad_enabled()):
            return
        original = self._transformer._gradient_checkpointing_func

        def checkpoint(block: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            as_it_was, anew = self._keep(), False

            def run(*inputs: Any, **options: Any) -> Any:
                nonlocal anew
                with as_it_was(anew):
                    anew = True
                    return block(*inputs, **options)

            return original(run, *args, **kwargs)

        self._transformer._gradient_checkpointing_func = checkpoint
        self._functions = original, checkpoint

    def release(self) -> None:
        """For the forward that ends, or the integration that is removed."""
        if self._functions is None:
            return
        original, bound = self._functions
        # A forward that failed did not release it, and another may have been chosen since.
        if self._transformer._gradient_checkpointing_func is bound:
            self._transformer._gradient_checkpointing_func = original
        self._functions = None
