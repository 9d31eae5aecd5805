"""A process of a transformer under context parallelism, and the same in one process.

Usage: python context_parallel.py DEVICE FOLDER, with RANK and WORLD_SIZE set. DEVICE is cpu or cuda. The processes meet
at a file in FOLDER, which must be new. It writes FOLDER/RANK.pt: for each case what this process found, and in that of
rank 0 also what one process finds, in float64 and float32.
"""

import gc
import os
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig, WanTransformer3DModel

from psa_config import BlockSize, MaskRatios, Preset, PyramidSparseAttention, VideoScale
from psa_integrations import AppliedAttention, apply_pyramid_sparse_attention

PRESET = Preset(
    model="test",
    name="test",
    text_length=0,
    video_scale=VideoScale(width_divisor=16, height_divisor=16, depth_divisor=4),
    attention=PyramidSparseAttention(
        type="psa",
        use_rearrange=True,
        block_size=BlockSize(m=32, n=32),
        mask_ratios=MaskRatios(**{"1": (0.0, 0.25), "2": (0.25, 0.4), "4": (0.4, 0.6), "8": (0.6, 0.75)}),
        mask_mode="topk",
        warmup_steps=1,
        dense_layers=(1,),
    ),
)
# Which comes first, and whether each token has a timestep of its own.
CASES = {"applied first": False, "parallel first": False, "a timestep a token": True}


def transformer(dtype: torch.dtype, device: str) -> Any:
    torch.manual_seed(0)
    config = {"num_attention_heads": 4, "attention_head_dim": 24, "text_dim": 32, "ffn_dim": 32, "num_layers": 3}
    return WanTransformer3DModel(**config).eval().requires_grad_(False).to(device, dtype)


def inputs(timestep_a_token: bool, dtype: torch.dtype, device: str) -> dict[str, torch.Tensor]:
    """3 x 10 x 12 tokens."""
    generator = torch.Generator().manual_seed(1)
    latents, text = torch.randn(1, 16, 3, 20, 24, generator=generator), torch.randn(1, 16, 32, generator=generator)
    timestep = torch.tensor([500])
    if timestep_a_token:
        timestep = torch.randint(1000, (1, 360), generator=generator)
    return {
        "hidden_states": latents.to(device, dtype),
        "timestep": timestep.to(device),
        "encoder_hidden_states": text.to(device, dtype),
    }


def two_steps(handle: AppliedAttention, model: Any, call: dict[str, torch.Tensor]) -> torch.Tensor:
    """A dense step and a sparse one, [2, ...]."""
    outputs = []
    for step in range(2):
        with handle.at_step(step, 2):
            outputs.append(model(**call, return_dict=False)[0])
    assert handle.stats().dense_steps() == [0]
    assert handle.stats().dense_layers() == [1]
    assert handle.stats().density_per_step()[1] < 0.7  # a third of which is the dense layer
    return torch.stack(outputs)


def alone(timestep_a_token: bool, dtype: torch.dtype, device: str) -> torch.Tensor:
    model = transformer(dtype, device)
    with apply_pyramid_sparse_attention(model, PRESET) as handle:
        return two_steps(handle, model, inputs(timestep_a_token, dtype, device))


def sparse_gradients(handle: AppliedAttention, model: Any, call: dict[str, torch.Tensor]) -> torch.Tensor:
    """Of the projections of a sparse layer, behind a dense one and another sparse one, [3, C, C]."""
    first = model.blocks[0].attn1
    weights = [projection.weight.requires_grad_() for projection in (first.to_q, first.to_k, first.to_v)]
    with handle.at_step(1, 2):
        model(**call, return_dict=False)[0].square().mean().backward()
    return torch.stack([weight.grad for weight in weights])


def gradients_alone(dtype: torch.dtype, device: str) -> torch.Tensor:
    model = transformer(dtype, device)
    with apply_pyramid_sparse_attention(model, PRESET) as handle:
        return sparse_gradients(handle, model, inputs(False, dtype, device))


def gradients_in_parallel(size: int, device: str) -> torch.Tensor:
    """Each process has those of its part of the output: together they are those of all of it."""
    model = transformer(torch.float32, device)
    model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=size))
    with apply_pyramid_sparse_attention(model, PRESET) as handle:
        gradients = sparse_gradients(handle, model, inputs(False, torch.float32, device))
    dist.all_reduce(gradients)
    return gradients


def in_parallel(case: str, size: int, device: str) -> torch.Tensor:
    model, call = transformer(torch.float32, device), inputs(CASES[case], torch.float32, device)
    config = ContextParallelConfig(ulysses_degree=size)
    if case != "applied first":
        model.enable_parallelism(config=config)
    with apply_pyramid_sparse_attention(model, PRESET) as handle:
        if case == "applied first":
            model.enable_parallelism(config=config)
        return two_steps(handle, model, call)


def main() -> None:
    kind, folder = sys.argv[1], Path(sys.argv[2])
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = f"cuda:{rank}" if kind == "cuda" else "cpu"
    if kind == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.accelerator.device_count = lambda: 1  # diffusers divides by it
    dist.init_process_group(
        "nccl" if kind == "cuda" else "gloo",
        # A file, as a port that was free may be taken before it is bound.
        init_method=(folder.resolve() / "meeting").as_uri(),
        timeout=timedelta(seconds=120),
        rank=rank,
        world_size=size,
    )
    found = {case: [in_parallel(case, size, device).cpu()] for case in CASES}
    found["gradients"] = [gradients_in_parallel(size, device).cpu()]
    gc.collect()  # a model's meshes hold groups, whose threads abort the process when they outlive the interpreter
    dist.destroy_process_group()
    threads = [name.read_text() for name in Path("/proc/self/task").glob("*/comm")]  # none where there is no Linux
    assert not [name for name in threads if "gloo" in name], threads
    if rank == 0:
        places = ((torch.float64, "cpu"), (torch.float32, device))  # float64 on the CPU: Triton has no kernels for it
        found["gradients"] += [gradients_alone(*place).cpu() for place in places]
        for case, timestep_a_token in CASES.items():
            found[case] += [alone(timestep_a_token, *place).cpu() for place in places]
    torch.save(found, folder / f"{rank}.pt")


if __name__ == "__main__":
    main()
