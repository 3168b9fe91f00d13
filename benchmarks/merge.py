# SPDX-License-Identifier: Apache-2.0
"""Cost of averaging checkpoints, compared with reading them.

    python -m benchmarks.merge

Checkpoints of a gigabyte are read one after another by Orbax alone, averaged by
`average_checkpoints`, and merged by the command, which also saves the average. Every
run has its own process, and the ways take turns. Medians and quartiles are reported.
Files are read from the disk, because old checkpoints of a run are rarely in the page
cache; with `--cached` they are read from the page cache.
"""

import concurrent.futures
import contextlib
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
from tools import command_line, report

LEAVES = 128
MIB = 2**20
Paths = Sequence[Path]


class Run(NamedTuple):
    """Seconds of a run, and bytes of peak memory beyond those before it."""

    seconds: float
    memory: int


def standard(paths: Paths) -> None:
    """Read with Orbax onto the device."""
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        for path in paths:
            jax.block_until_ready(checkpointer.restore(path))


def on_host(paths: Paths) -> None:
    """Read with Orbax as NumPy arrays."""
    import orbax.checkpoint as ocp

    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        for path in paths:
            numpy = {leaf: ocp.RestoreArgs(restore_type=np.ndarray) for leaf in names()}
            restore = ocp.args.PyTreeRestore(item=dict(numpy), restore_args=numpy)
            checkpointer.restore(path, args=restore)


def average(paths: Paths) -> None:
    """Average with the function."""
    average_checkpoints(paths)


def command(paths: Paths) -> None:
    """Average with the command, without the start of Python."""
    run, steps = paths[0].parent, [path.name for path in paths]
    with (
        tempfile.TemporaryDirectory(".tmp", dir=run) as folder,
        contextlib.redirect_stdout(None),
    ):
        __main__.main(["average", str(run), *steps, "--output", f"{folder}/merged"])


WAYS: dict[str, Callable[[Paths], None]] = {
    "Orbax alone, `StandardCheckpointer`": standard,
    "Orbax alone, as NumPy arrays": on_host,
    "`average_checkpoints`": average,
    "the command, which saves the average": command,
}


def names() -> list[str]:
    """Return the names of the leaves."""
    return [f"layer_{n:02d}" for n in range(LEAVES)]


def save(path: Path, size: int) -> None:
    """Save a checkpoint of random float32 numbers of this size in bytes."""
    import orbax.checkpoint as ocp

    rng = np.random.default_rng()
    width = size // LEAVES // 4 // 64
    tree = {name: rng.random((width, 64), np.float32) for name in names()}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, tree)


def peak() -> int:
    """Return this process's peak memory in bytes (Linux only)."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def timed(way: str, small: Path, paths: Paths) -> Run:
    """Run once, after a warm-up with a small checkpoint."""
    WAYS[way]([small])
    memory = peak()
    begun = time.perf_counter()
    WAYS[way](paths)
    return Run(time.perf_counter() - begun, peak() - memory)


def drop_cached(folder: Path) -> None:
    """Remove the files from the page cache."""
    os.sync()
    for file in filter(Path.is_file, folder.rglob("*")):
        with file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(
    folder: Path, size: int, number: int, rounds: int, *, cached: bool
) -> dict[str, list[Run]]:
    """Save the checkpoints, and run every way once per round."""
    # No process is used twice, so that its peak is that of one run.
    context = multiprocessing.get_context("spawn")
    runs: dict[str, list[Run]] = {way: [] for way in WAYS}
    small, paths = folder / "small" / "0", [folder / str(n) for n in range(number)]
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
            # Each way goes first in its turn.
            ways = [*WAYS][n % len(WAYS) :] + [*WAYS][: n % len(WAYS)]
            for way in ways:
                if not cached:
                    drop_cached(folder)
                runs[way].append(pool.submit(timed, way, small, paths).result())
                bar.update()
    return runs


def describe(
    runs: dict[str, list[Run]], size: int, number: int, *, cached: bool = False
) -> str:
    """Format the title, what was measured, and the table."""
    header = ["", "seconds", "quartiles", "GiB/s", "of Orbax", "peak memory"]
    rows = []
    # The faster of Orbax's two ways in each round.
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
every way runs once, in its own process. *Of Orbax*: the speed relative to the faster of
Orbax's two ways in the same round, median over the rounds. *Peak memory*: beyond what
the process had before, in sizes of a checkpoint.

{report.table(header, rows)}"""


def main(argv: Sequence[str] | None = None) -> dict[str, list[Run]]:
    """Measure, and print the table."""
    parser = command_line.report_parser("Cost of averaging checkpoints.")
    parser.add_argument(
        "--size",
        type=command_line.whole_number(),
        default=1024,
        help="MiB of a checkpoint (default: %(default)s)",
    )
    parser.add_argument(
        "--checkpoints",
        type=command_line.whole_number(),
        default=5,
        help="number of checkpoints (default: %(default)s)",
    )
    parser.add_argument(
        "--rounds",
        type=command_line.whole_number(2, 1000),
        default=5,
        help="runs of each way (default: %(default)s)",
    )
    parser.add_argument(
        "--folder",
        type=Path,
        help="where to put the checkpoints (default: the system's temporary folder)",
    )
    parser.add_argument(
        "--cached",
        action="store_true",
        help="read from the page cache, as just after saving",
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
    report.write("benchmarks.merge", text, options.output)
    return runs


if __name__ == "__main__":
    main()
