# SPDX-License-Identifier: Apache-2.0
"""Timing of several programs side by side.

Times come from google-benchmark, which jax uses too. It repeats every contestant
several times. The repetitions of all contestants run in a random order, so a machine
that slows down slows all of them alike. Medians and quartiles over the repetitions are
reported.
"""

import contextlib
import json
import os
import shutil
import statistics
import sys
import tempfile
import timeit
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from tools import command_line


class Contestant(NamedTuple):
    """A program to be timed.

    Attributes:
      setup: makes the function to be timed, which takes no arguments and returns when
        its work is done. Called once per repetition, so that its arrays live no longer
        than that. Neither `setup` nor the first call of the function is timed.
      calls: how many calls make one repetition.
    """

    setup: Callable[[], Callable[[], Any]]
    calls: int


class Time(NamedTuple):
    """Seconds per call: the median over the repetitions, and the quartiles."""

    median: float
    low: float
    high: float


def measure(contestants: Mapping[str, Contestant], repetitions: int) -> dict[str, Time]:
    """Time the contestants, with two or more repetitions each, in a random order.

    Can be called only once per process: google-benchmark does not run twice.

    Raises:
      Exception: If a contestant raises it.
    """
    # Imported here, so that other functions work where it is not installed.
    with command_line.needs("bench"):
        import google_benchmark

    errors: list[Exception] = []
    with (
        tqdm(total=len(contestants) * repetitions, desc="timing", unit="run") as bar,
        tempfile.TemporaryDirectory() as folder,
    ):
        for name, contestant in contestants.items():
            # Real time, because other threads do the work.
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
            # google-benchmark appends "/iterations:5/real_time" to the name.
            times[run["run_name"].rsplit("/", 2)[0]].append(1e-9 * run["real_time"])
    return {name: _quartiles(seconds) for name, seconds in times.items()}


def _timed(
    setup: Callable[[], Callable[[], Any]], bar: Any, errors: list[Exception]
) -> Any:
    """Return the function that google-benchmark calls for each repetition."""

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
    """Discard what C++ prints on standard output."""
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
    """Set torch's number of threads to its default or to one, whichever is faster.

    Args:
      trial: the function that is timed with each.

    Returns:
      The seconds of a trial, by number of threads.
    """
    # Imported here, because not every benchmark compares with torch.
    with command_line.needs("bench"):
        import torch

    seconds = {}
    for threads in sorted({1, torch.get_num_threads()}):
        torch.set_num_threads(threads)
        trial()
        # The mean, not the minimum: threads that wait for each other cost now and then.
        seconds[threads] = timeit.timeit(trial, number=5) / 5
    torch.set_num_threads(min(seconds, key=lambda threads: seconds[threads]))
    return seconds


def has_compiler() -> bool:
    """Return whether there is a C++ compiler, which `torch.compile` needs on CPU."""
    return shutil.which(os.environ.get("CXX", "g++")) is not None
