"""Distills the shipped tiny model to four steps without guidance, with pyramid sparse attention at density 0.15.

    python examples/distill_tiny_wan.py --out runs/distilled --total-minutes 10 --minutes 5
    python examples/distill_tiny_wan.py --out runs/distilled --total-minutes 10 --resume

The teacher, dense and with classifier-free guidance, follows its flow from noise to video in 25 Euler steps. Diffusers'
own schedule of 4 steps stands at every eighth of their noise levels: 1, 0.92, 0.75 and 0.03. Between two of these the
student, sparse and without guidance, learns the one velocity with which a single Euler step gets where the teacher got.
So it makes a video in 4 forwards of the transformer instead of 50, of which the last has little left to do. One step
for several of a deterministic teacher's is progressive distillation (Salimans and Ho, arXiv 2202.00512), at once here
rather than by halves; guidance folded into the student is that of Meng et al. (arXiv 2210.03142).

First the teacher makes `--trajectories` videos, the same ones in every run; then the student learns from them for as
long as the clock says. A table compares teacher, four steps of the undistilled model and the student: by a check of
what the videos show, and by PSNR and SSIM against the teacher's videos of seeds outside training. It is printed, and
its numbers stay in --out. `load_pipeline(folder=OUT / "weights")` with `num_inference_steps=4, guidance_scale=1` is the
student. Takes a GPU; `--smoke` shows anywhere that everything works.
"""

import argparse
import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from psa_config import BlockSize, MaskRatios, Preset, load_presets
from psa_integrations import apply_pyramid_sparse_attention
from psa_integrations.tiny_wan.captions import ABSENT, evaluation_captions
from psa_integrations.tiny_wan.clips import caption_ids, draw_attributes, drop_words
from psa_integrations.tiny_wan.compare import Comparison
from psa_integrations.tiny_wan.pipeline import FLOW_SHIFT
from psa_integrations.tiny_wan.train import (
    CHECKPOINT,
    SMOKE,
    Networks,
    Recipe,
    Size,
    Trainer,
    add_run_options,
    check_out,
    load_checkpoint,
    train,
)

STEPS = 4
GUIDANCE = 3.0
ONE_SIZE = {"early_weights": (1.0,), "late_weights": (1.0,)}
RECIPE = Recipe(sizes=((16, 64, 64),), **ONE_SIZE, peak_rate=5e-4, warmup_steps=50, check_seconds=30, check_prompts=32)
TINY = replace(SMOKE, sizes=SMOKE.sizes[:1], **ONE_SIZE, peak_rate=3e-3, check_steps=7)


def preset(block: int = 64) -> Preset:
    """Quotas along the Gilbert curve, the rest as means, sparse from the first step on."""
    shipped = load_presets().get("tiny-wan", "psa_quality")
    changes = {
        # Those that the published figures of this script were measured with; what is shipped has others by now.
        "description": "Quotas along the curve, the rest as means, for the student.",
        "mask_ratios": MaskRatios(**{"1": (0.0, 0.09), "2": (0.09, 0.14), "4": (0.14, 0.14), "8": (0.14, 0.34)}),
        "rearrange_method": "Gilbert",
        "warmup_steps": 0,
        "block_size": BlockSize(m=block, n=block),
    }
    attention = shipped.attention.model_copy(update=changes)
    return shipped.model_copy(update={"name": "quotas_no_warmup", "attention": attention})


def ends(teacher_steps: int, steps: int = STEPS) -> list[int]:
    """The teacher's steps at which the student's begin, and the end.

    The scheduler spreads noise levels evenly between its first and last before it shifts them, so those of few steps
    are among those of many where the gaps divide.
    """
    every, rest = divmod(teacher_steps - 1, steps - 1)
    if rest or not every:
        raise ValueError(f"teacher_steps must be 1 more than a multiple of {steps - 1}, got {teacher_steps}")
    return [*range(0, teacher_steps, every), teacher_steps]


def noise_levels(steps: int, device: torch.device) -> torch.Tensor:
    """Those of the pipeline's steps and the final 0: float32 [steps + 1]."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=FLOW_SHIFT)
    scheduler.set_timesteps(steps, device=device)
    return scheduler.sigmas.to(device)


def guided(networks: Networks, seen: torch.Tensor, sigma: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Flow under classifier-free guidance, both halves in one batch: float32 [B, 3, F, H, W]."""
    both = torch.cat([ids, torch.full_like(ids, ABSENT)])
    flow, away = networks(seen.repeat(2, 1, 1, 1, 1), sigma.repeat(2), both).float().chunk(2)
    return torch.lerp(away, flow, GUIDANCE)


