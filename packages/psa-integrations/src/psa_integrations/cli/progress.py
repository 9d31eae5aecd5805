"""One progress bar for all steps of a command."""

from collections.abc import Callable
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
        self._bar = tqdm(total=total, disable=quiet, unit="step", dynamic_ncols=True)

    def run(self, name: str, applied: AppliedAttention) -> StepCallback:
        """What a pipeline is to call after each step of the run called `name`, as its `callback_on_step_end`."""
        self._bar.set_description(printable(name)[:_LONGEST_NAME])

        def after_step(pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            if not self._bar.disable:
                stats = applied.stats()  # waits for the device, once a step
                self._bar.set_postfix_str(f"{_kind(stats, step)}, density {stats.density:.3f}", refresh=False)
            self._bar.update()
            return {}

        return after_step

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()


def _kind(stats: AttentionStats, step: int) -> str:
    calls = [entry for entry in stats.layers if entry.step == step]
    return "sparse" if any(entry.dense_calls < entry.calls for entry in calls) else "dense"
