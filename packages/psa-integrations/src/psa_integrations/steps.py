"""Which denoising step a transformer call belongs to, and whether that step runs dense."""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch


class StepError(RuntimeError):
    """A preset needs the denoising step and nothing says which one it is."""


@dataclass(frozen=True)
class Step:
    """A denoising step: `index` counts from 0, `total` is the number of steps of the run if it is known."""

    index: int
    total: int | None = None

    def __post_init__(self) -> None:
        if self.index < 0:
            raise ValueError(f"index must be 0 or more, got {self.index}")
        if self.total is not None and self.total <= self.index:
            raise ValueError(f"total must be above index {self.index}, got {self.total}")


def is_dense_step(step: Step | None, *, warmup: int, cooldown: int, scheduler: str | None = None) -> bool:
    """Whether `step` is one of the `warmup` first or the `cooldown` last steps of its run.

    Args:
        step: None if it is unknown.
        warmup: number of dense steps at the start.
        cooldown: number of dense steps at the end.
        scheduler: the class whose schedule was searched for the step, None if there was none to search.

    Raises:
        StepError: if the answer depends on a step, or on a number of steps, that is not known.
    """
    if warmup == 0 and cooldown == 0:
        return False
    if step is None:
        advice = (
            "give apply_pyramid_sparse_attention the pipeline, or call"
            if scheduler is None
            else f"the pipeline's {scheduler} does not tell it, so call"
        )
        raise StepError(
            f"the preset has warmup_steps {warmup} and cooldown_steps {cooldown}, and the denoising step of "
            f"this call is unknown: {advice} the transformer inside `with handle.at_step(index, total)`"
        )
    if step.index < warmup:
        return True
    if cooldown == 0:
        return False
    if step.total is None:
        raise StepError(
            f"the preset has cooldown_steps {cooldown}, and the number of steps of this run is unknown: "
            "call the transformer inside `with handle.at_step(index, total)`"
        )
    return step.index >= step.total - cooldown


