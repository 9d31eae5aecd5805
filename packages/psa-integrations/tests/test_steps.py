"""Which step a call belongs to: by hand, by cache context, by schedule."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from psa_integrations.steps import Step, StepError, StepFinder, is_dense_step


class Pipeline:
    """A pipeline in its denoising loop if it has a `run_length`."""

    def __init__(self, timesteps: list[float], run_length: int | None = None, **scheduler: Any) -> None:
        self.scheduler = SimpleNamespace(
            timesteps=torch.tensor(timesteps), num_inference_steps=len(timesteps), **scheduler
        )
        self.current_timestep = None
        if run_length is not None:
            self.num_timesteps = run_length
            self.current_timestep = torch.tensor(timesteps[-1])


@pytest.mark.parametrize(
    ("warmup", "cooldown", "dense"),
    [
        (0, 0, []),
        (2, 0, [0, 1]),
        (0, 1, [4]),
        (1, 2, [0, 3, 4]),
        (3, 3, [0, 1, 2, 3, 4]),
        (9, 0, [0, 1, 2, 3, 4]),
    ],
)
def test_dense_steps_stand_at_both_ends(warmup: int, cooldown: int, dense: list[int]) -> None:
    steps = [Step(index, 5) for index in range(5)]
    assert [s.index for s in steps if is_dense_step(s, warmup=warmup, cooldown=cooldown)] == dense


def test_a_preset_without_dense_steps_needs_no_step() -> None:
    assert not is_dense_step(None, warmup=0, cooldown=0)


def test_an_unknown_step_is_an_error_where_it_decides() -> None:
    with pytest.raises(StepError, match="warmup_steps 2 and cooldown_steps 0"):
        is_dense_step(None, warmup=2, cooldown=0)
    with pytest.raises(StepError, match="is unknown: give apply_pyramid_sparse_attention the pipeline"):
        is_dense_step(None, warmup=2, cooldown=0)
    with pytest.raises(StepError, match="cooldown_steps 1, and the number of steps of this run is unknown"):
        is_dense_step(Step(3), warmup=0, cooldown=1)
    assert is_dense_step(Step(1), warmup=2, cooldown=1)


@pytest.mark.parametrize(("index", "total"), [(-1, None), (3, 3), (3, 0)])
def test_impossible_steps_are_refused(index: int, total: int | None) -> None:
    with pytest.raises(ValueError, match="must be"):
        Step(index, total)


def test_nothing_known_is_none() -> None:
    assert StepFinder().find(torch.tensor([1.0])) is None
    assert StepFinder(object.__new__(type("Bare", (), {}))).find(1.0) is None


def test_any_object_with_a_scheduler_tells_the_step() -> None:
    pipeline = SimpleNamespace(scheduler=Pipeline([900.0, 600.0]).scheduler)
    assert StepFinder(pipeline).find(torch.tensor([600.0])) == Step(1, 2)


def test_by_hand_goes_before_context_and_context_before_schedule() -> None:
    pipeline = Pipeline([900.0, 600.0, 300.0])
    finder = StepFinder(pipeline)
    now = torch.tensor([300.0])
    assert finder.find(now) == Step(2, 3)
    with finder.context(1, 7):
        assert finder.find(now) == Step(1, 7)
        with finder.at(5, 9):
            assert finder.find(now) == Step(5, 9)
        assert finder.find(now) == Step(1, 7)
    assert finder.find(now) == Step(2, 3)


def test_a_context_without_a_step_leaves_it_to_the_schedule() -> None:
    pipeline = Pipeline([900.0, 600.0, 300.0])
    finder = StepFinder(pipeline)
    with finder.context(None, None):
        assert finder.find(torch.tensor([600.0])) == Step(1, 3)


def test_a_context_without_the_number_of_steps_takes_it_from_the_schedule() -> None:
    pipeline = Pipeline([900.0, 600.0, 300.0])
    finder = StepFinder(pipeline)
    with finder.context(1, None):
        assert finder.find(torch.tensor([600.0])) == Step(1, 3)


def test_an_error_inside_ends_what_was_set() -> None:
    finder = StepFinder()
    with pytest.raises(KeyError), finder.at(2, 4), finder.context(3, 4):
        raise KeyError
    assert finder.find(torch.tensor([1.0])) is None


def test_tokens_of_a_given_frame_have_timestep_zero() -> None:
    pipeline = Pipeline([900.0, 600.0, 300.0])
    assert StepFinder(pipeline).find(torch.tensor([[0.0, 0.0, 600.0, 600.0]])) == Step(1, 3)


@pytest.mark.parametrize(
    ("run_length", "scheduler"),
    [(3, {}), (None, {"begin_index": 1, "step_index": None}), (4, {"begin_index": 1, "step_index": None})],
    ids=["pipeline", "scheduler", "both"],
)
def test_a_run_that_starts_part_of_the_way_in_counts_from_its_start(
    run_length: int | None, scheduler: dict[str, Any]
) -> None:
    pipeline = Pipeline([900.0, 600.0, 300.0, 100.0], run_length, **scheduler)
    finder = StepFinder(pipeline)
    for timestep, expected in ((600.0, Step(0, 3)), (100.0, Step(2, 3))):
        pipeline.current_timestep = None if run_length is None else torch.tensor(timestep)
        assert finder.find(torch.tensor([timestep])) == expected


def test_the_length_of_an_earlier_run_does_not_count() -> None:
    pipeline = Pipeline([900.0, 600.0, 300.0], run_length=2)
    pipeline.current_timestep = None
    assert StepFinder(pipeline).find(torch.tensor([300.0])) == Step(2, 3)


@pytest.mark.parametrize("run_length", [2, 7])
def test_what_a_failed_run_leaves_in_its_pipeline_does_not_count(run_length: int) -> None:
    pipeline = Pipeline([900.0, 600.0, 300.0], run_length)
    pipeline.current_timestep = torch.tensor(950.0)
    finder = StepFinder(pipeline)
    assert [finder.find(torch.tensor([t])) for t in (900.0, 300.0)] == [Step(0, 3), Step(2, 3)]


def test_a_schedule_whose_steps_are_all_taken_is_of_another_run() -> None:
    """As where a second pipeline runs the same transformer by a scheduler of its own."""
    pipeline = Pipeline([900.0, 600.0, 300.0], step_index=3)
    assert StepFinder(pipeline).find(torch.tensor([600.0])) is None
    pipeline.scheduler.step_index = 2
    assert StepFinder(pipeline).find(torch.tensor([600.0])) == Step(1, 3)


@pytest.mark.parametrize(("step_index", "expected"), [(None, Step(0, 4)), (1, Step(1, 4)), (2, Step(2, 4))])
def test_a_timestep_twice_in_the_schedule_asks_the_scheduler(step_index: int | None, expected: Step) -> None:
    pipeline = Pipeline([900.0, 600.0, 600.0, 300.0], step_index=step_index)
    assert StepFinder(pipeline).find(torch.tensor([600.0])) == expected


def test_a_timestep_rounded_to_half_precision_asks_the_scheduler() -> None:
    pipeline = Pipeline([999.0, 997.5, 995.1], step_index=1)
    assert StepFinder(pipeline).find(torch.tensor([997.5]).bfloat16()) == Step(1, 3)


def test_a_timestep_rounded_to_another_entry_is_still_its_own() -> None:
    # 997.0 is 996.0 in bfloat16, which is an entry itself, two steps on.
    pipeline = Pipeline([1000.0, 997.0, 990.0, 996.0], step_index=1)
    assert StepFinder(pipeline).find(torch.tensor([997.0]).bfloat16()) == Step(1, 4)
    # 998.0 rounds to 1000.0 while no other entry does.
    assert StepFinder(Pipeline([998.0, 990.0, 600.0])).find(torch.tensor([998.0]).bfloat16()) == Step(0, 3)


def test_those_who_listen_are_told_the_step_before_the_call() -> None:
    pipeline = Pipeline([900.0, 600.0, 300.0], run_length=3, step_index=None)
    pipeline.current_timestep = torch.tensor(900.0)
    heard: list[Step | None] = []
    finder = StepFinder(pipeline)
    finder.listeners.append(heard.append)
    with finder.context(None, None):
        pass
    with finder.at(1), finder.context(2, 3):
        pass
    assert heard == [Step(0, 3), None, Step(1, 3), Step(1, 3), Step(1, 3), None]


def test_a_timestep_outside_the_schedule_is_unknown_where_the_scheduler_keeps_no_index() -> None:
    pipeline = Pipeline([900.0, 600.0, 300.0])
    assert StepFinder(pipeline).find(torch.tensor([601.0])) is None


def test_a_finished_scheduler_does_not_name_a_step_past_its_end() -> None:
    pipeline = Pipeline([900.0, 600.0, 300.0], step_index=3)
    assert StepFinder(pipeline).find(torch.tensor([601.0])) is None


def test_training_timesteps_are_no_schedule() -> None:
    pipeline = Pipeline([900.0, 600.0, 300.0])
    pipeline.scheduler.num_inference_steps = None
    assert StepFinder(pipeline).find(torch.tensor([600.0])) is None


def test_the_scheduler_is_named_where_a_pipeline_was_given() -> None:
    pipeline = Pipeline([900.0, 600.0, 300.0])
    assert StepFinder(pipeline).scheduler_name == "SimpleNamespace"
    assert StepFinder().scheduler_name is None


def test_the_pipeline_is_not_kept_alive() -> None:
    pipeline = Pipeline([900.0, 600.0, 300.0])
    finder = StepFinder(pipeline)
    del pipeline
    assert finder.find(torch.tensor([600.0])) is None
