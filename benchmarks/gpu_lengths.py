"""The cost of attention against length on a GPU: `nox -s bench -- gpu_lengths`.

Dense attention, other block-sparse kernels and this project's op at two densities, from 8k to 256k tokens, and the
length from which the whole op beats dense attention. FlexAttention and FastVideo's kernel read the blocks that a quota
of level 1 alone keeps; their outputs are checked against `pyramid_attention` on the same blocks before they are timed.
Each runs in a process of its own, so that one that fails leaves the rest of the table. FastVideo's kernel is measured
where the package `fastvideo-kernel` is installed. `plot_lengths.py` draws what `--json` writes.
"""

import argparse
import ctypes
import functools
import importlib
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import lengths_report as report
import torch
import triton
from gpu_attention import QUOTAS, milliseconds, smooth_inputs
from lengths_report import Found
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

import psa_kernels
from psa_kernels import BlockLayout, LevelPlan, pyramid_attention
from psa_masks import MaskPolicy

HEADS, HEAD_DIM, BLOCK = 12, 128, 128
LENGTHS = (8192, 16384, 32768, 65536, 131072, 262144)
SHORTER = (4096, 2048, 1024)  # measured where the whole op is faster at every other length
DENSITIES = {0.15: QUOTAS, 0.10: tuple(bound * 2 / 3 for bound in QUOTAS)}
NO_TIME = "no time left"

Inputs = tuple[Tensor, Tensor, Tensor]
Call = Callable[[], Tensor]


def policies(bounds: dict[float, tuple[float, ...]]) -> dict[float, MaskPolicy]:
    return {
        density: MaskPolicy(mode="quota", bounds=shares, samples_q=16, samples_kv=16)
        for density, shares in bounds.items()
    }


PYRAMID = policies(DENSITIES)
LEVEL_1 = policies({density: (density,) for density in DENSITIES})


def once(call: Call) -> float:
    """Milliseconds of one call."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def median(call: Call) -> float:
    """Median milliseconds; a call of 20 ms or more without the trial calls that `do_bench` spends first."""
    call()
    first = once(call)
    if first < 20.0:
        return milliseconds(call)
    return statistics.median([first] + [once(call) for _ in range(max(2, int(100.0 / first)))])


def planned(policy: MaskPolicy, query: Tensor, key: Tensor) -> tuple[LevelPlan, float]:
    """The plan and its density."""
    layout = BlockLayout(query.shape[2], key.shape[2], num_levels=policy.num_levels)
    plan = LevelPlan.from_levels(policy(query, key), layout)
    return plan, float(plan.density().mean())


def dense(backend: SDPBackend, inputs: Inputs, density: float) -> tuple[Call, float]:
    def call() -> Tensor:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(*inputs)

    return call, density


def with_plan(chosen: dict[float, MaskPolicy], inputs: Inputs, density: float) -> tuple[Call, float]:
    policy = chosen[density]
    plan, executed = planned(policy, *inputs[:2])
    return lambda: pyramid_attention(*inputs, plan, num_levels=policy.num_levels), executed


def whole(inputs: Inputs, density: float) -> tuple[Call, float]:
    policy = PYRAMID[density]
    _, executed = planned(policy, *inputs[:2])
    return lambda: pyramid_attention(*inputs, policy(*inputs[:2]), num_levels=policy.num_levels), executed


def in_graph(inputs: Inputs, density: float) -> tuple[Call, float]:
    call, executed = whole(inputs, density)
    call()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()

    def replay() -> Tensor:
        graph.replay()
        return out

    return replay, executed


def kept_blocks(query: Tensor, key: Tensor, density: float) -> tuple[Tensor, Tensor]:
    """How many KV blocks each query block reads, and their numbers, followed by those of the others; int32."""
    levels = LEVEL_1[density](query, key)
    indices = levels.argsort(dim=-1, descending=True, stable=True).int()
    return levels.sum(dim=-1, dtype=torch.int32), indices


def check_same(name: str, found: Tensor, expected: Tensor) -> None:
    """Raises a RuntimeError where another kernel's result is not that of `pyramid_attention` on the same blocks."""
    error = float((found.float() - expected.float()).norm() / expected.float().norm())
    if not error <= 4 * torch.finfo(expected.dtype).eps:  # other blocks would differ by about 1
        raise RuntimeError(f"its {name} differs by {error:.2g} from that of the same blocks")


def checked(call: Call, inputs: Inputs, density: float) -> tuple[Call, float]:
    """Another kernel's call and density, once its output is that of `pyramid_attention` on the same blocks."""
    reference, executed = with_plan(LEVEL_1, inputs, density)
    check_same("output", call(), reference())
    return call, executed


@functools.cache
def compiled_flex(length: int) -> Callable[..., Tensor]:
    """FlexAttention for one length: only a length known when it compiles spares it the check of each tile's end."""
    torch.compiler.reset()  # the limit of compilations of a function counts those of all lengths
    return torch.compile(flex_attention, dynamic=False)


