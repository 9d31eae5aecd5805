"""Everything a developer or CI runs. `nox -s demo` makes videos, `nox -s tests` checks it all."""

import shutil
import tomllib
from pathlib import Path

import nox

ROOT = Path(__file__).parent
# In the order in which they depend on one another.
PACKAGES = ("psa-kernels", "psa-masks", "psa-config", "psa-integrations")
MODULES = [package.replace("-", "_") for package in PACKAGES]
SOURCES = [f"packages/{package}/" for package in PACKAGES]
WHEELS = ROOT / "dist"
SERIAL = {"OMP_NUM_THREADS": "1"}  # a process uses one core
# The whole matrix takes minutes; these are what a change of diffusers between its versions would show in.
OLDEST_TESTS = (
    "test_every_block_at_level_1 or ((test_sparse_and_removed or test_dense_steps) and not i2v) "
    "or ((test_first_block_cache or test_compiled_blocks) and wan21 and not i2v)"
)

nox.options.sessions = ["tests"]
nox.options.default_venv_backend = "venv"
# A session gets what it declares and nothing that lies around on the machine.
nox.options.error_on_missing_interpreters = True


def install(session: nox.Session, *what: str) -> None:
    """pip install under the constraints that keep one build of torch everywhere.

    Without byte code, which takes half of an install's time: most of what is installed is never imported here.
    """
    session.install("--no-compile", "--constraint", str(ROOT / "constraints-cpu.txt"), *what)


def install_packages(session: nox.Session) -> None:
    """All four packages, editable, with their test tools."""
    editable = [part for package in PACKAGES for part in ("--editable", f"packages/{package}[test]")]
    install(session, *editable)


def test(session: nox.Session, folder: str) -> None:
    """Run the tests in ``folder`` that need no GPU, in a process a core, up to four."""
    options = ("--numprocesses", "auto", "--maxprocesses", "4", "-m", "not gpu")
    session.run("pytest", folder, *options, *session.posargs, env=SERIAL)


def check_types(session: nox.Session) -> None:
    """Static types of the four packages, in an environment that has them with all that they import."""
    install(session, "mypy==2.4.1", "types-PyYAML", "types-jsonschema")
    for package in PACKAGES:
        session.run("mypy", f"packages/{package}/src")


def build_wheels(session: nox.Session, folder: Path) -> None:
    """Build sdist and wheel of every package into an empty ``folder``."""
    shutil.rmtree(folder, ignore_errors=True)
    session.install("hatch")
    for package in PACKAGES:
        with session.chdir(ROOT / "packages" / package):
            session.run("hatch", "build", str(folder), silent=True)


@nox.session
def demo(session: nox.Session) -> None:
    """Generate one video with dense attention and with two presets, and compare them."""
    install(session, *SOURCES)
    session.run("psa", "demo", *session.posargs)


@nox.session
def tests(session: nox.Session) -> None:
    """All that CI runs: the tests across packages and types here, then every other check in a session of its own."""
    install_packages(session)
    test(session, "tests")
    check_types(session)
    for package in PACKAGES:
        session.notify(f"alone({package})")
    for name in ("oldest", "lint", "imports", "build", "docs"):
        session.notify(name, posargs=())  # options of pytest are none of theirs


