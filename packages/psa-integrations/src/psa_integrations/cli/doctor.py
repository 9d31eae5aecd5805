"""`psa doctor`: what this machine has, whether the operators are right on it, and what to do where not."""

import argparse
import json
import platform
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from importlib.util import find_spec
from typing import Any, Literal

import torch
from packaging.requirements import Requirement
from packaging.version import Version

from psa_integrations.cli.load import device_named
from psa_integrations.cli.output import counted
from psa_integrations.cli.selftest import check_operators
from psa_kernels import attention_kernels
from psa_kernels.checks import MIN_CAPABILITY

PACKAGES = ("psa-kernels", "psa-masks", "psa-config", "psa-integrations")
_THIS = "psa-integrations"
_SHOWN = ("torch", "triton", "diffusers", "transformers", *PACKAGES)


@dataclass(frozen=True)
class Finding:
    """One thing looked at. `note` is no fault: something is slower, or cannot be had here. `advice` is what to do."""

    name: str
    status: Literal["ok", "note", "fail"]
    detail: str
    advice: str = ""


def add_parser(commands: Any) -> None:
    """Adds the subcommand to what `add_subparsers` returned."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "doctor",
        help="check the installation and the operators on this machine",
        description="Looks at versions, GPU and video encoder, and holds every operator against the oracle on the "
        "device. The exit status is 1 if something is wrong; a note is something to know, not wrong.",
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: a GPU where there is one)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Prints the findings; returns the exit status."""
    device = device_named(options.device)
    findings = list(examine(device))
    failed = [finding for finding in findings if finding.status == "fail"]
    if options.json:
        report = {
            "ok": not failed,
            "device": str(device),
            "attention_kernels": attention_kernels(device).forward,
            "findings": [asdict(finding) for finding in findings],
        }
        print(json.dumps(report, indent=2))
    else:
        width = max(len(finding.name) for finding in findings)
        for finding in findings:
            print(f"{finding.status:<4}  {finding.name:<{width}}  {finding.detail}")
            if finding.advice:
                print(f"{'':<{width + 8}}{finding.advice}")
        print(f"{len(failed)} wrong" if failed else "All is well.")
    return 1 if failed else 0


def examine(device: torch.device) -> Iterator[Finding]:
    """Everything there is to say about this machine and a run on `device`."""
    yield Finding("python", "ok", f"{platform.python_version()} on {platform.platform()}")
    yield from _versions()
    yield from _device(device)
    yield _attention(device)
    yield from _models()
    yield _encoder()
    yield _lora()
    yield from _operators(device)


def _versions() -> Iterator[Finding]:
    try:
        requirements = [Requirement(line) for line in metadata.requires(_THIS) or ()]
    except metadata.PackageNotFoundError:
        yield Finding(_THIS, "note", "runs from its sources, not installed: version ranges are not checked")
        requirements = []
    wanted = {need.name: need for need in requirements if need.marker is None or need.marker.evaluate({"extra": ""})}
    for name in (*wanted, *(shown for shown in _SHOWN if shown not in wanted)):
        version = _version(name)
        need = wanted.get(name)
        if need is None:
            if version is not None:
                yield Finding(name, "ok", version)
        elif version is None:
            yield Finding(name, "fail", "not installed", f"pip install '{need}'")
        elif not need.specifier.contains(version, prereleases=True):
            yield Finding(name, "fail", f"{version}, outside {need.specifier}", f"pip install '{need}'")
        elif name in _SHOWN:
            yield Finding(name, "ok", f"{version}, within {need.specifier}")


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _device(device: torch.device) -> Iterator[Finding]:
    if device.type != "cuda":
        threads = counted(torch.get_num_threads(), "thread")
        yield Finding("device", "note", f"{device}, {threads}: the torch implementation runs, Triton does not")
        if shutil.which("nvidia-smi") and not torch.cuda.is_available():
            yield Finding(
                "gpu",
                "note",
                f"an NVIDIA driver is installed and torch {torch.__version__} sees no GPU",
                "install a build of torch with CUDA, or see what nvidia-smi says about the driver",
            )
        return
    properties: Any = torch.cuda.get_device_properties(device)  # torch's stub lacks a field
    capability = (properties.major, properties.minor)
    yield Finding(
        "device",
        "ok",
        f"{device}, {properties.name}, compute capability {capability[0]}.{capability[1]}, "
        f"{properties.total_memory / 2**30:.0f} GiB, {properties.shared_memory_per_block_optin // 1024} KiB of shared "
        "memory a program",
    )
    if torch.version.hip is not None:
        yield Finding("gpu", "note", "an AMD GPU: the kernels were never tried on one", "trust the operators below")
    elif capability < MIN_CAPABILITY:
        yield Finding(
            "gpu",
            "note",
            f"below compute capability {MIN_CAPABILITY[0]}.{MIN_CAPABILITY[1]}: the torch implementation runs",
            "dense attention may be faster on this GPU: psa bench tells",
        )
    elif find_spec("triton") is None:
        yield Finding("triton", "fail", "not installed, and a GPU needs it", "install the triton that belongs to torch")


def _attention(device: torch.device) -> Finding:
    name, kernels = "attention forward", attention_kernels(device)
    if kernels.without_hopper:
        detail = f"triton_fwd, the kernel for every GPU, and not the one for Hopper: {kernels.without_hopper}"
        return Finding(name, "note", detail)
    first = kernels.forward[0]
    if first == "hopper_fwd":
        detail = "hopper_fwd, the kernel for Hopper, for the calls it takes; triton_fwd, for every GPU, for the rest"
    elif first == "triton_fwd":
        detail = "triton_fwd, the kernel for every GPU"
    else:
        detail = f"{first}, plain torch"
    return Finding(name, "ok", detail)


def _models() -> Iterator[Finding]:
    version = _version("diffusers")
    if version is None:
        return  # said among the versions
    import diffusers

    from psa_integrations.diffusers.apply import ADAPTERS

    missing = [name for name in ADAPTERS if not hasattr(diffusers, name)]
    if missing:
        yield Finding("models", "fail", f"diffusers has no {', '.join(missing)}", "pip install --upgrade diffusers")
    elif Version(version) < Version("0.41"):
        detail = "the step of a Wan run is looked up in the schedule: this diffusers does not tell it"
        yield Finding("models", "note", detail, "pip install --upgrade 'diffusers>=0.41' where a scheduler is unknown")
    else:
        yield Finding("models", "ok", f"{', '.join(ADAPTERS)}; other transformers are refused by apply")


def _encoder() -> Finding:
    try:
        import imageio_ffmpeg

        return Finding("video", "ok", f"ffmpeg {imageio_ffmpeg.get_ffmpeg_version()}")
    except (ImportError, OSError, RuntimeError) as error:
        return Finding("video", "fail", f"no encoder: {error}", "pip install --force-reinstall imageio-ffmpeg")


def _lora() -> Finding:
    if find_spec("peft") is None:
        return Finding("lora", "note", "peft is not installed", "for --lora: pip install 'psa-integrations[lora]'")
    return Finding("lora", "ok", f"peft {_version('peft')}")


def _operators(device: torch.device) -> Iterator[Finding]:
    for check in check_operators(device):
        name = f"{check.operator} {check.dtype}"
        if check.problem:
            advice = "impl='torch' may do; please report this with the output of psa doctor --json"
            yield Finding(name, "fail", f"{check.impl}: {check.problem}", advice)
        else:
            yield Finding(name, "ok", f"{check.impl}: within the error budget of the oracle")
