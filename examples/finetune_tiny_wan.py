"""Fine-tunes the shipped tiny model with pyramid sparse attention at density 0.10.

    python examples/finetune_tiny_wan.py --out runs/finetuned --total-minutes 10 --minutes 5
    python examples/finetune_tiny_wan.py --out runs/finetuned --total-minutes 10 --resume

Compares the model as it is shipped, the same weights with sparse attention put on, and those that were trained with it:
by the flow loss on fixed clips and noise, by a check of what their videos show, and by PSNR and SSIM against the dense
videos of the same seeds. The table is printed and its numbers stay in --out. The schedule follows the clock: with
`--minutes` a run stops early and leaves a checkpoint, and `--resume` goes on from it. Takes a GPU; `--smoke` shows
anywhere that everything works.
"""

import argparse
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace

import torch

from psa_config import BlockSize, MaskRatios, Preset, PyramidSparseAttention, VideoScale
from psa_integrations import apply_pyramid_sparse_attention
from psa_integrations.tiny_wan.captions import evaluation_captions
from psa_integrations.tiny_wan.compare import Comparison
from psa_integrations.tiny_wan.train import (
    CHECKPOINT,
    SMOKE,
    Recipe,
    Trainer,
    add_run_options,
    check_out,
    load_checkpoint,
    train,
)

RECIPE = Recipe(peak_rate=2e-4, warmup_steps=50, check_prompts=32)
GUIDANCE = 3.0


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
    """Validation losses of the moving average, with sparse attention or without."""
    with nullcontext() if sparse is None else apply_pyramid_sparse_attention(trainer.average.transformer, sparse):
        return trainer.validate()


def compare(comparison: Comparison, name: str, trainer: Trainer, sparse: Preset | None) -> None:
    """A row of the moving average's losses and videos."""
    losses = validate(trainer, sparse)
    steps = trainer.recipe.check_steps
    with trainer.autocast():
        comparison.add(name, trainer.pipeline(), steps=steps, guidance=GUIDANCE, preset=sparse, losses=losses)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_run_options(parser, total_minutes=10.0)
    parser.add_argument("--tokens", type=int, help="tokens of a batch; less where memory is small")
    options = parser.parse_args(argv)
    check_out(parser, options)

    recipe = SMOKE if options.smoke else RECIPE
    if options.tokens:
        recipe = replace(recipe, tokens=options.tokens)
    torch.set_float32_matmul_precision("high")
    trainer = Trainer(recipe, torch.device(options.device))
    sparse = preset(block=32 if options.smoke else 64)
    if not options.smoke:
        trainer.start_from_shipped()
    comparison = Comparison(evaluation_captions()[: recipe.check_prompts], recipe.sizes[0])
    compare(comparison, "as shipped, dense", trainer, None)
    compare(comparison, "as shipped, sparse", trainer, sparse)

    if options.resume:
        load_checkpoint(trainer, options.out / CHECKPOINT)
    with apply_pyramid_sparse_attention(trainer.networks.transformer, sparse):
        train(trainer, options, lambda: validate(trainer, sparse))
    compare(comparison, f"after {trainer.steps} steps, sparse", trainer, sparse)
    comparison.write(options.out / "evaluation.json")
    print(comparison.markdown())


if __name__ == "__main__":
    main()
