"""Check what the built archives hold. Usage: python archives.py FOLDER"""

import sys
import tarfile
import zipfile
from pathlib import Path

# Data that the code reads at run time, or that every distribution owes its users.
EXPECTED = {
    "psa_kernels": ("psa_kernels/py.typed",),
    "psa_masks": ("psa_masks/py.typed",),
    "psa_config": ("psa_config/py.typed", "psa_config/schema.json", "psa_config/presets/tiny-wan.yaml"),
    "psa_integrations": (
        "psa_integrations/py.typed",
        "psa_integrations/tiny_wan/weights/transformer/diffusion_pytorch_model.safetensors",
        "psa_integrations/tiny_wan/weights/text_encoder/diffusion_pytorch_model.safetensors",
        "psa_integrations/tiny_wan/weights/scheduler/scheduler_config.json",
        "psa_integrations/report/template/report.html",
        "psa_integrations/report/template/report.css",
        "psa_integrations/report/template/scripts/page.js",
    ),
}


def main() -> None:
    folder = Path(sys.argv[1])
    for module, expected in EXPECTED.items():
        (wheel,) = folder.glob(f"{module}-*.whl")
        (sdist,) = folder.glob(f"{module}-*.tar.gz")
        with zipfile.ZipFile(wheel) as archive:
            names = archive.namelist()
        with tarfile.open(sdist) as archive:
            sources = archive.getnames()
        missing = [name for name in expected if name not in names]
        missing += [
            f"LICENSE in {path.name}"
            for path, held in ((wheel, names), (sdist, sources))
            if not any(name.endswith("/LICENSE") for name in held)
        ]
        assert not missing, f"{module} lacks {missing}"
        strays = [name for name in names if not name.startswith((f"{module}/", f"{module}-"))]
        assert not strays, f"{wheel.name} holds {strays}"


if __name__ == "__main__":
    main()
