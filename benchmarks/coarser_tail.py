"""An experiment: skipped blocks that lie side by side share one row, the mean of 2, 4 or 8 blocks.

The tail reads every block that is not refined as its mean, one row a block. Here, in each row of a level map, aligned
groups of 2, 4 or 8 neighbouring blocks that are all in the tail are read as one row instead, with the bias of all their
tokens. Densely, in plain torch: it measures what this costs in error and saves in work, and no kernel does it.

    python benchmarks/coarser_tail.py --steps 8 --frames 8

What came out is in `results/coarser_tail.md`.

The tiny model makes one video with dense attention; the queries, keys and values of its self-attention are caught in
the forward with the prompt of one step.
"""

import argparse
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from options import whole
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from psa_integrations.tiny_wan import load_pipeline
from psa_masks import MaskPolicy, VideoGrid, density, gilbert_order

BLOCK = 64
TAIL = 7  # the level at which a block is one row
GROUPS = (1, 2, 4, 8)
DENSITIES = (0.15, 0.06)


class SelfAttentions(TorchFunctionMode):
    """Keeps query, key and value of each self-attention over ``length`` tokens."""

    def __init__(self, length: int) -> None:
        self.caught: list[tuple[Tensor, Tensor, Tensor]] = []
        self.wanted = False
        self._length = length

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if self.wanted and func is scaled_dot_product_attention:
            named = dict(zip(("query", "key", "value"), args, strict=False)) | (kwargs or {})
            query, key, value = named["query"], named["key"], named["value"]
            if query.shape[2] == key.shape[2] == self._length:
                self.caught.append((query.clone(), key.clone(), value.clone()))
        return func(*args, **(kwargs or {}))


def catch(grid: VideoGrid, steps: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Self-attentions of the step in the middle, in the order of the curve."""
    pipeline = load_pipeline()
    pipeline.set_progress_bar_config(disable=True)
    mode, middle = SelfAttentions(grid.seq_len), steps // 2

    def after_step(_: Any, step: int, __: Any, values: dict[str, Any]) -> dict[str, Any]:
        mode.wanted = step + 1 == middle
        if step == middle:
            pipeline.scheduler.timesteps = pipeline.scheduler.timesteps[: step + 1]
        return values

    with mode:
        pipeline(
            "a red circle moving right",
            num_frames=grid.frames,
            height=grid.height * 4,
            width=grid.width * 4,
            num_inference_steps=steps,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
            callback_on_step_end=after_step,
        )
    order = gilbert_order(grid)
    # Of the two forwards of a step the first has the prompt.
    with_prompt = mode.caught[: len(mode.caught) // 2]
    return [(order.apply(q, dim=2), order.apply(k, dim=2), order.apply(v, dim=2)) for q, k, v in with_prompt]


def attend(query: Tensor, key: Tensor, value: Tensor, levels: Tensor, group: int) -> tuple[Tensor, float]:
    """One head's output ``[L, D]`` with the tail's groups merged, and the density of that.

    Args:
        query, key, value: ``[L, D]``, L a multiple of 8 blocks.
        levels: int8 ``[blocks, blocks]``.
        group: blocks in an aligned group that share a row where all of them are in the tail.
    """
    blocks = levels.shape[0]
    merged = (levels == TAIL).view(blocks, -1, group).all(-1)  # [blocks, groups]
    alone = torch.where(merged.repeat_interleave(group, 1), 0, levels)
    logits, values = [], []

    def read(tokens: int, kept: Tensor) -> None:
        """Rows of so many tokens, for the query blocks and ranges of keys that are kept."""
        rows = key.view(-1, tokens, key.shape[1]).mean(1)
        visible = kept.repeat_interleave(BLOCK, 0).repeat_interleave(rows.shape[0] // kept.shape[1], 1)
        products = query @ rows.T / query.shape[1] ** 0.5 + math.log(tokens)
        logits.append(products.masked_fill(~visible, -torch.inf))
        values.append(value.view(-1, tokens, value.shape[1]).mean(1))

    for level in (1, 2, 3, 4, TAIL):  # the levels that a budget chooses from, and the tail
        read(2 ** (level - 1), alone == level)
    read(group * BLOCK, merged)
    out = torch.cat(logits, 1).softmax(-1) @ torch.cat(values)
    work = float(density(alone[None, None])) + float(merged.float().mean()) / (group * BLOCK)
    return out, work


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=whole, default=8)
    parser.add_argument("--frames", type=whole, default=8, help="of 64x64 pixels, 256 tokens each; an even number")
    options = parser.parse_args()
    if options.frames % 2:
        parser.error(f"--frames must be even, got {options.frames}")
    if options.steps < 2:
        parser.error(f"--steps must be at least 2, got {options.steps}")
    grid = VideoGrid(frames=options.frames, height=16, width=16)
    with torch.no_grad():
        caught = catch(grid, options.steps)
        print(f"{grid.seq_len} tokens, {len(caught)} layers. Cells: executed density: error relative to dense.\n")
        print(f"| budget | {' | '.join(f'a row for {group}' for group in GROUPS)} |")
        print(f"|---|{'---|' * len(GROUPS)}")
        for budget in DENSITIES:
            cells = [measure(caught, budget, group) for group in GROUPS]
            print(f"| {budget} | {' | '.join(f'{work:.4f}: {error:.4f}' for work, error in cells)} |", flush=True)


def measure(caught: list[tuple[Tensor, Tensor, Tensor]], budget: float, group: int) -> tuple[float, float]:
    """Mean density and geometric mean of the error over the layers."""
    policy = MaskPolicy(mode="budget", density=budget, skip="mean", reduction="error", block_q=BLOCK, block_kv=BLOCK)
    works, logs = [], []
    for query, key, value in caught:
        levels = policy(query, key)[0]
        dense = scaled_dot_product_attention(query, key, value)[0]
        heads = [attend(query[0, h], key[0, h], value[0, h], levels[h], group) for h in range(levels.shape[0])]
        out = torch.stack([out for out, _ in heads])
        works += [work for _, work in heads]
        logs.append(math.log(float((out - dense).norm() / dense.norm())))
    return sum(works) / len(works), math.exp(sum(logs) / len(logs))


if __name__ == "__main__":
    main()
