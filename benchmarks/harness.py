# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks share: timing side by side, and tables with their provenance.

Times come from google-benchmark, the harness that jax itself uses. It repeats every
contestant several times and, with random interleaving, in a random order, so that a
machine that slows down slows all of them; what is quoted is the median over the
repetitions, beside its quartiles.
"""

import contextlib
import json
import os
import platform
import shlex
import shutil
import statistics
import sys
import tempfile
import timeit
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from benchmarks import command_line

# The one style of all figures, which says what a colour means.
STYLE = Path(__file__).parents[1] / "examples" / "style.mplstyle"
# Of others, before there is one of ours: what it was measured under.
LOAD = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
LIBRARIES = (
    "jax",
    "optax",
    "flax",
    "torch",
    "scikit-learn",
    "statsmodels",
    "google-benchmark",
)


class Contestant(NamedTuple):
    """Something to be timed.

    Attributes:
      setup: makes what is timed, a function of no arguments that returns when its
        work is done. Called anew for every repetition, so that its arrays live no
        longer than that; not timed, nor is the first call of what it makes.
      calls: how many calls make one repetition.
    """

    setup: Callable[[], Callable[[], Any]]
    calls: int


class Time(NamedTuple):
    """Seconds a call: the median over the repetitions, and the quartiles."""

    median: float
    low: float
    high: float


def measure(contestants: Mapping[str, Contestant], repetitions: int) -> dict[str, Time]:
    """The contestants' times, their two or more repetitions in a random order.

    To be called once a process: google-benchmark does not run twice.

    Raises:
      Exception: what a contestant raised.
    """
    # Here, so that what is to be timed can be tried where it is not installed.
    with command_line.needs("bench"):
        import google_benchmark

    errors: list[Exception] = []
    with (
        tqdm(total=len(contestants) * repetitions, desc="timing", unit="run") as bar,
        tempfile.TemporaryDirectory() as folder,
    ):
        for name, contestant in contestants.items():
            # Real time: other threads than this one do the work.
            options = google_benchmark.option.use_real_time()(
                google_benchmark.option.iterations(contestant.calls)(
                    _timed(contestant.setup, bar, errors)
                )
            )
            google_benchmark.register(options, name=name)
        out = Path(folder, "times.json")
        google_benchmark.initialize(
            [
                sys.argv[0],
                f"--benchmark_repetitions={repetitions}",
                "--benchmark_enable_random_interleaving=true",
                "--benchmark_time_unit=ns",
                "--benchmark_out_format=json",
                f"--benchmark_out={out}",
            ]
        )
        with _silenced():
            google_benchmark.run_benchmarks()
        if errors:
            raise errors[0]
        runs = json.loads(out.read_text())["benchmarks"]
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for run in runs:
        if run["run_type"] == "iteration":
            # The name goes on with "/iterations:5/real_time".
            times[run["run_name"].rsplit("/", 2)[0]].append(1e-9 * run["real_time"])
    return {name: _quartiles(seconds) for name, seconds in times.items()}


def _timed(
    setup: Callable[[], Callable[[], Any]], bar: Any, errors: list[Exception]
) -> Any:
    """The function of google-benchmark's that times what `setup` makes."""

    def run(state: Any) -> None:
        # An exception must not reach the C++ that calls this.
        try:
            call = setup()
            call()
            while state:
                call()
        except Exception as error:
            errors.append(error)
            state.skip_with_error(str(error))
        bar.update()

    return run


def _quartiles(seconds: Sequence[float]) -> Time:
    low, median, high = statistics.quantiles(seconds, method="inclusive")
    return Time(median, low, high)


@contextlib.contextmanager
def _silenced() -> Iterator[None]:
    """Without what C++ prints on standard output."""
    sys.stdout.flush()
    kept = os.dup(1)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def choose_torch_threads(trial: Callable[[], Any]) -> dict[int, float]:
    """Sets torch's threads to its own number or to one, whichever is faster.

    Args:
      trial: what is timed with each.

    Returns:
      The seconds of a trial, by number of threads.
    """
    # Here, since not every benchmark has torch to compare with.
    with command_line.needs("bench"):
        import torch

    seconds = {}
    for threads in sorted({1, torch.get_num_threads()}):
        torch.set_num_threads(threads)
        trial()
        # The mean, not the least: threads that wait for each other cost now and then.
        seconds[threads] = timeit.timeit(trial, number=5) / 5
    torch.set_num_threads(min(seconds, key=lambda threads: seconds[threads]))
    return seconds


def has_compiler() -> bool:
    """Whether there is a C++ compiler, which `torch.compile` calls on the CPU."""
    return shutil.which(os.environ.get("CXX", "g++")) is not None


def parser(description: str) -> command_line.Parser:
    """The options that every benchmark has."""
    parser = command_line.Parser(description)
    parser.add_argument(
        "--quick",
        action="store_true",
        help="tiny sizes, to see that it runs: the figures mean nothing",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("out/benchmarks"),
        help="folder for the tables and the picture (default: %(default)s)",
    )
    return parser


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, its columns aligned; all but the first to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        aligned = [
            cell.ljust(width) if n == 0 else cell.rjust(width)
            for n, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return f"| {' | '.join(aligned)} |"

    rule = [
        "-" * width if n == 0 else f"{'-' * (width - 1)}:"
        for n, width in enumerate(widths)
    ]
    return "\n".join(map(line, [header, rule, *rows]))


def report(name: str, text: str, folder: Path) -> None:
    """Prints a benchmark's text, with where its figures come from, and saves it.

    Args:
      name: of the benchmark's module, and of the file: `folder/name.md`.
      text: Markdown: a title, what was measured, tables.
      folder: made if it is not there.
    """
    command = shlex.join(["python", "-m", f"benchmarks.{name}", *sys.argv[1:]])
    load = "" if LOAD is None else f" Load average when it began: {LOAD:.1f}."
    text = f"{text.strip()}\n\nBy `{command}` on {machine()}.{load}\n"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.md").write_text(text, encoding="utf-8")
    print(text)


def machine() -> str:
    """The processor, its cores, and the versions of Python and the libraries."""
    versions = []
    for library in LIBRARIES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            version = metadata.version(library).partition("+")[0]
            versions.append(f"{library} {version}")
    return (
        f"{os.cpu_count()} cores of {_processor()}, Python"
        f" {platform.python_version()}, {', '.join(versions)}"
    )


def _processor() -> str:
    with contextlib.suppress(OSError):  # Linux alone has the file
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
