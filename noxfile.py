# SPDX-License-Identifier: Apache-2.0
"""Everything that must hold, from a bare clone.

First what a newcomer runs (`make test`, `make demo`), then what is too slow or too
special for one. `.ci/run` runs all of it, `.ci/run -s NAME` one session,
`.ci/run --list` names them. A session that fails does not stop the others; the run
fails at its end.
"""

import glob
import pathlib
import shutil
import sys
import tarfile
import zipfile

import nox

nox.options.default_venv_backend = "uv"
nox.options.error_on_missing_interpreters = True

# Of the core alone: no Flax, so no examples either. `--no-skips`: in a run that is
# to show something, a test that was skipped showed nothing.
PYTEST = ["pytest", "--no-skips", "-n", "2", "--dist", "worksteal"]
CORE_TESTS = ["chex>=0.1.89", "flatbuffers>=24.3.25", "hypothesis>=6.100"]
CORE_TESTS += ["pytest>=8.0", "pytest-xdist>=3.6"]
NEED_FLAX = [
    "asgd_optax/flax",
    "asgd_optax/checkpoints",
    "tests/test_average_checkpoints.py",
    "tests/test_average_command.py",
    "tests/test_checkpoint.py",
    "tests/test_flax.py",
    "tests/test_host_memory.py",
]

without_environment = nox.session(venv_backend="none")


def make(session: nox.Session, *arguments: str) -> None:
    """Runs `make`, whose targets keep environments of their own."""
    session.run("make", *arguments, external=True)


def check_clean_tree(session: nox.Session) -> None:
    """Fails where something was written that git does not ignore."""
    dirty = session.run("git", "status", "--porcelain", external=True, silent=True)
    if dirty:
        session.error(f"not a clean tree:\n{dirty}")


@without_environment
def lint(session: nox.Session) -> None:
    """Style, format and types."""
    make(session, "lint", "types")


@without_environment
def newcomer(session: nox.Session) -> None:
    """README's two commands, twice in a row: the second time sets nothing up."""
    make(session, "test", "ARGS=--no-skips -m 'not torch'")
    make(session, "test", "ARGS=tests/test_docs.py")
    make(session, "demo")
    make(session, "demo")
    check_clean_tree(session)


@without_environment
def docs(session: nox.Session) -> None:
    """The site, built with warnings as errors and looked at in a browser."""
    if shutil.which("chromium") is None:
        session.run("apt-get", "update", "-q", external=True)
        packages = ["chromium", "fonts-dejavu-core"]
        session.run("apt-get", "install", "-y", "-q", *packages, external=True)
    make(session, "test-docs", "ARGS=--no-skips")


def distribution_of(session: nox.Session, kind: str) -> str:
    """The wheel or the sdist, which hold what git knows: no less, and no more."""
    # By the Python that runs this: `python3` is the session's own.
    make(session, "dist", f"PYTHON={sys.executable}")
    (path,) = glob.glob(f"dist/*.{kind}")
    name, version = path.removeprefix("dist/").removesuffix(f".{kind}").split("-")[:2]
    release = f"{name}-{version}"
    if kind == "whl":
        with zipfile.ZipFile(path) as wheel:
            names = set(wheel.namelist())
        made = ["METADATA", "RECORD", "WHEEL", "licenses/LICENSE"]
        expected = {f"{release}.dist-info/{file}" for file in made}
        expected |= tracked(session, "asgd_optax")
    else:
        with tarfile.open(path) as sdist:
            names = set(sdist.getnames())
        expected = {f"{release}/{file}" for file in tracked(session) | {"PKG-INFO"}}
    if names != expected:
        session.error(f"not what git knows: {sorted(names ^ expected)} in {path}")
    return path


def tracked(session: nox.Session, *paths: str) -> set[str]:
    """The files that git knows, all or those under the paths."""
    listed = session.run("git", "ls-files", *paths, external=True, silent=True)
    return set(listed.splitlines())