@dataclass(frozen=True)
class Trajectories:
    """Where a teacher was at the ends of the student's steps.

    `states` float32 [N, STEPS + 1, 3, F, H, W], from noise to video; `ids` int64 [N, 4], their captions; `sigmas`
    float32 [STEPS + 1], the noise levels of the states; `taken` float32 [STEPS], the teacher's steps between them.
    """

    states: torch.Tensor
    ids: torch.Tensor
    sigmas: torch.Tensor
    taken: torch.Tensor

    def pairs(self, rows: torch.Tensor, step: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """States at the student's steps `step` of the trajectories `rows`, int64 [B], and their mean velocities."""
        before, after = self.states[rows, step], self.states[rows, step + 1]
        return before, (after - before) / (self.sigmas[step + 1] - self.sigmas[step])[:, None, None, None, None]


@torch.no_grad()
def follow(teacher: Trainer, noise: torch.Tensor, ids: torch.Tensor) -> Trajectories:
    """The teacher's Euler steps from noise [B, 3, F, H, W] under captions [B, 4]."""
    levels = noise_levels(teacher.recipe.check_steps, teacher.device)
    kept = ends(teacher.recipe.check_steps)
    state, states = noise, [noise]
    for step, (now, then) in enumerate(itertools.pairwise(levels), 1):
        with teacher.autocast():
            flow = guided(teacher.average, state, now.expand(len(noise)), ids)
        state = state + (then - now) * flow
        if step in kept:
            states.append(state)
    taken = torch.tensor(kept, dtype=torch.float32, device=teacher.device).diff()
    return Trajectories(torch.stack(states, dim=1), ids, levels[kept], taken)


def draw_trajectories(teacher: Trainer, count: int, seed: int) -> Trajectories:
    """The teacher's ways from `count` noises of this seed, under captions with a word left out now and then."""
    recipe, generator = teacher.recipe, torch.Generator(teacher.device).manual_seed(seed)
    frames, height, width = recipe.sizes[0]
    parts = []
    for start in range(0, count, recipe.batch(recipe.sizes[0])):
        batch = min(recipe.batch(recipe.sizes[0]), count - start)
        ids = caption_ids(draw_attributes(batch, generator))
        ids = drop_words(ids, generator, caption=0.0, word=recipe.drop_word)
        noise = torch.randn(batch, 3, frames, height, width, generator=generator, device=teacher.device)
        parts.append(follow(teacher, noise, ids))
    return replace(
        parts[0], states=torch.cat([part.states for part in parts]), ids=torch.cat([part.ids for part in parts])
    )


class Distiller(Trainer):
    """Trains a student on a teacher's trajectories; the rest of a run is the Trainer's."""

    learned: Trajectories
    held_out: Trajectories

    def loss(self, size: Size) -> torch.Tensor:
        """Mean squared error of the velocity, of steps as often as they stand for steps of the teacher."""
        batch, draws, learned = self.recipe.batch(size), self.draws, self.learned
        rows = torch.randint(len(learned.ids), (batch,), generator=draws, device=self.device)
        step = torch.multinomial(learned.taken, batch, replacement=True, generator=draws)
        return self._error(self.networks, learned, rows, step)

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """The moving average's error at each of the four steps, on trajectories that training does not see."""
        rows = torch.arange(len(self.held_out.ids), device=self.device)
        found = {}
        for step in range(STEPS):
            error = self._error(self.average, self.held_out, rows, torch.full_like(rows, step))
            found[f"loss_{step + 1}"] = round(float(error), 5)
        return found

    def _error(self, networks: Networks, source: Trajectories, rows: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
        seen, velocity = source.pairs(rows, step)
        with self.autocast():
            flow = networks(seen, source.sigmas[step], source.ids[rows])
        return torch.nn.functional.mse_loss(flow.float(), velocity)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_run_options(parser, total_minutes=2.0)
    parser.add_argument(
        "--trajectories", type=int, help="videos of the teacher to learn from (default: 1024; 4 MB each)"
    )
    options = parser.parse_args(argv)
    count = (16 if options.smoke else 1024) if options.trajectories is None else options.trajectories
    if count < 1:
        parser.error(f"--trajectories must be at least 1, got {count}")
    check_out(parser, options)

    recipe = TINY if options.smoke else RECIPE
    torch.set_float32_matmul_precision("high")
    trainer = Distiller(recipe, torch.device(options.device))
    sparse = preset(block=32 if options.smoke else 64)
    if not options.smoke:
        trainer.start_from_shipped()
    comparison = Comparison(evaluation_captions()[: recipe.check_prompts], recipe.sizes[0])

    def compare(name: str, steps: int, guidance: float, applied: Preset | None) -> None:
        with trainer.autocast():
            comparison.add(name, trainer.pipeline(), steps=steps, guidance=guidance, preset=applied)

    compare("teacher, dense", recipe.check_steps, GUIDANCE, None)
    compare("as shipped, dense", STEPS, GUIDANCE, None)
    compare("as shipped, sparse", STEPS, GUIDANCE, sparse)
    began = time.monotonic()
    trainer.held_out = draw_trajectories(trainer, recipe.check_prompts, seed=1)
    trainer.learned = draw_trajectories(trainer, count, seed=2)
    print(f"{len(trainer.learned.ids)} trajectories of the teacher in {time.monotonic() - began:.1f} s", flush=True)

    def validate() -> dict[str, float]:
        with apply_pyramid_sparse_attention(trainer.average.transformer, sparse):
            return trainer.validate()

    print(f"before the first step: {validate()}", flush=True)
    if options.resume:
        load_checkpoint(trainer, options.out / CHECKPOINT)
    with apply_pyramid_sparse_attention(trainer.networks.transformer, sparse):
        train(trainer, options, validate)
    compare(f"student after {trainer.steps} steps, dense", STEPS, 1.0, None)
    compare(f"student after {trainer.steps} steps, sparse", STEPS, 1.0, sparse)
    comparison.write(options.out / "evaluation.json")
    print(comparison.markdown())


if __name__ == "__main__":
    main()
