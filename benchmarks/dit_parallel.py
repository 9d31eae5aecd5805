"""One denoising forward of Wan2.1-1.3B on several GPUs: `torchrun --nproc-per-node 2 benchmarks/dit_parallel.py`.

Context parallelism of diffusers by Ulysses over NCCL against the same forward on the first GPU alone, with dense
attention and with presets. Real size, random weights in bfloat16 (`dit_models.py`). On CPUs with `--tiny`, over gloo.
"""

import argparse
import gc
import os
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig
from dit_forward import about, presets, using
from dit_models import SPECS, Forward, built
from gpu_lengths import write
from gpu_prefill import milliseconds
from torch import Tensor
from torch.nn.attention import SDPBackend

from psa_config import Preset
from psa_integrations import apply_pyramid_sparse_attention

NAME = "wan2.1-1.3b"
REPEATS = 5
CHOICES: dict[str, Preset | None] = {"dense": None, **presets(NAME)}


@contextmanager
def at_work(preset: Preset | None, run: Forward) -> Iterator[None]:
    """The attention of a row, at the first step that the preset has sparse."""
    if preset is None:
        yield
        return
    with apply_pyramid_sparse_attention(run.transformer, preset) as handle:
        with handle.at_step(preset.attention.warmup_steps, SPECS[NAME].defaults.steps):
            yield
        assert handle.stats().dense_steps() == [], "the step measured must be sparse"


def measure(run: Forward, device: torch.device, repeats: int) -> list[tuple[float, Tensor]]:
    """Milliseconds and output of every row."""
    found = []
    for preset in CHOICES.values():
        with at_work(preset, run):
            out = run()
            assert out.isfinite().all(), "the output must be finite"
            found.append((milliseconds(run, device, repeats, warm=False), out))
    return found


def slowest(took: float, device: torch.device) -> float:
    """The most that any process took."""
    most = torch.tensor(took, device=device)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return most.item()


def table(alone: list[tuple[float, Tensor]], together: list[tuple[float, Tensor]], size: int, what: str) -> list[str]:
    lines = [
        f"| self-attention | ms on one {what} | ms on {size} | speed-up | against dense on one | largest difference |",
        "|---|---|---|---|---|---|",
    ]
    dense = alone[0][0]
    for label, (before, expected), (after, out) in zip(CHOICES, alone, together, strict=True):
        difference = ((out - expected).abs().max() / expected.abs().max()).item()
        gains = f"{before / after:.2f}x | {dense / after:.2f}x"
        lines.append(f"| {label} | {before:.0f} | {after:.0f} | {gains} | {difference:.1e} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a small model, on the CPU, to see that it runs")
    parser.add_argument("--commit", help="what is measured, where git does not know")
    parser.add_argument("--out", type=Path, help="also write the table to this file")
    options = parser.parse_args()
    rank, size = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
    if size < 2 or not (options.tiny or torch.cuda.device_count() >= size):
        sys.exit("dit_parallel needs torchrun with 2 or more processes, and a GPU for each or --tiny")
    device = torch.device("cpu") if options.tiny else torch.device("cuda", rank)
    if options.tiny:
        torch.accelerator.device_count = lambda: 1  # diffusers divides by it
    else:
        torch.cuda.set_device(device)
    # The others wait for the first, which has to measure alone.
    dist.init_process_group("gloo" if options.tiny else "nccl", timeout=timedelta(minutes=20))
    compare(options, rank, size, device)
    gc.collect()  # the model's meshes hold groups, whose threads abort the process when they outlive the interpreter
    dist.destroy_process_group()


def compare(options: argparse.Namespace, rank: int, size: int, device: torch.device) -> None:
    """The forward by the first process alone, then by all of them, and the table of both."""
    dtype, repeats = (torch.float32, 1) if options.tiny else (torch.bfloat16, REPEATS)
    context: AbstractContextManager[None] = nullcontext() if options.tiny else using(SDPBackend.CUDNN_ATTENTION)
    with torch.no_grad(), context, built(NAME, device, dtype, tiny=options.tiny) as run:
        alone = measure(run, device, repeats) if rank == 0 else []
        dist.barrier()
        run.transformer.enable_parallelism(config=ContextParallelConfig(ulysses_degree=size))
        together = [(slowest(took, device), out) for took, out in measure(run, device, repeats)]
        if rank == 0:
            command = f"torchrun --nproc-per-node {size} benchmarks/dit_parallel.py{' --tiny' * options.tiny}"
            lines = [
                f"# One denoising forward of {NAME} on {size} devices",
                "",
                about(command, options.commit, tiny=options.tiny),
                "",
                f"{run.grid.seq_len:,} tokens, random weights, {str(dtype)[6:]}. Medians of {repeats}, of the slowest",
                "process. Context parallelism of diffusers by Ulysses; dense attention by cuDNN on a GPU. The",
                "difference is that of the outputs, over the largest number in that of one device.",
                "",
                *table(alone, together, size, "CPU process" if options.tiny else "GPU"),
                "",
            ]
            write(options.out, "\n".join(lines))
            print("\n".join(lines))


if __name__ == "__main__":
    main()
