"""Fine-tunes the shipped tiny model with pyramid sparse attention at density 0.10.

    python examples/finetune_tiny_wan.py --out runs/finetuned --total-minutes 10 --minutes 5
    python examples/finetune_tiny_wan.py --out runs/finetuned --total-minutes 10 --resume

Prints the flow loss on fixed clips and noise for the model as it is shipped, for the same weights with sparse attention
put on, and for those that were trained with it. The schedule follows the clock: with `--minutes` a run stops early and
leaves a checkpoint, and `--resume` goes on from it. Takes a GPU; `--smoke` shows anywhere that everything works.
"""

import argparse
import json
import math
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import torch

from psa_config import BlockSize, MaskRatios, Preset, PyramidSparseAttention, VideoScale
from psa_integrations import apply_pyramid_sparse_attention
from psa_integrations.tiny_wan.train import CHECKPOINT, SMOKE, Recipe, Trainer, save_checkpoint

RECIPE = Recipe(peak_rate=2e-4, warmup_steps=50)
SAVE_SECONDS = 60.0


def preset(block: int = 64) -> Preset:
    """Quotas of 4% of the blocks at level 1, 4% at 2 and 7% at 3, every other block as its mean."""
    return Preset(
        model="tiny-wan",
        name="density_0.10",
        text_length=0,
        video_scale=VideoScale(width_divisor=4, height_divisor=4, depth_divisor=1),
        attention=PyramidSparseAttention(
            type="psa",
            use_rearrange=True,
            block_size=BlockSize(m=block, n=block),
            mask_ratios=MaskRatios(**{"1": (0.0, 0.04), "2": (0.04, 0.08), "4": (0.08, 0.15), "8": (0.15, 0.15)}),
            mask_mode="topk",
            skip="mean",
        ),
    )


def validate(trainer: Trainer, sparse: Preset | None) -> dict[str, float]:
    """Validation losses of the moving average, and the density it ran at."""
    handle = None if sparse is None else apply_pyramid_sparse_attention(trainer.average.transformer, sparse)
    with handle or nullcontext():
        found = trainer.validate()
    return found | {"density": 1.0 if handle is None else round(handle.stats().density, 3)}


def train(trainer: Trainer, out: Path, *, total_seconds: float, seconds: float, max_steps: int | None) -> None:
    """Steps until this run has lasted `seconds`, the whole schedule is over, or `max_steps` are done."""
    began, before = time.monotonic(), trainer.seconds
    saved = began
    while trainer.steps != max_steps:
        now = time.monotonic()
        trainer.seconds = before + now - began
        if now - began >= seconds or trainer.seconds >= total_seconds:
            break
        loss = trainer.step(trainer.seconds / total_seconds)
        if trainer.steps % trainer.recipe.log_every == 0:
            report("step", {"step": trainer.steps, "seconds": round(trainer.seconds, 1), "loss": round(loss.item(), 5)})
        if now - saved >= SAVE_SECONDS:
            save_checkpoint(trainer, out / CHECKPOINT)
            saved = now


def report(what: str, entry: dict[str, Any]) -> None:
    print(json.dumps({"what": what, **entry}), flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of checkpoint and weights")
    parser.add_argument("--total-minutes", type=float, default=10.0, help="length of the whole schedule")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop this run after so long")
    parser.add_argument("--max-steps", type=int, help="stop at this step")
    parser.add_argument("--tokens", type=int, help="tokens of a batch; less where memory is small")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--smoke", action="store_true", help="a toy run from random weights")
    options = parser.parse_args(argv)

    recipe = SMOKE if options.smoke else RECIPE
    if options.tokens:
        recipe = replace(recipe, tokens=options.tokens)
    torch.set_float32_matmul_precision("high")
    trainer = Trainer(recipe, torch.device(options.device))
    sparse = preset(block=32 if options.smoke else 64)
    if not options.smoke:
        with as_file(files("psa_integrations.tiny_wan") / "weights") as weights:
            trainer.start_from(weights)
    report("dense, as shipped", validate(trainer, None))
    report("sparse, training-free", validate(trainer, sparse))

    options.out.mkdir(parents=True, exist_ok=True)
    checkpoint = options.out / CHECKPOINT
    if options.resume:
        trainer.load_state_dict(torch.load(checkpoint, map_location=trainer.device, weights_only=True))
    elif checkpoint.exists():
        parser.error(f"{checkpoint} exists: pass --resume to go on from it, or another --out")
    with apply_pyramid_sparse_attention(trainer.networks.transformer, sparse):
        train(
            trainer,
            options.out,
            total_seconds=60 * options.total_minutes,
            seconds=60 * options.minutes,
            max_steps=options.max_steps,
        )
    save_checkpoint(trainer, checkpoint)
    trainer.export(options.out / "weights")
    report(f"sparse, after {trainer.steps} steps", validate(trainer, sparse))


if __name__ == "__main__":
    main()
