"""One progress bar for all steps of a command."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from tqdm import tqdm

from psa_config.errors import printable
from psa_integrations.diffusers import AppliedAttention
from psa_integrations.stats import AttentionStats

_LONGEST_NAME = 32

StepCallback = Callable[[Any, int, Any, dict[str, Any]], dict[str, Any]]


class Progress:
    """A bar on stderr that says the step, whether it ran dense or sparse, the density so far and the time left.

    Args:
        total: steps of all runs together.
        quiet: shows nothing, and asks the device for nothing.
    """

    def __init__(self, total: int, *, quiet: bool) -> None:
        nowhere = sys.stderr is None  # where a shell closed it
        self._bar = tqdm(total=total, disable=quiet or nowhere, unit="step", dynamic_ncols=True)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Within it the bar is off the screen, and something else can be printed."""
        with self._bar.external_write_mode():
            yield

    def run(self, name: str, applied: AppliedAttention | None) -> StepCallback:
        """What a pipeline is to call after each step of the run called `name`, as its `callback_on_step_end`.

        Args:
            name: of the run.
            applied: what its transformers have; None where that is dense attention, as they came.
        """
        self._bar.set_description(printable(name)[:_LONGEST_NAME])

        def after_step(pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            if not self._bar.disable:
                self._bar.set_postfix_str(_state(applied, step), refresh=False)
            self._bar.update()
            return {}

        return after_step

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()


def _state(applied: AppliedAttention | None, step: int) -> str:
    if applied is None:
        return "dense, density 1.000"
    stats = applied.stats()  # waits for the device, once a step
    return f"{_kind(stats, step)}, density {stats.density:.3f}"


def _kind(stats: AttentionStats, step: int) -> str:
    calls = [entry for entry in stats.layers if entry.step == step]
    return "sparse" if any(entry.dense_calls < entry.calls for entry in calls) else "dense"
