"""The profile of the property tests, and how far from the devices they run."""

import os
import sys
from pathlib import Path

import torch
from hypothesis import HealthCheck, settings

sys.path.insert(0, str(Path(__file__).parent))  # makes tests/lib importable as `lib`
sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

if not torch.cuda.is_available():
    # Read by Triton when it is first imported, which happens when a Triton operator first runs.
    os.environ.setdefault("TRITON_INTERPRET", "1")

settings.register_profile("across", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("across")
