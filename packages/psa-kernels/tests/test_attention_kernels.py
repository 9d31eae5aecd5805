"""``attention_kernels`` names what runs on a device."""

import sys

import pytest
import torch

from psa_kernels import AttentionKernels, attention_kernels, checks

HOPPER = "psa_kernels.pyramid_attention.hopper_fwd"


def test_the_cpu_has_plain_torch():
    assert attention_kernels(torch.device("cpu")) == attention_kernels("cpu") == AttentionKernels(("torch_impl",))


@pytest.mark.parametrize(
    ("capability", "forward"),
    [((7, 5), "torch_impl"), ((8, 0), "triton_fwd"), ((8, 9), "triton_fwd"), ((10, 0), "triton_fwd")],
)
def test_a_gpu_has_one_kernel_by_its_capability(monkeypatch, capability, forward):
    monkeypatch.setattr(checks, "gpu_capability", lambda device: capability)
    assert attention_kernels(torch.device("cuda")) == AttentionKernels((forward,))


def test_hopper_has_two_where_this_triton_can_compile_its_own(monkeypatch):
    monkeypatch.setattr(checks, "gpu_capability", lambda device: (9, 0))
    monkeypatch.setitem(sys.modules, HOPPER, object())
    assert attention_kernels(torch.device("cuda")) == AttentionKernels(("hopper_fwd", "triton_fwd"))


def test_hopper_without_its_own_kernel_says_why(monkeypatch):
    monkeypatch.setattr(checks, "gpu_capability", lambda device: (9, 0))
    monkeypatch.setitem(sys.modules, HOPPER, None)  # what makes an import of it an ImportError
    found = attention_kernels(torch.device("cuda"))
    assert found.forward == ("triton_fwd",)
    assert HOPPER in found.without_hopper
