"""`psa doctor`: well here, and not where something is broken, missing or old."""

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from psa_integrations.cli import doctor, main, selftest
from psa_integrations.cli.doctor import PACKAGES, Finding
from psa_integrations.diffusers.apply import ADAPTERS
from psa_integrations.diffusers.wan import WanAdapter
from psa_kernels import AttentionKernels


@pytest.fixture
def untested(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves out the operators, which take a second."""
    monkeypatch.setattr(doctor, "check_operators", lambda device: [])


def findings(device: str = "cpu") -> dict[str, Finding]:
    return {finding.name: finding for finding in doctor.examine(torch.device(device))}


def test_this_machine_is_well(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--device", "cpu", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] is True
    assert report["device"] == "cpu"
    assert report["attention_kernels"] == ["torch_impl"]
    found = {finding["name"]: finding for finding in report["findings"]}
    assert {"python", "torch", "diffusers", "transformers", "device", "video"} <= set(found)
    assert "the torch implementation runs" in found["device"]["detail"]
    assert found["attention forward"]["detail"] == "torch_impl, plain torch"
    operators = [name for name in found if name.endswith(" float32")]
    assert [name.removesuffix(" float32") for name in operators] == [
        "pool_pyramid",
        "key_similarity",
        "block_importance",
        "block_importance antidiagonal",
        "rank_levels",
        "share_levels",
        "LevelPlan",
        "pyramid_attention",
        "pyramid_attention gradients",
        "kmeans",
        "leading_directions",
        "kd_tree",
        "permute_tokens",
    ]
    assert all(found[name]["detail"].startswith("torch: within") for name in operators)


class Called(TorchDispatchMode):
    """Notes which of the kernels' operators run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "psa_kernels":
            self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_every_operator_that_is_registered_is_held_against_its_oracle() -> None:
    with Called() as called:
        assert not [check for check in selftest.check_operators(torch.device("cpu")) if check.problem]
    assert called.names == set(torch.ops.psa_kernels)


@pytest.mark.parametrize(
    "check",
    [
        "pool_pyramid",
        "key_similarity",
        "block_importance",
        "block_importance antidiagonal",
        "pyramid_attention",
        "pyramid_attention gradients",
        "kmeans",
        "leading_directions",
    ],
)
def test_an_operator_that_is_a_little_wrong_is_found(check: str, monkeypatch: pytest.MonkeyPatch) -> None:
    operator = check.split()[0]
    right = getattr(selftest, operator)

    def wrong(*args: object, impl: str | None = None, **options: object) -> object:
        result = right(*args, impl=impl, **options)
        if impl == "reference":
            return result
        if operator == "pool_pyramid":
            return SimpleNamespace(pooled=result.pooled * 1.001)
        if operator == "kmeans":
            return result._replace(centroids=result.centroids * 1.001)
        return (result[0] * 1.001, result[1]) if isinstance(result, tuple) else result * 1.001

    monkeypatch.setattr(selftest, operator, wrong)
    with pytest.raises(AssertionError, match="exceeds the budget"):
        dict(selftest._checks(torch.device("cpu"), torch.float32))[check]()


def test_what_fails_and_what_does_not_compile_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def crash() -> None:
        raise MemoryError("out of shared memory,\nRequired: 300000")

    monkeypatch.setattr(selftest, "_checks", lambda device, dtype: [("key_similarity", crash), ("LevelPlan", int)])
    assert main(["doctor", "--device", "cpu"]) == 1
    printed = capsys.readouterr().out
    assert printed.endswith("1 wrong\n")
    line = next(line for line in printed.splitlines() if line.startswith("fail"))
    assert line.split()[1:3] == ["key_similarity", "float32"]
    assert line.endswith("torch: MemoryError: out of shared memory, Required: 300000")


@pytest.mark.usefixtures("untested")
def test_versions_out_of_range_and_missing_ones_fail(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    known = {"torch": "2.8.0", "diffusers": None, "psa-masks": "0.2.0"}
    needs = ["torch>=2.9", "diffusers>=0.38", "psa-masks<0.2,>=0.1", 'peft>=0.15; extra == "lora"']
    monkeypatch.setattr(doctor.metadata, "requires", lambda name: needs)
    monkeypatch.setattr(doctor, "_version", lambda name: known.get(name, "1.0"))
    found = findings()
    assert [found[name].status for name in ("torch", "diffusers", "psa-masks")] == ["fail"] * 3
    assert found["torch"].detail == "2.8.0, outside >=2.9"
    assert found["torch"].advice == "pip install 'torch>=2.9'"
    assert found["diffusers"].detail == "not installed"
    assert "peft" not in found
    assert main(["doctor", "--device", "cpu"]) == 1
    assert "3 wrong" in capsys.readouterr().out


@pytest.mark.usefixtures("untested")
def test_sources_without_metadata_are_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(name: str) -> list[str]:
        raise doctor.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(doctor.metadata, "requires", none)
    assert findings()["psa-integrations"].status in ("note", "ok")
    assert not [finding for finding in findings().values() if finding.status == "fail"]


@pytest.mark.usefixtures("untested")
@pytest.mark.parametrize(
    ("capability", "hip", "triton", "name", "status", "said"),
    [
        ((9, 0), None, True, "device", "ok", "compute capability 9.0, 80 GiB, 227 KiB of shared memory a program"),
        ((7, 5), None, True, "gpu", "note", "below compute capability 8.0: the torch implementation runs"),
        ((9, 4), "6.2", True, "gpu", "note", "an AMD GPU"),
        ((9, 0), None, False, "triton", "fail", "not installed, and a GPU needs it"),
    ],
)
def test_a_gpu_is_described(
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int],
    hip: str | None,
    triton: bool,
    name: str,
    status: str,
    said: str,
) -> None:
    card = SimpleNamespace(
        name="A card",
        major=capability[0],
        minor=capability[1],
        total_memory=80 * 2**30,
        shared_memory_per_block_optin=227 * 1024,
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(doctor, "find_spec", lambda module: object() if triton else None)
    found = {finding.name: finding for finding in doctor._device(torch.device("cuda"))}
    assert found[name].status == status
    assert said in found[name].detail


@pytest.mark.parametrize(
    ("kernels", "status", "detail"),
    [
        (AttentionKernels(("triton_fwd",)), "ok", "triton_fwd, the kernel for every GPU"),
        (AttentionKernels(("hopper_fwd", "triton_fwd")), "ok", "hopper_fwd, the kernel for Hopper, for the calls"),
        (AttentionKernels(("triton_fwd",), "this is 3.5"), "note", "not the one for Hopper: this is 3.5"),
    ],
)
def test_the_attention_kernels_are_said(
    monkeypatch: pytest.MonkeyPatch, kernels: AttentionKernels, status: str, detail: str
) -> None:
    monkeypatch.setattr(doctor, "attention_kernels", lambda device: kernels)
    finding = doctor._attention(torch.device("cuda"))
    assert finding.status == status
    assert detail in finding.detail


@pytest.mark.usefixtures("untested")
def test_a_driver_without_a_torch_that_sees_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "with CUDA" in findings()["gpu"].advice


@pytest.mark.usefixtures("untested")
@pytest.mark.parametrize(("version", "status"), [("0.40.1", "note"), ("0.41.0", "ok")])
def test_an_older_diffusers_is_a_note(monkeypatch: pytest.MonkeyPatch, version: str, status: str) -> None:
    monkeypatch.setattr(doctor, "_version", lambda name: version)
    assert next(iter(doctor._models())).status == status


@pytest.mark.usefixtures("untested")
def test_every_transformer_that_can_be_served_is_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "LTXVideoTransformer3DModel" in findings()["models"].detail
    monkeypatch.setitem(ADAPTERS, "NewTransformer3DModel", WanAdapter)
    assert findings()["models"].status == "fail"
    assert findings()["models"].detail == "diffusers has no NewTransformer3DModel"


def test_an_unknown_device_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--device", "abacus"]) == 1
    assert "--device must be one that torch sees, cpu" in capsys.readouterr().err


def test_the_packages_are_the_four() -> None:
    assert {f"{name.replace('-', '_')}" for name in PACKAGES} == {
        "psa_kernels",
        "psa_masks",
        "psa_config",
        "psa_integrations",
    }
