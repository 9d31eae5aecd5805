"""`psa bench`: from which length on sparse attention is faster on this machine."""

import argparse
import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import interpolate, scaled_dot_product_attention

import psa_kernels
from psa_config import Preset, PyramidSparseAttention
from psa_integrations.attention import sparse_attention
from psa_integrations.build import content_orders, find_preset, mask_policy, sparse_attention_of
from psa_integrations.cli.arguments import Numbers, positive
from psa_integrations.cli.load import DTYPES, device_named
from psa_integrations.cli.models import MODELS, presets_name
from psa_integrations.cli.output import counted
from psa_integrations.cli.selftest import check_operators
from psa_integrations.cli.shapes import SHAPES, AttentionShape, grid_of
from psa_integrations.cli.timing import at_length, break_even, measure
from psa_integrations.diffusers import apply_pyramid_sparse_attention
from psa_masks import AttentionOrder, VideoGrid

CPU_LENGTHS, GPU_LENGTHS = (1024, 2048, 4096), (4096, 8192, 16384, 32768, 65536)
CPU_PRESETS = ("tiny-wan/psa_balanced", "tiny-wan/psa_tail")
GPU_PRESETS = ("Wan2.1_1.3b/psa_balanced", "Wan2.1_1.3b/psa_tail", "Wan2.1_1.3b/psa_topk")
_DENSE = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
_SIZES = ((832, 480, 49), (832, 480, 81), (1280, 720, 49), (1280, 720, 81), (64, 64, 16), (96, 96, 24))
"""Width, height and frames that are talked about besides a model's own."""


@dataclass(frozen=True)
class Row:
    """One length: seconds of each dense back-end, and seconds and density of each preset."""

    tokens: int
    dense: dict[str, float]
    sparse: dict[str, float]
    density: dict[str, float]

    @property
    def best_dense(self) -> float:
        """Seconds of the fastest back-end."""
        return min(self.dense.values())


@dataclass(frozen=True)
class Forward:
    """A forward of the tiny model: seconds dense and with its preset, and the density of that."""

    tokens: int
    dense: float
    sparse: float
    density: float


def add_parser(commands: Any) -> None:
    """Adds the subcommand to what `add_subparsers` returned."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "bench",
        help="time dense and sparse attention on this machine",
        description="Times every dense back-end of torch and every preset, whole: orders by content, importance, "
        "levels, plan and attention, in one sparse step. Says from which length on a preset is faster. Before any "
        "timing the operators are held against the oracle.",
    )
    parser.add_argument("--lengths", action=Numbers, least=1, metavar="TOKENS", help="default: to suit the device")
    parser.add_argument("--heads", type=positive, help="default: those of the first preset's model")
    parser.add_argument("--head-dim", type=positive, help="default: that of the first preset's model")
    parser.add_argument("--preset", action="append", metavar="MODEL/PRESET", help="may be given more than once")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: a GPU where there is one)")
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="default: bfloat16 on a GPU, float32 on a CPU")
    parser.add_argument("--repeats", type=positive, default=3, help="runs of each call (default 3)")
    parser.add_argument("--no-forward", action="store_true", help="leave out the forward of the tiny model")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Checks, times, prints."""
    device = device_named(options.device)
    on_gpu = device.type == "cuda"
    names = options.preset or (GPU_PRESETS if on_gpu else CPU_PRESETS)
    presets = list(dict.fromkeys(_preset_named(name) for name in names))
    for preset in presets:
        if sparse_attention_of(preset) is None:
            raise ValueError(f"--preset must be sparse, dense attention is timed anyway; got {_title(preset)}")
    shape = SHAPES.get(presets[0].model, AttentionShape(1, 8, 64))
    heads, head_dim = options.heads or shape.heads, options.head_dim or shape.head_dim
    dtype = DTYPES[options.dtype] if options.dtype else torch.bfloat16 if on_gpu else torch.float32
    lengths = options.lengths or (GPU_LENGTHS if on_gpu else CPU_LENGTHS)
    wrong = [check for check in check_operators(device) if check.problem]
    if wrong:
        raise RuntimeError(f"{wrong[0].operator} is wrong on {device}, so nothing is timed; see psa doctor")

    with torch.no_grad():
        rows = [_row(length, heads, head_dim, dtype, device, presets, options.repeats) for length in lengths]
        forward = None if options.no_forward else _forward(device, dtype, options.repeats if on_gpu else 1)
    advice = list(recommendations(rows, presets))
    if options.json:
        setup = {
            "device": _device_name(device),
            "threads": None if on_gpu else torch.get_num_threads(),
            "torch": torch.__version__,
            "psa_kernels": psa_kernels.__version__,
            "heads": heads,
            "head_dim": head_dim,
            "dtype": str(dtype).removeprefix("torch."),
            "repeats": options.repeats,
        }
        timed = {"rows": [asdict(row) for row in rows], "forward": forward and asdict(forward)}
        print(json.dumps({**setup, **timed, "recommendations": advice}, indent=2))
        return
    threads = "" if on_gpu else f", {counted(torch.get_num_threads(), 'thread')}"
    print(
        f"{_device_name(device)}{threads}, torch {torch.__version__}, psa-kernels {psa_kernels.__version__}: batch 1, "
        f"{counted(heads, 'head')} of {head_dim}, {str(dtype).removeprefix('torch.')}, milliseconds"
    )
    print()
    print(table(rows))
    if forward is not None:
        print()
        print(
            f"A forward of tiny-wan at {counted(forward.tokens, 'token')}: dense {1000 * forward.dense:.0f} ms, "
            f"psa_balanced {1000 * forward.sparse:.0f} ms at density {forward.density:.3f}."
        )
    print()
    print("\n".join(advice))


