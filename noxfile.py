# SPDX-License-Identifier: Apache-2.0
"""All checks, from a fresh clone.

`.ci/run` runs every session, `.ci/run -s NAME` one of them, and `.ci/run --list` names
them. A session that fails does not stop the others, but fails the run.
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

# `--no-skips` makes a skipped test fail the run.
PYTEST = ["pytest", "--no-skips"]
# Requirements of the core's tests. Flax is left out, and with it what needs it.
CORE_TESTS = ["chex>=0.1.89", "flatbuffers>=24.3.25", "hypothesis>=6.100"]
CORE_TESTS += ["pytest>=8.0", "pytest-xdist>=3.6"]
NEED_FLAX = [
    "asgd_optax/flax",
    "asgd_optax/checkpoints",
    "tests/*process*",
    "tests/test_average_checkpoints.py",
    "tests/test_average_command.py",
    "tests/test_benchmarks.py",
    "tests/test_checkpoint.py",
    "tests/test_examples.py",
    "tests/test_first_ema.py",
    "tests/test_flax.py",
    "tests/test_host_memory.py",
    "tests/test_studies.py",
]

without_environment = nox.session(venv_backend="none")


def make(session: nox.Session, *arguments: str) -> None:
    """Run `make`, whose targets have their own environments."""
    session.run("make", *arguments, external=True)


def build(session: nox.Session) -> None:
    """Build the wheel and the sdist in dist/."""
    # With the Python that runs this: `python3` is the session's.
    make(session, "dist", f"PYTHON={sys.executable}")


def tracked(session: nox.Session, *paths: str) -> set[str]:
    """Return the files that git tracks, all or those under the paths."""
    listed = session.run("git", "ls-files", *paths, external=True, silent=True)
    return set(listed.splitlines())


@without_environment
def lint(session: nox.Session) -> None:
    """Check style, format and types."""
    make(session, "lint", "types")


@without_environment
def newcomer(session: nox.Session) -> None:
    """Run the README's two commands, the second time without setting up."""
    make(session, "test", "ARGS=--no-skips -m 'not torch'")
    make(session, "demo")
    make(session, "demo")


@nox.session(python="3.13")
def newest(session: nox.Session) -> None:
    """Run `make test` from the sdist, on the newest Python and jax."""
    build(session)
    (sdist,) = glob.glob("dist/*.tar.gz")
    shutil.unpack_archive(sdist, session.create_tmp(), filter="data")
    (sources,) = pathlib.Path(session.create_tmp()).glob("asgd_optax-*")
    session.chdir(sources)
    make(session, "test", "PYTHON=python", "ARGS=--no-skips -m 'not torch'")


@nox.session
def lowest(session: nox.Session) -> None:
    """Run the core's tests with the lowest jax and optax that pyproject.toml allows."""
    session.install("--resolution", "lowest-direct", "-e", ".", *CORE_TESTS)
    ignored = [f"--ignore-glob={path}" for path in NEED_FLAX]
    options = ["-n", "2", "--dist", "worksteal", "-m", "not flax and not torch"]
    session.run(*PYTEST, *options, *ignored)


@without_environment
def programs(session: nox.Session) -> None:
    """Run the tests of programs, and the benchmarks and studies with tiny sizes."""
    make(session, "test-programs", "ARGS=--no-skips -m 'not torch'")
    make(session, "bench", "studies", "ARGS=--quick")


@nox.session(venv_backend="venv")
def live(session: nox.Session) -> None:
    """Compare with the installed PyTorch, Keras and other libraries."""
    # A constraint, or pip may install another torch for one of them.
    constraints = pathlib.Path(session.create_tmp(), "constraints.txt")
    constraints.write_text("torch==2.13.0\n")
    packages = ["torch", "ema-pytorch==0.8.3", "diffusers==0.42", "lightning==2.6.6"]
    packages += ["keras>=3.15", "expecttest", "-e", ".[test]"]
    session.install("-c", str(constraints), *packages)
    # The tests load one file of timm, which needs only torch.
    session.install("--no-deps", "timm==1.0.31")
    session.run(*PYTEST, "-m", "torch", "tests", "--ignore=tests/live")
    # Modules that are named fail if a package is missing; others would be left out.
    modules = sorted(glob.glob("tests/live/test_*.py"))
    session.run(*PYTEST, *modules, env={"KERAS_BACKEND": "jax"})


@nox.session
def alias_tests(session: nox.Session) -> None:
    """Run optax's tests of its optimizers, with `asgd` in their table."""
    session.install("-e", ".[test]", "absl-py")
    session.run("python", "tools/optax_alias_tests.py", "-q")


@without_environment
def tpu(session: nox.Session) -> None:
    """Check the code compiled for TPU."""
    make(session, "test-tpu", "ARGS=--no-skips")


@without_environment
def gpu(session: nox.Session) -> None:
    """Check the code compiled for GPU."""
    make(session, "test-gpu", "ARGS=--no-skips")


@without_environment
def docs(session: nox.Session) -> None:
    """Build the documentation with warnings as errors, and test it in a browser."""
    if shutil.which("chromium") is None:
        session.run("apt-get", "update", "-q", external=True)
        packages = ["chromium", "fonts-dejavu-core"]
        session.run("apt-get", "install", "-y", "-q", *packages, external=True)
    make(session, "test-docs", "ARGS=--no-skips")


@nox.session
def distribution(session: nox.Session) -> None:
    """Check the contents of wheel and sdist, and install each."""
    build(session)
    (wheel,), (sdist,) = glob.glob("dist/*.whl"), glob.glob("dist/*.tar.gz")
    release = sdist.removeprefix("dist/").removesuffix(".tar.gz")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    metadata = ["METADATA", "RECORD", "WHEEL", "licenses/LICENSE"]
    expected = {f"{release}.dist-info/{file}" for file in metadata}
    expected |= tracked(session, "asgd_optax")
    with tarfile.open(sdist) as archive:
        names |= set(archive.getnames())
    expected |= {f"{release}/{file}" for file in tracked(session) | {"PKG-INFO"}}
    if names != expected:
        session.error(f"files that git does not track: {sorted(names ^ expected)}")
    installed = (
        "import asgd_optax, pathlib; file = pathlib.Path(asgd_optax.__file__);"
        " assert 'site-packages' in file.parts;"
        " assert file.with_name('py.typed').exists()"
    )
    paths = [pathlib.Path(path).absolute() for path in (wheel, sdist)]
    # Outside the sources, which Python would import first.
    session.chdir(session.create_tmp())
    for path in paths:
        session.install("--reinstall-package", "asgd_optax", str(path))
        session.run("python", "-c", installed)


@without_environment
def clean(session: nox.Session) -> None:
    """Check that the other sessions left no files that git does not ignore."""
    dirty = session.run("git", "status", "--porcelain", external=True, silent=True)
    if dirty:
        session.error(f"the tree is not clean:\n{dirty}")
