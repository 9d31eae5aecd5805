"""Importing the package does no work and needs no Triton."""

import subprocess
import sys

IMPORT_WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None  # importing it now raises ImportError
import torch
import psa_integrations

for name in psa_integrations.__all__:
    getattr(psa_integrations, name)
import psa_integrations.cli

assert not {"diffusers", "torchmetrics"} & set(sys.modules)
assert not torch.cuda.is_initialized()
x = torch.ones(1, 1, 8, 4)
assert torch.equal(psa_integrations.PyramidAttention("tiny-wan/psa_tail")(x, x, x), x)
"""


def test_imports_and_runs_without_triton_and_says_nothing() -> None:
    ran = subprocess.run([sys.executable, "-c", IMPORT_WITHOUT_TRITON], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")
