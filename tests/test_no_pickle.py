"""Nothing of a stranger is unpickled: no pickle, torch.load for weights only, safetensors wherever weights load."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted([*ROOT.glob("packages/*/src/**/*.py"), *ROOT.glob("benchmarks/**/*.py")])
PICKLES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
WEIGHTS = {"from_pretrained", "load_lora_weights", "from_single_file", "load_attn_procs"}
# Its files are JSON and have no weights.
WITHOUT_WEIGHTS = ("FlowMatchEulerDiscreteScheduler.from_pretrained",)


def faults(source: str) -> Iterator[str]:
    """What in a file could run code that a data file brings along."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            yield from (f"imports {name}" for name in names if name.split(".")[0] in PICKLES)
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if called == "torch.load" and options.get("weights_only") != "True":
            yield "torch.load without weights_only=True"
        if called.endswith(("np.load", "numpy.load")) and options.get("allow_pickle", "False") != "False":
            yield "numpy.load with allow_pickle"
        if called in ("yaml.load", "yaml.unsafe_load", "yaml.full_load"):
            yield f"{called} instead of the safe loader"
        if called.split(".")[-1] in WEIGHTS and called not in WITHOUT_WEIGHTS:
            # A dict of options that is unpacked has to spell it out in the same file.
            unpacked = None in options and '"use_safetensors": True' in source
            if options.get("use_safetensors") != "True" and not unpacked:
                yield f"{called} without use_safetensors=True"
        if options.get("trust_remote_code", "False") != "False":
            yield f"{called} with trust_remote_code"


def test_there_are_sources() -> None:
    assert len(SOURCES) > 60


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_is_unpickled(path: Path) -> None:
    assert list(faults(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from cloudpickle import loads",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path, allow_pickle=True)",
        "yaml.load(text)",
        "Model.from_pretrained(folder)",
        "pipe.load_lora_weights(folder, use_safetensors=False)",
        "Model.from_pretrained(folder, **options)",
        "Model.from_pretrained(folder, use_safetensors=True, trust_remote_code=True)",
    ],
)
def test_each_fault_is_found(source: str) -> None:
    assert len(list(faults(source))) == 1
