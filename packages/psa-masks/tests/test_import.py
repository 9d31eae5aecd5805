import subprocess
import sys

IMPORT_WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None  # importing it now raises ImportError
import torch
import psa_masks

for name in psa_masks.__all__:
    getattr(psa_masks, name)
x = torch.ones(1, 1, 8, 4)
psa_masks.MaskPolicy(mode="quota", bounds=(0.5,), block_q=4, block_kv=4)(x, x)
assert not torch.cuda.is_initialized()
"""


def test_imports_and_runs_without_triton_and_says_nothing() -> None:
    ran = subprocess.run([sys.executable, "-c", IMPORT_WITHOUT_TRITON], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")
