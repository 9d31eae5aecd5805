"""One denoising forward of video transformers, sparse against dense: `python benchmarks/dit_forward.py` on a GPU.

The models that the `psa` command knows, at their real sizes and with random weights in bfloat16 (`dit_models.py`).
Presets go on by `apply_pyramid_sparse_attention`, so that token order, importance, masks and hooks are all in the time.
Random weights spread attention almost evenly: quotas keep their density, thresholds would not, so the presets here have
quotas.

`--models` runs some of them, and `--json` keeps what several runs found, of which the tables are made; `--models none`
makes them of the file alone.
"""

import argparse
import gc
import json
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
import triton
from dit_models import MODELS, SPECS, Forward, built
from gpu_lengths import write
from gpu_prefill import milliseconds
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import psa_integrations
from psa_config import MaskRatios, Preset, Samples, load_presets
from psa_integrations import apply_pyramid_sparse_attention

LONG = 20_000  # milliseconds; what dense attention sets up takes a few hundred
PAPER = 327 / 176  # seconds a video, dense and sparse, of Wan2.1-1.3B on an H200 (arXiv 2512.04025)
QUOTAS = {"1": (0.0, 0.10), "2": (0.10, 0.15), "4": (0.15, 0.15), "8": (0.15, 0.35)}
SHIPPED = ("psa_quality", "psa_fast")
DENSE = {
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "FlashAttention-2": SDPBackend.FLASH_ATTENTION,
    "memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
}
GIB = 2**30


def presets(name: str) -> dict[str, Preset]:
    """The model's balanced preset with quotas, which are its own in some models, and its presets that have quotas."""
    book, model = load_presets(), SPECS[name].presets
    balanced = book.get(model, "psa_balanced")
    changes = {"mask_mode": "topk", "mask_ratios": MaskRatios(**QUOTAS), "use_sim_mask": False}
    by_quotas = balanced.attention.model_copy(update=changes)
    fewer = by_quotas.model_copy(update={"samples": Samples(q=16, kv=16)})
    return {
        "psa_balanced with quotas .10/.05/0/.20": balanced.model_copy(update={"attention": by_quotas}),
        "the same, 16 samples a block": balanced.model_copy(update={"attention": fewer}),
    } | {shipped: book.get(model, shipped) for shipped in SHIPPED}