@nox.session
@nox.parametrize("package", [nox.param(package, id=package) for package in PACKAGES])
def alone(session: nox.Session, package: str) -> None:
    """A package from its wheel, with only what it declares: its tests pass, its import is light."""
    folder = Path(session.create_tmp()) / "wheels"
    folder.mkdir(exist_ok=True)
    needed = SOURCES[: PACKAGES.index(package) + 1]
    session.run("python", "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), *needed)
    wheel = next(folder.glob(f"{package.replace('-', '_')}-*.whl"))
    install(session, "--find-links", str(folder), f"{wheel}[test]")
    session.run("python", "tests/lib/alone.py", package)
    test(session, f"packages/{package}/tests")


@nox.session
def oldest(session: nox.Session) -> None:
    """The oldest diffusers that psa-integrations claims: each form of each model, sparse, dense by steps, compiled."""
    *others, integrations = (f"packages/{package}" for package in PACKAGES)
    declared = tomllib.loads((ROOT / integrations / "pyproject.toml").read_text())["project"]["dependencies"]
    (claimed,) = (what.removeprefix("diffusers>=") for what in declared if what.startswith("diffusers"))
    editable = [part for path in (*others, f"{integrations}[test]") for part in ("--editable", path)]
    install(session, *editable, f"diffusers=={claimed}.*")
    session.run(
        "pytest", "-q", "-n", "2", "-k", OLDEST_TESTS, f"{integrations}/tests/test_diffusers_matrix.py", env=SERIAL
    )


@nox.session
def lint(session: nox.Session) -> None:
    """Formatting and lint rules."""
    session.install("ruff==0.17.6")
    session.run("ruff", "format", "--check", ".")
    session.run("ruff", "check", ".")


@nox.session
def types(session: nox.Session) -> None:
    """Static types of the four packages."""
    install_packages(session)
    check_types(session)


@nox.session
def imports(session: nox.Session) -> None:
    """Packages import each other in one direction only."""
    session.install("import-linter==2.17")
    session.install("--no-deps", *SOURCES)
    session.run("lint-imports")


@nox.session
def build(session: nox.Session) -> None:
    """Build sdist and wheel of each package, and install the wheels, then the sdists, into a clean environment."""
    build_wheels(session, WHEELS)
    session.run("python", "tests/lib/archives.py", str(WHEELS))
    environment = Path(session.create_tmp()) / "clean"
    session.run("python", "-m", "venv", "--clear", str(environment))
    python = str(environment / "bin" / "python")
    install_into = (python, "-m", "pip", "install", "--quiet", "--no-compile")
    install_into += ("--constraint", str(ROOT / "constraints-cpu.txt"))
    # The sdists come over the wheels: what both need is installed once.
    for kind, *options in (("*.whl",), ("*.tar.gz", "--force-reinstall", "--no-deps")):
        archives = [str(path) for path in sorted(WHEELS.glob(kind))]
        session.run(*install_into, *options, *archives, external=True)
        session.run(python, "-m", "pip", "check", external=True)
        code = f"import {', '.join(MODULES)}; print(*[m.__version__ for m in ({', '.join(MODULES)})])"
        session.run(python, "-c", code, external=True)
        session.run(str(environment / "bin" / "psa"), "--version", external=True)


@nox.session
def docs(session: nox.Session) -> None:
    """The site of docs/ into site/, every link checked; `nox -s docs -- serve` shows it while writing."""
    session.install("mkdocs-material>=9.6,<10", "mkdocstrings[python]>=0.30,<2")
    if session.posargs == ["serve"]:
        session.run("mkdocs", "serve", "--strict")
    else:
        session.run("mkdocs", "build", "--strict", *session.posargs)


@nox.session
def gpu(session: nox.Session) -> None:
    """The tests that need an NVIDIA GPU. Installs the newest torch, with its own Triton."""
    session.install(*(part for package in PACKAGES for part in ("--editable", f"packages/{package}[test]")))
    session.run("pytest", "-m", "gpu", *session.posargs)


@nox.session
def bench(session: nox.Session) -> None:
    """Benchmarks: `nox -s bench -- gpu_attention` runs benchmarks/gpu_attention.py; without a name, those for a CPU."""
    if any(name.startswith(("gpu", "dit")) for name in session.posargs):  # the newest torch, with CUDA
        session.install(*(part for package in PACKAGES for part in ("--editable", f"packages/{package}")))
    else:
        install_packages(session)
    names = session.posargs or sorted(path.stem for path in (ROOT / "benchmarks").glob("cpu*.py"))
    for name in names:
        session.run("python", f"benchmarks/{name}.py")
