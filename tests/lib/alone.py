"""Run inside the environment of one package: nothing is installed that it does not declare, and importing it is light.

Usage: python alone.py psa-kernels
"""

import re
import subprocess
import sys
from importlib import metadata

# What a fresh virtual environment holds.
BASE = {"pip", "setuptools"}


def normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def declared(package: str, extra: str) -> set[str]:
    """The closure of what ``package`` requires, with ``extra``; markers are taken as met, so it is never too small."""
    found: set[tuple[str, str]] = set()
    waiting = [(package, extra)]
    while waiting:
        name, wanted = waiting.pop()
        if (name, wanted) in found:
            continue
        found.add((name, wanted))
        try:
            requirements = metadata.requires(name) or []
        except metadata.PackageNotFoundError:  # required under a marker that is not met here
            continue
        for requirement in requirements:
            marker = requirement.partition(";")[2]
            if "extra" in marker and not (wanted and f"{wanted!r}" in marker.replace('"', "'")):
                continue
            head = re.match(r"\s*([A-Za-z0-9._-]+)\s*(?:\[([^\]]*)\])?", requirement)
            assert head is not None, requirement
            waiting += [(normalised(head[1]), part.strip()) for part in (head[2] or "").split(",")]
    return {name for name, _ in found}


def main() -> None:
    package = sys.argv[1]
    installed = {normalised(dist.name) for dist in metadata.distributions()}
    surplus = installed - declared(package, "test") - BASE
    assert not surplus, f"installed beyond what {package} declares: {sorted(surplus)}"
    code = (
        "import sys; sys.modules['triton'] = None\n"
        f"import {package.replace('-', '_')}\n"
        "torch = sys.modules.get('torch')\n"
        "assert torch is None or not torch.cuda.is_initialized(), 'the import started CUDA'\n"
        f"assert {package!r} != 'psa-config' or torch is None, 'psa_config must not import torch'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


if __name__ == "__main__":
    main()
