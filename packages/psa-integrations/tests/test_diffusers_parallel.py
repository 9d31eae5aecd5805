"""Context parallelism by Ulysses over two processes is what one process computes."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from psa_integrations.diffusers.parallel import parallel_problem
from psa_kernels.testing import assert_within_error_budget

SCRIPT = Path(__file__).with_name("context_parallel.py")


def assert_two_processes_are_one(device: str, folder: Path) -> None:
    size = 2
    common = os.environ | {"WORLD_SIZE": str(size)}
    command = [sys.executable, str(SCRIPT), device, str(folder)]
    processes = [
        subprocess.Popen(command, env=common | {"RANK": str(rank)}, stderr=subprocess.PIPE, text=True)
        for rank in range(size)
    ]
    try:
        for process in processes:
            _, errors = process.communicate(timeout=200)
            assert process.returncode == 0, errors
    finally:
        for process in processes:
            process.kill()
            process.wait()
    first, second = (torch.load(folder / f"{rank}.pt") for rank in range(size))
    assert len(first) == 4
    for case, (found, exact, low) in first.items():
        assert_within_error_budget(found, exact, low)
        assert torch.equal(found, second[case][0])


def test_two_processes_are_one(tmp_path: Path) -> None:
    assert_two_processes_are_one("cpu", tmp_path)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_are_one(tmp_path: Path) -> None:
    assert_two_processes_are_one("cuda", tmp_path)


def test_what_cannot_be_served_has_a_reason() -> None:
    def problem(heads: int = 4, refusal: str | None = None, tokens: int = 360, **changes: object) -> str | None:
        options = {"ring_degree": 1, "ulysses_degree": 2, "ulysses_anything": False}
        config = SimpleNamespace(context_parallel_config=SimpleNamespace(**options | changes))
        return parallel_problem(SimpleNamespace(_parallel_config=config), heads, refusal, tokens)

    assert problem() is None
    assert parallel_problem(SimpleNamespace(), 3, "no plan", 7) is None
    assert problem(refusal="no plan") == "context parallelism does not go with this model: no plan"
    assert "ring_degree 3" in str(problem(ring_degree=3))
    assert "must divide the heads, got 3 for ulysses_degree 2" in str(problem(heads=3))
    assert "must divide the tokens, got 361 for ulysses_degree 2" in str(problem(tokens=361))