def _preset_named(name: str) -> Preset:
    model, slash, preset = name.partition("/")
    return find_preset(f"{presets_name(model)}{slash}{preset}")


def _title(preset: Preset) -> str:
    return f"{preset.model}/{preset.name}"


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def _row(
    tokens: int,
    heads: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
    presets: list[Preset],
    repeats: int,
) -> Row:
    query, key, value = _inputs(tokens, heads, head_dim, dtype, device)
    dense = dict(_dense_calls(query, key, value))
    sparse: dict[str, Callable[[], object]] = {}
    density = {}
    for preset in presets:
        attention = sparse_attention_of(preset)
        assert attention is not None
        order = _order_by_content(attention, tokens)
        call = partial(sparse_attention, query, key, value, mask_policy(attention), order=order)
        density[_title(preset)] = float(call()[1].mean())
        sparse[_title(preset)] = call
    seconds = measure({**dense, **sparse}, device, repeats)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return Row(tokens, {name: seconds[name] for name in dense}, {name: seconds[name] for name in sparse}, density)


def _order_by_content(
    attention: PyramidSparseAttention, tokens: int
) -> Callable[[Tensor, Tensor], AttentionOrder] | None:
    """What each attention of a run does anew beside the levels: one step after another, within one layer."""
    contents = content_orders(attention, VideoGrid(frames=tokens, height=1, width=1))
    if contents is None:
        return None
    steps = itertools.count()
    return lambda query, key: contents(query, key, step=next(steps))


