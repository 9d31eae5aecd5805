"""The parts of examples/distill_tiny_wan.py: the teacher's trajectories, and what the student learns from them."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

from psa_integrations.tiny_wan import parse_caption
from psa_integrations.tiny_wan.captions import encode_captions

CPU = torch.device("cpu")
PROMPTS = ["a red circle moving left", "a blue ring"]


@pytest.fixture(scope="module")
def example() -> ModuleType:
    path = Path(__file__).parents[1] / "examples" / "distill_tiny_wan.py"
    spec = importlib.util.spec_from_file_location("distill_tiny_wan", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Field(torch.nn.Module):
    """A flow of `rate` times the state, or of `rate` alone; half as much where the caption is empty."""

    def __init__(self, rate: float, *, linear: bool) -> None:
        super().__init__()
        self.rate, self.linear = rate, linear

    def forward(self, seen: torch.Tensor, sigma: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        rate = torch.where(ids.any(dim=1), self.rate, self.rate / 2)[:, None, None, None, None]
        return rate * (seen if self.linear else torch.ones_like(seen))


def noise_and_ids() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(len(PROMPTS), 3, 4, 16, 16, generator=generator), encode_captions(PROMPTS)


@pytest.mark.parametrize("steps", [4, 7, 13, 25, 49])
def test_the_students_noise_levels_are_among_the_teachers(example: ModuleType, steps: int) -> None:
    found = example.noise_levels(steps, CPU)[example.ends(steps)]
    torch.testing.assert_close(found, example.noise_levels(example.STEPS, CPU))


def test_the_student_has_the_quotas_that_its_figures_were_measured_with(example: ModuleType) -> None:
    attention = example.preset().attention
    assert attention.mask_ratios.bounds == (0.09, 0.14, 0.14, 0.34)
    assert (attention.rearrange_method, attention.skip, attention.warmup_steps) == ("Gilbert", "mean", 0)
    assert (attention.block_size.m, attention.block_size.n) == (64, 64)


@pytest.mark.parametrize("steps", [1, 3, 24])
def test_other_numbers_of_steps_are_refused(example: ModuleType, steps: int) -> None:
    with pytest.raises(ValueError, match=f"teacher_steps must be 1 more than a multiple of 3, got {steps}"):
        example.ends(steps)


def test_trajectories_are_the_pipelines(example: ModuleType) -> None:
    teacher = example.Distiller(example.TINY, CPU)
    noise, ids = noise_and_ids()
    states = [noise]

    def keep(_: object, step: int, __: object, kwargs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if step + 1 in example.ends(7):
            states.append(kwargs["latents"])
        return kwargs

    teacher.pipeline()(
        [str(parse_caption(prompt)) for prompt in PROMPTS],
        num_frames=4,
        height=16,
        width=16,
        num_inference_steps=7,
        guidance_scale=example.GUIDANCE,
        latents=noise,
        callback_on_step_end=keep,
    )
    found = example.follow(teacher, noise, ids)
    torch.testing.assert_close(found.states, torch.stack(states, dim=1))
    assert found.taken.tolist() == [2, 2, 2, 1]


def test_a_linear_flow_is_solved_and_its_mean_velocity_gets_there_in_one_step(example: ModuleType) -> None:
    teacher = example.Distiller(example.TINY, CPU)
    teacher.average = Field(1.0, linear=True)
    noise, ids = noise_and_ids()
    found = example.follow(teacher, noise, ids)
    # Guidance of 3 makes 3 - 2 / 2 = 2 of the rates 1 and 1/2.
    growth = torch.cat([torch.ones(1), 1 + 2 * example.noise_levels(7, CPU).diff()]).cumprod(0)[example.ends(7)]
    torch.testing.assert_close(found.states, noise[:, None] * growth[:, None, None, None, None])
    for step in range(example.STEPS):
        rows = torch.tensor([1, 0])
        before, velocity = found.pairs(rows, torch.full((2,), step))
        after = before + (found.sigmas[step + 1] - found.sigmas[step]) * velocity
        torch.testing.assert_close(after, found.states[rows, step + 1])


def test_the_loss_is_the_distance_to_the_mean_velocity(example: ModuleType) -> None:
    student = example.Distiller(example.TINY, CPU)
    student.average = Field(1.0, linear=False)
    student.learned = student.held_out = example.draw_trajectories(student, 5, seed=2)
    assert student.learned.states.shape == (5, 5, 3, 4, 16, 16)
    for rate, expected in ((2.0, 0.0), (3.0, 1.0)):  # a straight flow's velocity is its own, and guidance doubles it
        student.networks = student.average = Field(rate, linear=False)
        assert float(student.loss((4, 16, 16))) == pytest.approx(expected, abs=1e-4)
        assert list(student.validate().values()) == pytest.approx([expected] * 4, abs=1e-4)


def test_a_resumed_run_is_the_uninterrupted_one(example: ModuleType) -> None:
    learned = example.draw_trajectories(example.Distiller(example.TINY, CPU), 6, seed=2)

    def student(seed: int) -> object:
        made = example.Distiller(example.TINY, CPU, seed)
        made.learned = learned
        return made

    whole, first, second = student(0), student(0), student(7)
    losses = [float(whole.step(progress)) for progress in (0.0, 0.3, 0.6, 0.9)]
    halves = [float(first.step(progress)) for progress in (0.0, 0.3)]
    second.load_state_dict(first.state_dict())
    halves += [float(second.step(progress)) for progress in (0.6, 0.9)]
    assert halves == losses
    for name, expected in whole.average.state_dict().items():
        assert torch.equal(second.average.state_dict()[name], expected)
