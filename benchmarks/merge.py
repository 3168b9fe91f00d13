# SPDX-License-Identifier: Apache-2.0
"""What averaging checkpoints costs beside reading them.

    python -m benchmarks.merge

Checkpoints of a gigabyte, read one after another by Orbax alone, averaged by
`average_checkpoints`, and merged by the command, which saves what it makes. Every run
is a process of its own, and the ways take turns; medians, beside the quartiles. Files
are read from the disk, since a run's old checkpoints are in nobody's page cache; with
`--cached` from there.
"""

import argparse
import concurrent.futures
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from asgd_optax.checkpoints import __main__, average_checkpoints
from benchmarks import command_line, harness

LEAVES = 128
MIB = 2**20
Paths = Sequence[Path]


class Run(NamedTuple):
    """One run: seconds, and bytes of memory at its peak beyond those before it."""

    seconds: float
    memory: int


def standard(paths: Paths) -> None:
    """Orbax alone, onto the device."""
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        for path in paths:
            jax.block_until_ready(checkpointer.restore(path))


def on_host(paths: Paths) -> None:
    """Orbax alone, as NumPy arrays."""
    import orbax.checkpoint as ocp

    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        for path in paths:
            numpy = {leaf: ocp.RestoreArgs(restore_type=np.ndarray) for leaf in names()}
            restore = ocp.args.PyTreeRestore(item=dict(numpy), restore_args=numpy)
            checkpointer.restore(path, args=restore)


def average(paths: Paths) -> None:
    """The function."""
    average_checkpoints(paths)


def command(paths: Paths) -> None:
    """The command, but for the start of Python."""
    coefficients = np.full(len(paths), 1 / len(paths))
    with tempfile.TemporaryDirectory(dir=paths[0].parent) as folder:
        __main__.average(paths, coefficients, None, Path(folder, "merged"))


WAYS: dict[str, Callable[[Paths], None]] = {
    "Orbax alone, `StandardCheckpointer`": standard,
    "Orbax alone, as NumPy arrays": on_host,
    "`average_checkpoints`": average,
    "the command, which saves the average": command,
}


def names() -> list[str]:
    """Of the leaves."""
    return [f"layer_{n:02d}" for n in range(LEAVES)]


def save(path: Path, size: int) -> None:
    """Saves a checkpoint of random float32 numbers, of so many bytes."""
    import orbax.checkpoint as ocp

    rng = np.random.default_rng()
    width = size // LEAVES // 4 // 64
    tree = {name: rng.random((width, 64), np.float32) for name in names()}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, tree)


def peak() -> int:
    """Bytes of memory that this process has had at its peak, in Linux."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def timed(way: str, small: Path, paths: Paths) -> Run:
    """One run, in a process of its own, after one of a small checkpoint."""
    WAYS[way]([small])
    memory = peak()
    begun = time.perf_counter()
    WAYS[way](paths)
    return Run(time.perf_counter() - begun, peak() - memory)


def let_go(folder: Path) -> None:
    """Takes the files out of the page cache."""
    os.sync()
    for file in filter(Path.is_file, folder.rglob("*")):
        with file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(
    folder: Path, size: int, number: int, rounds: int, *, cached: bool
) -> dict[str, list[Run]]:
    """Saves the checkpoints, and runs all ways as often as there are rounds."""
    # No process is used twice: its peak is that of one run.
    context = multiprocessing.get_context("spawn")
    runs: dict[str, list[Run]] = {way: [] for way in WAYS}
    small, paths = folder / "small", [folder / str(n) for n in range(number)]
    with (
        concurrent.futures.ProcessPoolExecutor(
            1, mp_context=context, max_tasks_per_child=1
        ) as pool,
        tqdm(total=number + rounds * len(WAYS), unit="run") as bar,
    ):
        pool.submit(save, small, 2**20).result()
        for path in paths:
            pool.submit(save, path, size).result()
            bar.update()
        for n in range(rounds):
            # Each begins a round in its turn.
            ways = [*WAYS][n % len(WAYS) :] + [*WAYS][: n % len(WAYS)]
            for way in ways:
                if not cached:
                    let_go(folder)
                runs[way].append(pool.submit(timed, way, small, paths).result())
                bar.update()
    return runs


def describe(
    runs: dict[str, list[Run]], size: int, number: int, *, cached: bool = False
) -> str:
    """The title, what was measured, and the table."""
    header = ["", "seconds", "quartiles", "GiB/s", "of Orbax", "peak memory"]
    rows = []
    # The faster of the two in each round: whichever way it reads, no slower.
    alone = [
        min(rounds, key=lambda run: run.seconds).seconds
        for rounds in zip(*[*runs.values()][:2], strict=True)
    ]
    for way, of_way in runs.items():
        seconds = [run.seconds for run in of_way]
        low, median, high = statistics.quantiles(seconds, method="inclusive")
        share = statistics.median(a / s for a, s in zip(alone, seconds, strict=True))
        memory = statistics.median(run.memory for run in of_way)
        rows.append(
            [
                way,
                f"{median:.2f}",
                f"{low:.2f} to {high:.2f}",
                f"{number * size / 2**30 / median:.2f}",
                f"{share:.2f}",
                f"{memory / size:.1f} checkpoints",
            ]
        )
    where = "page cache" if cached else "disk"
    return f"""# Merging checkpoints

{number} checkpoints of {size / MIB:,.0f} MiB, {LEAVES} float32 leaves each, saved by
`StandardCheckpointer`, read from the {where}; {len(seconds)} rounds, in each of which
every way has its turn, in a process of its own. *Of Orbax*: the speed over that of the
faster of its two ways in the same round, the median over the rounds. *Peak memory* is
beyond what the process had before, in sizes of a checkpoint.

{harness.table(header, rows)}"""


def main(argv: Sequence[str] | None = None) -> dict[str, list[Run]]:
    """Measures, and prints the table."""
    parser = harness.parser("What averaging checkpoints costs beside reading them.")
    parser.add_argument(
        "--size",
        type=command_line.count,
        default=1024,
        help="MiB of a checkpoint (default: %(default)s)",
    )
    parser.add_argument(
        "--checkpoints",
        type=command_line.count,
        default=5,
        help="how many (default: %(default)s)",
    )
    parser.add_argument(
        "--rounds",
        type=command_line.number(int, lambda n: 2 <= n <= 1000, "from 2 to 1000"),
        default=5,
        help="how often each is measured (default: %(default)s)",
    )
    parser.add_argument(
        "--folder",
        type=_folder,
        help="where to put the checkpoints, for the time it takes (default: the"
        " system's for temporary files)",
    )
    parser.add_argument(
        "--cached",
        action="store_true",
        help="read what is in the page cache, as just after it was saved",
    )
    options = parser.parse_args(argv)
    size, rounds = (4, 2) if options.quick else (options.size, options.rounds)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        runs = measure(
            Path(folder),
            size * MIB,
            options.checkpoints,
            rounds,
            cached=options.cached,
        )
    text = describe(runs, size * MIB, options.checkpoints, cached=options.cached)
    harness.report("merge", text, options.output)
    return runs


def _folder(text: str) -> Path:
    if not Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {text!r}")
    return Path(text)


if __name__ == "__main__":
    main()