def using(backend: SDPBackend) -> AbstractContextManager[None]:
    """SDPA by that back-end; what it cannot do, as attention to text under a mask, by another."""
    order = [backend, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    return sdpa_kernel(list(dict.fromkeys(order)), set_priority=True)


def backends(name: str, run: Forward, device: torch.device) -> dict[str, Callable[[], AbstractContextManager[None]]]:
    """The dense back-ends that can do the model's self-attention, each a context to run in.

    The last of them is there for models whose attention has a mask that none before it takes.
    """
    if device.type != "cuda":
        return {"SDPA": nullcontext}
    config, masked = run.transformer.config, MODELS[name].masked
    shape = (1, config.num_attention_heads, run.grid.seq_len, config.attention_head_dim)
    query = torch.zeros(shape, dtype=torch.bfloat16, device=device)
    mask = torch.ones(1, 1, 1, run.grid.seq_len, dtype=torch.bool, device=device) if masked else None
    found = {}
    for label, backend in DENSE.items():
        if label == "memory-efficient" and found:
            continue
        try:
            with sdpa_kernel(backend):
                scaled_dot_product_attention(query, query, query, attn_mask=mask)
        except RuntimeError as error:  # torch says so where no kernel of the back-end takes the call
            print(f"{name}: no {label}: {error}", file=sys.stderr)
            continue
        found[label] = partial(using, backend)
    return found


def timed(run: Forward, device: torch.device, repeats: int, *, dense: bool = False) -> dict[str, float | None]:
    """Milliseconds of a forward, whether it was the first, and the most memory allocated in it.

    The first one sets all up and does not count, unless it is dense and takes longer than `LONG`: then there is no
    other. Kernels of ours are compiled in it, which can take as long.
    """
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    outputs: list[Tensor] = []
    took = milliseconds(lambda: outputs.append(run()), device, repeats=1, warm=False)
    assert outputs.pop().isfinite().all(), "the output must be finite"
    first = dense and took > LONG
    if not first:
        took = milliseconds(run, device, repeats, warm=False)
    peak = torch.cuda.max_memory_allocated() / GIB if device.type == "cuda" else None
    return {"ms": took, "first": first, "peak_gib": peak}


def measure(name: str, device: torch.device, dtype: torch.dtype, *, tiny: bool) -> dict[str, Any]:
    """What `table` makes one of."""
    repeats, steps = 1 if tiny else MODELS[name].repeats, SPECS[name].defaults.steps
    with built(name, device, dtype, tiny=tiny) as run:
        choices = backends(name, run, device)
        rows: list[dict[str, Any]] = []
        for label, context in choices.items():
            with context():
                rows.append({"attention": label, "density": 1.0, **timed(run, device, repeats, dense=True)})
        for label, preset in presets(name).items():
            warmup = preset.attention.warmup_steps
            with (
                apply_pyramid_sparse_attention(run.transformer, preset) as handle,
                next(iter(choices.values()))(),
                handle.at_step(warmup, steps),
            ):
                row = {"attention": label, **timed(run, device, repeats)}
                stats = handle.stats()
                assert stats.dense_steps() == [], "the step measured must be sparse"
                ordered = preset.attention.use_rearrange
                rows.append(row | {"density": stats.density, "warmup": warmup, "ordered": ordered})
        return {
            "parameters": sum(parameter.numel() for parameter in run.transformer.parameters()),
            "tokens": run.grid.seq_len,
            "dtype": str(dtype)[6:],
            "steps": steps,
            "repeats": repeats,
            "rows": rows,
        }


def table(name: str, found: dict[str, Any], run: str) -> list[str]:
    """Of one model; `run` says which run it is of."""
    dense = [row for row in found["rows"] if row["density"] == 1.0]
    fastest = min(dense, key=lambda row: row["ms"])
    medians = f"medians of {found['repeats']}"
    if any(row.get("first") for row in found["rows"]):
        medians += f", but where a dense one took more than {LONG // 1000} s, set-up included: that is the only one"
    lines = [
        f"## {name}: {found['parameters'] / 1e9:.2f} B parameters, {found['tokens']:,} tokens, {found['dtype']}",
        "",
        f"{run}; {medians}.",
        "",
        f"| self-attention | density | token order | ms a forward | peak GiB | against {fastest['attention']} "
        f"| {found['steps']} steps |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in found["rows"]:
        steps, warmup = found["steps"], row.get("warmup", 0)
        whole = steps * fastest["ms"] / (warmup * fastest["ms"] + (steps - warmup) * row["ms"])
        peak = "-" if row["peak_gib"] is None else f"{row['peak_gib']:.1f}"
        took = f"{row['ms']:.0f}" + (", the first" if row.get("first") else "")
        order = "the preset's" if row.get("ordered") else "the model's"
        of_steps = f"{whole:.2f}x" + (f", {warmup} dense" if warmup else "")
        lines.append(
            f"| {row['attention']} | {row['density']:.3f} | {order} | {took} | {peak} "
            f"| {fastest['ms'] / row['ms']:.2f}x | {of_steps} |"
        )
    return [*lines, ""]


def page(runs: list[dict[str, Any]]) -> str:
    """The tables of all runs; of a model measured twice the last one."""
    latest = {name: number for number, run in enumerate(runs, start=1) for name in run["models"]}
    lines = [
        "# One denoising forward of video transformers",
        "",
        "Random weights, batch 1, videos of the size that `psa generate` takes for the model. All is in the time:",
        "token order, importance, masks, hooks. Density is what was executed. Peak is the most memory allocated, the",
        "transformer's weights included and no other part of the pipeline. The last column weighs dense and sparse",
        f"steps as the preset mixes them, without text encoder and VAE. The paper has {PAPER:.2f}x for whole videos of",
        "Wan2.1-1.3B at density 0.09 on an H200.",
        "",
        *(f"{number}. {run['about']}" for number, run in enumerate(runs, start=1) if number in latest.values()),
        "",
    ]
    for name in MODELS:
        if name in latest:
            lines += table(name, runs[latest[name] - 1]["models"][name], f"Run {latest[name]}")
    return "\n".join(lines)


def about(command: str, commit: str | None, *, tiny: bool) -> str:
    """Where and of what a run of `command` is; the commit is what git says where it is None."""
    if commit is None:
        git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
        commit = git.stdout.strip() or "unknown"
    where = "A CPU" if tiny else f"{torch.cuda.get_device_name()}, cuDNN {torch.backends.cudnn.version()}"
    return (
        f"{where}, torch {torch.__version__}, Triton {triton.__version__}, diffusers {diffusers.__version__}, "
        f"psa-integrations {psa_integrations.__version__} at commit {commit}: "
        f"`{command}`"
    )


def chosen(text: str) -> list[str]:
    """The models that `--models` names."""
    names = [] if text == "none" else text.split(",")
    unknown = [name for name in names if name not in MODELS]
    if unknown:
        raise argparse.ArgumentTypeError(f"must be none or some of {','.join(MODELS)}, got {unknown[0]}")
    return names


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--models", type=chosen, default=list(MODELS), help="with commas between; none: measure nothing"
    )
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no model after this time")
    parser.add_argument("--tiny", action="store_true", help="small models, on the CPU, to see that it runs")
    parser.add_argument("--commit", help="what is measured, where git does not know")
    parser.add_argument("--json", type=Path, help="raw numbers of this run and of those that the file has")
    parser.add_argument("--out", type=Path, help="also write the tables to this file")
    options = parser.parse_args(arguments)
    if options.models and not options.tiny and not torch.cuda.is_available():
        sys.exit("dit_forward needs an NVIDIA GPU, or --tiny")
    start = time.monotonic()
    device = torch.device("cpu" if options.tiny else "cuda")
    dtype = torch.float32 if options.tiny else torch.bfloat16
    runs = json.loads(options.json.read_text())["runs"] if options.json and options.json.exists() else []
    found: dict[str, Any] = {}
    if options.models:
        tiny = "--tiny " if options.tiny else ""
        command = f"python benchmarks/dit_forward.py {tiny}--models {','.join(options.models)}"
        runs.append({"about": about(command, options.commit, tiny=options.tiny), "models": found})
    with torch.no_grad():
        for name in options.models:
            if time.monotonic() - start > options.seconds:
                print(f"no time left for {name}", file=sys.stderr)
                continue
            found[name] = measure(name, device, dtype, tiny=options.tiny)
            write(options.json, json.dumps({"runs": runs}, indent=1) + "\n")
            write(options.out, page(runs))
    write(options.out, page(runs))
    print(page(runs))


if __name__ == "__main__":
    main()
