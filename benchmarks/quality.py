"""How close sparse attention comes to dense on a trained video model: `nox -s bench -- quality`.

The tiny model makes videos with dense attention, and the queries, keys and values of its self-attention are caught at a
few steps, in every layer. Each policy and token order then attends over the same tensors. No download, no GPU.
"""

import argparse
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

import psa_masks
from psa_integrations.tiny_wan.pipeline import load_pipeline
from psa_kernels import BlockLayout, LevelPlan, pyramid_attention
from psa_masks import MaskPolicy, TokenOrder, VideoGrid, cube_order, gilbert_order

PROMPTS = ("a red circle moving right", "a blue square moving up")
FRAMES, SIZE, PATCH = 16, 64, 4
GRID = VideoGrid(frames=FRAMES, height=SIZE // PATCH, width=SIZE // PATCH)
STEPS, SEEN_STEPS = 25, (6, 15)
LAYERS = 7
BLOCK = 64

ORDERS: dict[str, TokenOrder | None] = {
    "as they are": None,
    "cube 4x4x4": cube_order(GRID, (4, 4, 4)),
    "cube 1x8x8": cube_order(GRID, (1, 8, 8)),
    "Gilbert": gilbert_order(GRID),
}
PAPER = (0.10, 0.15, 0.15, 0.35)
POLICIES: dict[str, dict[str, Any]] = {
    "level 1 alone, 15%": {"mode": "quota", "bounds": (0.15,)},
    "quotas .10/.05/0/.20 (the paper's)": {"mode": "quota", "bounds": PAPER},
    "the same, mean instead of max": {"mode": "quota", "bounds": PAPER, "reduction": "mean"},
    "thresholds .5/.6/.7/.8": {"mode": "threshold", "bounds": (0.5, 0.6, 0.7, 0.8)},
    "level 1 for 14%, rest as means": {"mode": "quota", "bounds": (0.14,), "skip": "mean"},
    "quotas .09/.05/0/.20, rest as means": {"mode": "quota", "bounds": (0.09, 0.14, 0.14, 0.34), "skip": "mean"},
    "the same, mean instead of max ": {
        "mode": "quota", "bounds": (0.09, 0.14, 0.14, 0.34), "skip": "mean", "reduction": "mean",
    },
    "level 1 for 4%, rest as means": {"mode": "quota", "bounds": (0.04,), "skip": "mean"},
    "thresholds .5/.6/.7/.8, rest as means": {"mode": "threshold", "bounds": (0.5, 0.6, 0.7, 0.8), "skip": "mean"},
}  # fmt: skip


@dataclass(frozen=True)
class Caught:
    """One self-attention, ``[1, H, L, D]`` each."""

    query: Tensor
    key: Tensor
    value: Tensor
    dense: Tensor


class SelfAttentions(TorchFunctionMode):
    """Keeps the inputs of self-attention over ``length`` tokens in the forwards that ``wanted`` numbers."""

    def __init__(self, length: int, wanted: frozenset[int]) -> None:
        self.caught: list[Caught] = []
        self._length, self._wanted, self._calls = length, wanted, 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is scaled_dot_product_attention:
            named = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
            query, key, value = named["query"], named["key"], named["value"]
            if query.shape[2] == key.shape[2] == self._length:
                self._calls += 1
                if (self._calls - 1) // LAYERS in self._wanted:
                    out = func(*args, **kwargs)
                    self.caught.append(Caught(query.clone(), key.clone(), value.clone(), out.clone()))
                    return out
        return func(*args, **kwargs)


def catch(prompt: str, seed: int) -> list[Caught]:
    """Self-attentions of the forwards with the prompt, at the steps of ``SEEN_STEPS``."""
    pipeline = load_pipeline()
    pipeline.set_progress_bar_config(disable=True)
    forwards = frozenset(2 * step for step in SEEN_STEPS)  # of each step's two the first is that with the prompt
    with SelfAttentions(GRID.seq_len, forwards) as mode:
        pipeline(
            prompt,
            num_frames=FRAMES,
            height=SIZE,
            width=SIZE,
            num_inference_steps=STEPS,
            generator=torch.Generator().manual_seed(seed),
            output_type="latent",
            callback_on_step_end=_stop_after(max(SEEN_STEPS)),
        )
    assert len(mode.caught) == LAYERS * len(SEEN_STEPS), "the model no longer attends as this script expects"
    return mode.caught


def _stop_after(last: int) -> Callable[..., dict[str, Any]]:
    def callback(pipeline: Any, step: int, timestep: Tensor, values: dict[str, Any]) -> dict[str, Any]:
        if step == last:
            pipeline.scheduler.timesteps = pipeline.scheduler.timesteps[: last + 1]
        return values

    return callback


def measure(policy: MaskPolicy, order: TokenOrder | None, inputs: Caught) -> tuple[float, float]:
    """Executed density, and the error of the output relative to dense attention's norm."""
    query, key, value = (
        x if order is None else order.apply(x, dim=2) for x in (inputs.query, inputs.key, inputs.value)
    )
    layout = BlockLayout(query.shape[2], key.shape[2], block_q=BLOCK, block_kv=BLOCK, num_levels=policy.num_levels)
    plan = LevelPlan.from_levels(policy(query, key), layout)
    out = pyramid_attention(query, key, value, plan, block_q=BLOCK, block_kv=BLOCK, num_levels=policy.num_levels)
    if order is not None:
        out = order.undo(out, dim=2)
    return float(plan.density().mean()), float((out - inputs.dense).norm() / inputs.dense.norm())


def rows(caught: list[Caught], samples: int) -> Iterator[str]:
    for name, options in POLICIES.items():
        policy = MaskPolicy(**options, block_q=BLOCK, block_kv=BLOCK, samples_q=samples, samples_kv=samples)
        cells = []
        for order in ORDERS.values():
            results = [measure(policy, order, inputs) for inputs in caught]
            density = sum(d for d, _ in results) / len(results)
            error = math.exp(sum(math.log(e) for _, e in results) / len(results))
            cells.append(f"{density:.3f}: {error:.3f}")
        yield f"| {name.strip()} | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=16, help="tokens sampled from a block of 64 to score it")
    parser.add_argument("--videos", type=int, default=len(PROMPTS), help="how many prompts, each with its own seed")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="also write the table to this file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    lines = [
        "# Attention error on the tiny model",
        "",
        f"torch {torch.__version__}, psa-masks {psa_masks.__version__}. Command: `nox -s bench -- quality`.",
        f"{options.videos} prompts, steps {SEEN_STEPS} of {STEPS}, all {LAYERS} layers, {GRID.seq_len} tokens, blocks",
        f"of {BLOCK}, {options.samples} samples a block. Each cell is executed density: error of the attention output",
        "relative to dense, as the geometric mean over prompts, steps and layers.",
        "",
        f"| policy | {' | '.join(ORDERS)} |",
        f"|---|{'---|' * len(ORDERS)}",
    ]
    with torch.no_grad():
        caught = [inputs for seed, prompt in enumerate(PROMPTS[: options.videos]) for inputs in catch(prompt, seed)]
        print("\n".join(lines), flush=True)
        for row in rows(caught, options.samples):
            lines.append(row)
            print(row, flush=True)
    if options.out:
        options.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