class StepFinder:
    """Finds the step of a call, from the first of these that knows it.

    1. the step set by hand with `at`;
    2. the cache context the pipeline opened around the call, where it carries `step_index`;
    3. the call's timestep looked up in the schedule of the pipeline's scheduler, or, where that is not one
       entry of the schedule, the scheduler's own `step_index`.

    Nothing is counted from call to call, so guidance, another run or an aborted run cannot shift the answer.
    """

    def __init__(self, pipeline: object | None = None) -> None:
        # A strong reference would close a cycle through the transformer's hooks, and its memory would only be
        # freed by a garbage collection.
        self._pipeline: Callable[[], object | None]
        try:
            self._pipeline = weakref.ref(pipeline)
        except TypeError:  # of None, and of bags of attributes such as SimpleNamespace
            self._pipeline = lambda: pipeline
        self._by_hand: Step | None = None
        self._from_context: Step | None = None
        self.listeners: list[Callable[[Step | None], None]] = []
        """Told the step of the calls inside an `at` or a context when it is entered, and None when it is left: for
        compiled calls, which cannot look for it."""

    @contextmanager
    def at(self, index: int, total: int | None = None) -> Iterator[None]:
        """Sets the step of the calls made inside."""
        before, self._by_hand = self._by_hand, Step(index, total)
        try:
            self._tell(self._known())
            yield
        finally:
            self._by_hand = before
            self._tell(None if before is None else self._known())

    @contextmanager
    def context(self, step_index: int | None, num_inference_steps: int | None) -> Iterator[None]:
        """Holds what a cache context says about the step of the calls made inside."""
        before = self._from_context
        self._from_context = None if step_index is None else Step(int(step_index), num_inference_steps)
        try:
            self._tell(self._known() or self._of_loop())
            yield
        finally:
            self._from_context = before
            self._tell(None if self._by_hand is None else self._known())

    def find(self, timestep: torch.Tensor | float) -> Step | None:
        """The step of a call at `timestep` (any shape; the noisiest entry counts), or None if it is unknown.

        Reads `timestep` from its device only where neither `at` nor a cache context names the step.
        """
        known = self._known()
        if known is not None:
            return known
        # Image to video gives the tokens of the given frame timestep 0, so the largest one is the step's.
        now = torch.as_tensor(timestep).max()
        run = self._run(now)
        return None if run is None else run.find(now)

    def _known(self) -> Step | None:
        """The step that `at` or a cache context names."""
        known = self._by_hand or self._from_context
        if known is None or known.total is not None:
            return known
        run = self._run()
        return known if run is None else Step(known.index, run.total)

    def _of_loop(self) -> Step | None:
        """The step that the pipeline's loop is at, where that can be told without the call's timestep."""
        run = self._run()
        now = getattr(self._living_pipeline(), "current_timestep", None)
        if run is None or now is None:
            return None
        return run.index() or run.find(torch.as_tensor(now))

    def _tell(self, step: Step | None) -> None:
        for listen in self.listeners:
            listen(step)

    @property
    def scheduler_name(self) -> str | None:
        """The class of the pipeline's scheduler, None without a pipeline."""
        scheduler = getattr(self._living_pipeline(), "scheduler", None)
        return None if scheduler is None else type(scheduler).__name__

    def _living_pipeline(self) -> Any:
        return self._pipeline()

    def _run(self, now: torch.Tensor | None = None) -> "_Run | None":
        """The run that a call at the timestep `now` is of; without one, that of whatever call comes next."""
        pipeline = self._living_pipeline()
        scheduler = getattr(pipeline, "scheduler", None)
        timesteps = getattr(scheduler, "timesteps", None)
        # Before set_timesteps a scheduler lists its training timesteps, which are no run.
        if timesteps is None or getattr(scheduler, "num_inference_steps", None) is None:
            return None
        # All of its steps are taken: the call is of a run that this scheduler knows nothing of.
        if (getattr(scheduler, "step_index", None) or 0) >= len(timesteps):
            return None
        # Video to video starts part of the way in. Where the scheduler was not told so, the pipeline in its loop
        # knows how many steps it makes; outside of the loop that number is of an earlier run.
        first = getattr(scheduler, "begin_index", None)
        if first is None:
            first = len(timesteps) - pipeline.num_timesteps if _in_loop(pipeline, now) else 0
        return _Run(scheduler, timesteps, max(first, 0))


def _in_loop(pipeline: Any, now: torch.Tensor | None) -> bool:
    """Whether `pipeline` is in its loop, and a call at `now` is of it: a run that failed leaves its timestep behind."""
    current = getattr(pipeline, "current_timestep", None)
    if current is None or now is None:
        return current is not None
    return bool(torch.as_tensor(current).to(now) == now)


@dataclass(frozen=True)
class _Run:
    """The run a scheduler is set up for; it executes the entries of `schedule` from `first` on."""

    scheduler: object
    schedule: torch.Tensor
    first: int

    @property
    def total(self) -> int:
        return len(self.schedule) - self.first

    def find(self, now: torch.Tensor) -> Step | None:
        """The step at the timestep `now`, of no dimensions."""
        schedule = self.schedule[self.first :]
        # In the rounding of the timestep: a bfloat16 one may be exactly a neighbour of the entry it stands for.
        schedule = schedule.to(now.dtype) if now.is_floating_point() else schedule
        places = [place for place, t in enumerate(schedule.tolist()) if t == float(now)]
        if len(places) == 1:
            return Step(places[0], self.total)
        return self.index()

    def index(self) -> Step | None:
        """What the scheduler counts itself."""
        if not hasattr(self.scheduler, "step_index"):
            return None
        # Schedulers have no index before the first step of a run.
        at = self.scheduler.step_index
        index = 0 if at is None else at - self.first
        return Step(index, self.total) if 0 <= index < self.total else None
