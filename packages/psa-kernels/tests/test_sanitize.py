"""The script for memory checkers launches every kernel."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


def test_every_kernel_is_launched():
    pytest.importorskip("triton", reason="Triton is not published for this platform")
    script = Path(__file__).with_name("sanitize.py")
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    launches = dict(line.split(": ") for line in run.stdout.splitlines())
    assert launches.keys() >= {"_forward_kernel", "_logits_kernel", "_reduce_kernel", "_plan_kernel", "_pool_kernel"}
    assert launches.keys() >= {"_delta_kernel", "_query_kernel", "_key_value_kernel", "_turn_kernel", "_readers_kernel"}
