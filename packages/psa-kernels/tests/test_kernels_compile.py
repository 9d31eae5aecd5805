"""Every kernel compiles to machine code and fits the device, on machines without a GPU too."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    "arguments", [("80",), ("90",), *((capability, "--tiles") for capability in ("86", "90", "120"))], ids=" ".join
)
def test_for_a_gpu_that_is_not_here(arguments):
    pytest.importorskip("triton", reason="Triton is not published for this platform")
    script = Path(__file__).with_name("compile_kernels.py")
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    run = subprocess.run([sys.executable, str(script), *arguments], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