def flex(inputs: Inputs, density: float) -> tuple[Call, float]:
    count, indices = kept_blocks(*inputs[:2], density)
    # Whole blocks, none of them partial, as create_block_mask would find them.
    none = torch.zeros_like(count), torch.zeros_like(indices)
    mask = BlockMask.from_kv_blocks(*none, count, indices, BLOCK_SIZE=BLOCK)
    attention = compiled_flex(inputs[0].shape[2])
    return checked(lambda: attention(*inputs, block_mask=mask), inputs, density)


def half_blocks(count: Tensor, indices: Tensor, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """What `kept_blocks` found, in blocks of 64 tokens: two for each of ours, on both sides.

    Returns:
        Their numbers, how many each query block reads, and how many of their tokens are below ``length``, where it ends
        inside a block of ours; int32.
    """
    first = 2 * indices[..., : int(count.max())]
    halves = torch.stack([first, first + 1], dim=-1).flatten(-2).repeat_interleave(2, dim=-2).contiguous()
    counts = (2 * count).repeat_interleave(2, dim=-1).contiguous()
    starts = 64 * torch.arange(counts.shape[-1], dtype=torch.int32, device=count.device)
    return halves, counts, (length - starts).clamp(0, 64)


def fastvideo_kernel() -> Callable[..., tuple[Tensor, Tensor]]:
    """The sm_90 kernel of video sparse attention, by name: the public function may choose another."""
    # The wheel brings a driver library, which need not fit the machine. Found first, the machine's own serves.
    ctypes.CDLL("libcuda.so.1", mode=ctypes.RTLD_GLOBAL)
    importlib.import_module("fastvideo_kernel")
    importlib.import_module("fastvideo_kernel._C.fastvideo_kernel_ops")
    return torch.ops.fastvideo_kernel.block_sparse_attn_sm90


def fastvideo(inputs: Inputs, density: float) -> tuple[Call, float]:
    kernel = fastvideo_kernel()
    blocks = half_blocks(*kept_blocks(*inputs[:2], density), inputs[0].shape[2])
    return checked(lambda: kernel(*inputs, *blocks)[0], inputs, density)


@dataclass(frozen=True)
class Row:
    """A row of the table. ``prepare`` takes inputs and density, and returns the call and the density it executes."""

    method: str
    density: float
    group: str
    prepare: Callable[[Inputs, float], tuple[Call, float]]


APART = ("fastvideo", "flex")  # groups that run in a process of their own
ROWS = [
    Row(report.DENSE, 1.0, "dense", functools.partial(dense, SDPBackend.CUDNN_ATTENTION)),
    Row(report.FLASH, 1.0, "dense", functools.partial(dense, SDPBackend.FLASH_ATTENTION)),
]
for _density in DENSITIES:
    ROWS += [
        Row(report.FLEX, _density, "flex", flex),
        Row(report.FASTVIDEO, _density, "fastvideo", fastvideo),
        Row(report.LEVEL_1, _density, "psa", functools.partial(with_plan, LEVEL_1)),
        Row(report.PLANNED, _density, "psa", functools.partial(with_plan, PYRAMID)),
        Row(report.WHOLE, _density, "psa", whole),
        Row(report.GRAPH, _density, "psa", in_graph),
    ]
GROUPS = sorted({row.group for row in ROWS})


def found_of(row: Row, length: int, **more: object) -> Found:
    return {"method": row.method, "density": row.density, "length": length, "ms": None, "note": ""} | more


def reason(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"


def measure_row(row: Row, length: int, inputs: Inputs, deadline: float) -> Found:
    """The row at one length, with the reason where it has no time."""
    if time.monotonic() >= deadline:
        return found_of(row, length, note=NO_TIME)
    try:
        torch.cuda.empty_cache()
        call, executed = row.prepare(inputs, row.density)
        found = found_of(row, length, executed=executed, ms=median(call))
    except Exception as error:  # other projects' kernels raise anything; the table says it, and the others go on
        found = found_of(row, length, note=reason(error))
    print(f"{length} {row.method} {row.density}: {found['ms'] or found['note']}", file=sys.stderr, flush=True)
    return found


def measure_here(rows: list[Row], lengths: Iterable[int], deadline: float, save: Callable[[list[Found]], None]) -> None:
    """The rows at these lengths in this process, given to ``save`` length by length."""
    for length in lengths:
        try:
            inputs = smooth_inputs((1, HEADS, length, HEAD_DIM))
        except RuntimeError as error:  # no memory, or a kernel before has left the card unusable
            save([found_of(row, length, note=reason(error)) for row in rows])
        else:
            save([measure_row(row, length, inputs, deadline) for row in rows])


def measure_apart(group: str, lengths: list[int], deadline: float) -> list[Found]:
    """The rows of one group in a process of their own, which may die."""
    seconds = max(0.0, deadline - time.monotonic())
    found: list[Found] = []
    note = NO_TIME
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "found.json"
        command = [sys.executable, __file__, "--group", group, "--json", str(file), "--seconds", f"{seconds:.1f}"]
        command += [part for length in lengths for part in ("--length", str(length))]
        try:
            if seconds > 0.0:
                child = subprocess.run(command, stdout=subprocess.DEVNULL, timeout=seconds + 5.0, check=False)
                note = f"its process ended with code {child.returncode}"
        except subprocess.TimeoutExpired:
            pass
        if file.exists():
            found = json.loads(file.read_text())["found"]
    done = {(one["method"], one["density"], one["length"]) for one in found}
    every = [(row, length) for row in ROWS if row.group == group for length in lengths]
    return found + [found_of(*one, note=note) for one in every if (one[0].method, one[0].density, one[1]) not in done]


def quotas(density: float) -> str:
    """The share of blocks at each level."""
    shares = (upper - lower for lower, upper in itertools.pairwise((0.0, *DENSITIES[density])))
    return "/".join(f"{share:.4f}".rstrip("0").rstrip(".") for share in shares)


def page(command: str, found: list[Found]) -> str:
    """The results, with what they were measured on."""
    named = ", ".join(f"{density:.2f} is {quotas(density)}" for density in DENSITIES)
    lines = [
        "# Attention against length",
        "",
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, Triton {triton.__version__}, cuDNN "
        f"{torch.backends.cudnn.version()}, psa-kernels {psa_kernels.__version__}. Medians.",
        f"Command: `{command}`. B1 H{HEADS} D{HEAD_DIM}, bfloat16, blocks of {BLOCK} on both sides.",
        f"Densities are shares of the blocks at levels 1/2/3/4: {named}.",
        "FlexAttention (compiled for each length, default options), FastVideo's VSA kernel (sm_90, blocks of 64) and",
        "level 1 alone read the same blocks: a share equal to the density, at level 1. Kernel: attention alone, its",
        "mask or block list made before. Plan given: the call with its plan, pooling included. Whole op: importance at",
        "16 samples a block, levels, plan, pooling and attention; in a CUDA graph, launches cost the host nothing.",
        "",
        *report.sections(found, list(DENSITIES)),
    ]
    return "\n".join(lines)


def as_json(command: str, found: list[Found]) -> str:
    about = {
        "card": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cudnn": torch.backends.cudnn.version(),
        "psa-kernels": psa_kernels.__version__,
        "command": command,
        "shape": {"batch": 1, "heads": HEADS, "head_dim": HEAD_DIM, "dtype": "bfloat16", "block": BLOCK},
    }
    even = {f"{density:.2f}": report.break_even_text(found, density) for density in DENSITIES}
    return json.dumps({"about": about, "break_even": even, "found": found}, indent=1) + "\n"


def write(path: Path | None, text: str) -> None:
    """The whole file or none: the process may be stopped at any time."""
    if path is not None:
        partial = path.with_name(path.name + ".partial")
        partial.write_text(text)
        partial.replace(path)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--group", choices=GROUPS, action="append", help="only these methods, may be repeated")
    parser.add_argument("--length", type=int, action="append", help="instead of 8k to 256k, may be repeated")
    parser.add_argument("--seconds", type=float, default=600.0, help="start no measurement after this time")
    parser.add_argument("--out", type=Path, help="also write the tables to this file")
    parser.add_argument("--json", type=Path, help="also write the raw numbers to this file")
    options = parser.parse_args()
    for length in options.length or ():
        if length < BLOCK or length % BLOCK:
            parser.error(f"--length must be a positive multiple of {BLOCK}, got {length}")
    options.group = options.group or GROUPS
    options.length = sorted(set(options.length or LENGTHS))
    return options


def command_of(options: argparse.Namespace) -> str:
    """What to type for these measurements."""
    parts = [f"--group {group}" for group in options.group if options.group != GROUPS]
    parts += [f"--length {length}" for length in options.length if options.length != list(LENGTHS)]
    return " ".join(["python benchmarks/gpu_lengths.py", *parts]) if parts else "nox -s bench -- gpu_lengths"


def main() -> None:
    start = time.monotonic()
    options = arguments()
    deadline = start + options.seconds
    if not torch.cuda.is_available():
        sys.exit("gpu_lengths needs an NVIDIA GPU")
    command = command_of(options)
    found: list[Found] = []

    def save(more: list[Found]) -> None:
        found.extend(more)
        write(options.json, as_json(command, found))
        write(options.out, page(command, found))

    apart = [group for group in APART if group in options.group and len(options.group) > 1]
    here = [row for row in ROWS if row.group in options.group and row.group not in apart]
    measure_here(here, options.length, deadline, save)
    if report.is_always_faster(found, DENSITIES):
        pair = [row for row in here if row.method in (report.DENSE, report.WHOLE, report.GRAPH)]
        measure_here(pair, [length for length in SHORTER if length < options.length[0]], deadline, save)
    for group in apart:
        save(measure_apart(group, options.length, deadline))
    print(page(command, found))


if __name__ == "__main__":
    main()
