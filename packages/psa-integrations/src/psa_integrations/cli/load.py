"""Weights to a pipeline on its device."""

import json
import logging
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from packaging.version import Version
from safetensors import SafetensorError

from psa_integrations.cli.models import ModelSpec

_log = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_model(
    spec: ModelSpec,
    *,
    weights: Path | None = None,
    lora: Path | None = None,
    device: str | None = None,
    dtype: str | None = None,
) -> Any:
    """Loads a model's pipeline.

    Args:
        spec: which model.
        weights: a local folder in diffusers' layout; None takes the shipped weights or those of the hub.
        lora: a safetensors file, or a folder that holds one, to load on top.
        device: None takes the GPU where there is one.
        dtype: a key of DTYPES; None is bfloat16 on a GPU and float32 on a CPU.

    Raises:
        OSError: weights or LoRA cannot be had; the message says where they were looked for.
        ValueError: no such device, a LoRA without peft installed, or a file that does not hold what it should.
    """
    place = device_named(device)
    precision = DTYPES[dtype] if dtype else torch.float32 if place.type == "cpu" else torch.bfloat16
    _log.info("loading %s onto %s in %s", spec.name, place, precision)
    if lora is not None:
        _check_lora(lora)
    try:
        if spec.hub is None:
            from psa_integrations.tiny_wan import load_pipeline

            pipeline: Any = load_pipeline(place, precision, folder=weights)
        else:
            pipeline = _load_diffusers(spec, weights, precision).to(place)
    except OSError:
        raise
    # What diffusers and transformers raise over files that are not what they should be.
    except (TypeError, ValueError, AttributeError, LookupError, RuntimeError, SafetensorError) as error:
        if is_out_of_memory(error):
            raise
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise ValueError(f"the weights in {weights or spec.hub} cannot be loaded: {kind}{error}") from error
    if lora is not None:
        _load_lora(pipeline, lora)
    return pipeline


def is_out_of_memory(error: Exception) -> bool:
    """Whether it is one of those by which Python, torch on a GPU and torch on a CPU say so."""
    said = ("can't allocate memory", "Storage size calculation overflowed")
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(text in str(error) for text in said)
    )


def device_named(name: str | None) -> torch.device:
    """The device called `name`; None is the GPU where there is one.

    Raises:
        ValueError: torch has no such device.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    seen = ["cpu"]
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is not None:
        seen += [f"{accelerator.type}:{index}" for index in range(torch.accelerator.device_count())]
    # By name: an index has eight bits in torch, to which cuda:256 is the first GPU.
    if name not in ("cpu:0", *seen) and f"{name}:0" not in seen:
        raise ValueError(f"--device must be one that torch sees, {' or '.join(seen)}, got {name}")
    return torch.device(name)


def _load_diffusers(spec: ModelSpec, weights: Path | None, dtype: torch.dtype) -> Any:
    import diffusers

    if weights is not None:
        _check_index(weights)
    argument = "dtype" if Version(diffusers.__version__) >= Version("0.40") else "torch_dtype"
    # Wan's VAE loses visible detail in half precision.
    precision = {"default": dtype, "vae": torch.float32} if spec.name.startswith("wan") else dtype
    try:
        return diffusers.DiffusionPipeline.from_pretrained(
            weights or spec.hub,
            use_safetensors=True,
            local_files_only=weights is not None,
            **{argument: precision},
        )
    except OSError as error:
        if weights is not None:
            raise
        raise FileNotFoundError(
            f"the weights of {spec.name} ({spec.hub}) are not in the local cache and could not be downloaded; "
            f"go online or pass --weights FOLDER. diffusers says: {error}"
        ) from error


def _check_index(weights: Path) -> None:
    import diffusers

    index = weights / "model_index.json"
    if not index.is_file():
        raise FileNotFoundError(f"--weights must be a folder with a model_index.json, got {weights}")
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{index} must be JSON: {error}") from error
    name = content.get("_class_name") if isinstance(content, dict) else None
    found = getattr(diffusers, name, None) if isinstance(name, str) else None
    if not (isinstance(found, type) and issubclass(found, diffusers.DiffusionPipeline)):
        raise ValueError(f"{index} must name a pipeline of diffusers as its _class_name, got {name!r}")


def _check_lora(path: Path) -> None:
    if find_spec("peft") is None:
        raise ValueError("--lora needs peft: pip install 'psa-integrations[lora]'")
    if path.is_dir():
        if not any(path.glob("*.safetensors")):
            raise FileNotFoundError(f"--lora must hold a .safetensors file, and {path} has none")
    elif path.suffix != ".safetensors" or not path.is_file():
        raise FileNotFoundError(f"--lora must be a .safetensors file or a folder with one, got {path}")


def _load_lora(pipeline: Any, path: Path) -> None:
    folder, name = (path, None) if path.is_dir() else (path.parent, path.name)
    try:
        pipeline.load_lora_weights(str(folder), weight_name=name, use_safetensors=True, local_files_only=True)
    except (SafetensorError, LookupError) as error:  # LookupError: half of a pair of matrices is not there
        raise ValueError(f"--lora must be a LoRA of this model in safetensors, and {path} is not: {error}") from error