@nox.session
@nox.parametrize("kind", ["whl", "tar.gz"])
def distribution(session: nox.Session, kind: str) -> None:
    """Wheel and sdist, each in an empty environment."""
    session.install(distribution_of(session, kind))
    # Away from the sources, which Python would find first.
    session.chdir(session.create_tmp())
    installed = (
        "import asgd_optax, pathlib; file = pathlib.Path(asgd_optax.__file__);"
        " assert 'site-packages' in file.parts;"
        " assert file.with_name('py.typed').exists()"
    )
    session.run("python", "-c", installed)


@nox.session
def alias_tests(session: nox.Session) -> None:
    """optax's own tests of its optimizers, with `asgd` in their table."""
    session.install("-e", ".[test]", "absl-py")
    session.run("python", "tools/optax_alias_tests.py", "-q")


@without_environment
def programs(session: nox.Session) -> None:
    """Tests of lessons, benchmarks, pages, processes; each benchmark briefly."""
    make(session, "test-programs", "ARGS=--no-skips -m 'not torch'")
    make(session, "bench", "ARGS=--quick")


@nox.session(venv_backend="venv")
def torch(session: nox.Session) -> None:
    """A live PyTorch beside ours."""
    session.install("-e", ".[test]", "torch==2.13.0", "expecttest")
    session.run("pytest", "--no-skips", "-m", "torch", "tests")


@nox.session(venv_backend="venv")
def live(session: nox.Session) -> None:
    """The libraries whose averages ours replace, beside ours."""
    # Or pip may take another torch for one of them, of gigabytes.
    constraints = pathlib.Path(session.create_tmp(), "constraints.txt")
    constraints.write_text("torch==2.13.0\n")
    packages = ["torch", "ema-pytorch==0.8.3", "diffusers==0.42", "lightning==2.6.6"]
    packages += ["keras>=3.15", "-e", ".[test]"]
    session.install("-c", str(constraints), *packages)
    # One file of it is loaded, which needs torch alone.
    session.install("--no-deps", "timm==1.0.31")
    # By name: what a module lacks is then an error.
    modules = sorted(glob.glob("tests/live/test_*.py"))
    session.run("pytest", "--no-skips", *modules, env={"KERAS_BACKEND": "jax"})


@without_environment
def tpu(session: nox.Session) -> None:
    """What the TPU's compiler makes of it."""
    make(session, "test-tpu", "ARGS=--no-skips")


@without_environment
def gpu(session: nox.Session) -> None:
    """What the GPU's compiler makes of it."""
    make(session, "test-gpu", "ARGS=--no-skips")


@nox.session(python="3.13")
def newest(session: nox.Session) -> None:
    """The newest Python, and the newest jax, optax and Flax that it gets.

    The tests are those of the unpacked sdist: that it lacks nothing shows here. Which
    branches they do not reach is printed.
    """
    sdist = distribution_of(session, "tar.gz")
    shutil.unpack_archive(sdist, session.create_tmp(), filter="data")
    (sources,) = pathlib.Path(session.create_tmp()).glob("asgd_optax-*")
    session.chdir(sources)
    session.install("--upgrade", ".[test]", "pytest-cov>=7.0")
    session.run(*PYTEST, "-m", "not torch", "--cov")


@nox.session
def lowest(session: nox.Session) -> None:
    """The lowest jax and optax that pyproject.toml allows, the core alone."""
    session.install("--resolution", "lowest-direct", "-e", ".", *CORE_TESTS)
    ignored = [f"--ignore={path}" for path in NEED_FLAX]
    for name in ("test_example_*", "test_benchmark_*", "*process*"):
        ignored.append(f"--ignore-glob=tests/{name}")
    session.run(*PYTEST, "-m", "not flax and not torch", *ignored)


@without_environment
def clean(session: nox.Session) -> None:
    """A clean tree at the end."""
    check_clean_tree(session)