def _inputs(tokens: int, heads: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Query, key and value in which neighbours are alike, as in video.

    Made such that the bounds of the shipped presets come to densities between 0.1 and 0.3, as in the models, and that
    longer sequences are not sharper by their making.
    """
    generator = torch.Generator(device).manual_seed(0)
    made = []
    for _ in range(3):
        points = torch.randn(heads, head_dim, 2 + tokens // 64, generator=generator, device=device)
        smooth = interpolate(points, size=tokens, mode="linear").mT
        noise = torch.randn(heads, tokens, head_dim, generator=generator, device=device)
        made.append((1.5 * smooth + 0.5 * noise)[None].to(dtype).contiguous())
    return made


def _dense_calls(query: Tensor, key: Tensor, value: Tensor) -> Iterator[tuple[str, Callable[[], object]]]:
    """Each of torch's back-ends that takes these tensors; on a CPU torch chooses for itself."""
    if query.device.type != "cuda":
        yield "sdpa", partial(scaled_dot_product_attention, query, key, value)
        return

    def by(backend: SDPBackend) -> Tensor:
        with sdpa_kernel([backend]):
            return scaled_dot_product_attention(query, key, value)

    for name, backend in _DENSE.items():
        try:
            by(backend)
        except RuntimeError:  # what torch raises where a back-end does not take the card, the dtype or the head
            continue
        yield name, partial(by, backend)


def _forward(device: torch.device, dtype: torch.dtype, repeats: int) -> Forward:
    """A forward of the shipped model in a sparse step."""
    # Imported here because diffusers takes seconds to import.
    from psa_integrations.tiny_wan import load_pipeline
    from psa_integrations.tiny_wan.captions import encode_captions
    from psa_integrations.tiny_wan.model import with_motion

    pipeline = load_pipeline(device, dtype)
    preset = find_preset("tiny-wan/psa_balanced")
    grid = grid_of(preset, width=64, height=64, frames=16)
    generator = torch.Generator().manual_seed(0)
    video = torch.randn(1, 3, 16, 64, 64, generator=generator).to(device, dtype)
    ids = encode_captions(["a red circle moving right on a striped background"]).to(device)
    call = partial(
        pipeline.transformer,
        hidden_states=with_motion(video, ids),
        timestep=torch.tensor([500.0], device=device),
        encoder_hidden_states=pipeline.text_encoder(ids).to(dtype),
        return_dict=False,
    )
    dense = measure({"dense": call}, device, repeats)["dense"]
    with apply_pyramid_sparse_attention(pipeline.transformer, preset) as applied:
        with applied.at_step(10, total=25):
            sparse = measure({"sparse": call}, device, repeats)["sparse"]
        density = applied.stats().density
    return Forward(grid.seq_len, dense, sparse, density)


def table(rows: list[Row]) -> str:
    """A Markdown table: milliseconds, and how many times faster than the fastest dense back-end."""
    dense, sparse = list(rows[0].dense), list(rows[0].sparse)
    lines = [f"| tokens | {' | '.join([*dense, *sparse])} |", "|---" * (1 + len(dense) + len(sparse)) + "|"]
    for row in rows:
        cells = [f"{1000 * row.dense[name]:.2f}" if name in row.dense else "-" for name in dense]
        for name in sparse:
            times = row.best_dense / row.sparse[name]
            cells.append(f"{1000 * row.sparse[name]:.2f}, x{times:.2f} at density {row.density[name]:.3f}")
        lines.append(f"| {row.tokens} | {' | '.join(cells)} |")
    return "\n".join(lines)


def recommendations(rows: list[Row], presets: list[Preset]) -> Iterator[str]:
    """What the times say about each preset, in words: where it breaks even, and which sizes of its model gain."""
    lengths, dense = [row.tokens for row in rows], [row.best_dense for row in rows]
    for preset in presets:
        sparse = [row.sparse[_title(preset)] for row in rows]
        last, first = break_even(lengths, dense, sparse)
        if first is None:
            yield f"{_title(preset)}: dense is faster up to {counted(lengths[-1], 'token')}, the longest measured."
        elif last is None:
            yield f"{_title(preset)}: faster than dense from {counted(first, 'token')} on, the shortest measured."
        else:
            yield f"{_title(preset)}: breaks even between {last:,} and {counted(first, 'token')}."
        for width, height, frames in _sizes(preset):
            tokens = grid_of(preset, width=width, height=height, frames=frames).seq_len
            if not lengths[0] / 2 <= tokens <= lengths[-1] * 2:
                continue
            times = at_length(tokens, lengths, dense) / at_length(tokens, lengths, sparse)
            words = f"sparse is faster, x{times:.2f}" if times > 1 else f"dense is faster, x{1 / times:.2f}"
            beyond = "" if lengths[0] <= tokens <= lengths[-1] else ", beyond what was measured"
            yield f"  {width}x{height}, {counted(frames, 'frame')} ({counted(tokens, 'token')}): {words}{beyond}"
    yield (
        "Attention alone, in a sparse step, on made-up tokens; real ones have another density, and a run has dense "
        "steps and other work too."
    )


def _sizes(preset: Preset) -> list[tuple[int, int, int]]:
    """The model's own size and the common ones that its tokens divide."""
    own = [
        (spec.defaults.width, spec.defaults.height, spec.defaults.frames)
        for spec in MODELS.values()
        if spec.presets == preset.model
    ]
    scale = preset.video_scale
    common = [size for size in _SIZES if not (size[0] % scale.width_divisor or size[1] % scale.height_divisor)]
    return sorted({*own, *common}, key=lambda size: size[0] * size[1] * size[2])
