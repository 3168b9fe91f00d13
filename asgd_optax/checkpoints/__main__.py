# SPDX-License-Identifier: Apache-2.0
"""Command line: average steps of a run and save the average as a checkpoint."""

import argparse
import json
import logging
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np

from asgd_optax._core.checks import needs
from asgd_optax.checkpoints import decay_coefficients
from asgd_optax.checkpoints._average_checkpoints import sum_checkpoints

_WEIGHTS = ("uniform", "linear", "cosine", "minus-sqrt")
# Orbax takes a folder with this in its name for an unfinished save.
_UNFINISHED = ".orbax-checkpoint-tmp-"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str, status: int = 2) -> NoReturn:
        """Exit with a message in one line, without the usage."""
        self.exit(status, f"{self.prog}: error: {' '.join(message.split())}\n")


class _DelayedSignals:
    """A context in which SIGINT and SIGTERM act only where `check` is called.

    An exception in the middle of a save would delete the folder while threads of Orbax
    write to it.
    """

    def __enter__(self) -> "_DelayedSignals":
        self.received = 0
        numbers = signal.SIGINT, signal.SIGTERM
        self._handlers = {n: signal.signal(n, self._receive) for n in numbers}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: object) -> None:
        self.received = number

    def check(self) -> None:
        """Raise if a signal was received."""
        if self.received:
            raise InterruptedError("interrupted; nothing was written")


def run() -> NoReturn:
    """Run the command as a program, on the CPU."""
    # Accelerators may be in use: a TPU serves one process.
    jax.config.update("jax_platforms", "cpu")
    # If a save fails, Orbax logs tracebacks, and threads of TensorStore print more.
    logging.disable(logging.ERROR)
    sys.excepthook = _print_in_main_thread
    status: Any = 0
    try:
        main()
    except SystemExit as exit_:
        status = exit_.code
    sys.stdout.flush()
    sys.stderr.flush()
    # Do not wait for these threads.
    os._exit(status or 0)


def _print_in_main_thread(*error: Any) -> None:
    if threading.current_thread() is threading.main_thread():
        sys.__excepthook__(*error)


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the arguments, average and save; exit with an error's status."""
    parser = _parser()
    arguments = parser.parse_intermixed_args(argv)
    output = Path(os.path.abspath(arguments.output))
    with _DelayedSignals() as signals:
        try:
            steps = _choose_steps(parser, arguments)
            coefficients = _coefficients(parser, arguments.weights, len(steps))
            if os.path.lexists(output):
                parser.error(f"argument --output: {output} exists")
            if not output.parent.is_dir():
                parser.error(f"argument --output: no folder {output.parent}")
            paths = list(steps.values())
            average(paths, coefficients, arguments.part, output, signals.check)
        except (OSError, ValueError, ModuleNotFoundError) as error:
            is_signal = isinstance(error, InterruptedError)
            parser.error(str(error), 128 + signals.received if is_signal else 1)
    names = ", ".join(map(str, steps))
    print(f"{output}: average of the steps {names} of {arguments.run}")


def average(
    paths: Sequence[Path],
    coefficients: np.ndarray,
    part: str | None,
    output: Path,
    check: Callable[[], object],
) -> None:
    """Save a weighted sum of checkpoints, and how it was made, in a new folder.

    `check` may raise: it is called only where that leaves no files.
    """
    with needs("checkpoints"):
        from tqdm import tqdm

        from asgd_optax.checkpoints import _orbax

    made_from = {
        "checkpoints": [os.path.abspath(path) for path in paths],
        "coefficients": coefficients.tolist(),
        "part": part,
    }
    # Without a terminal there is no bar.
    with tqdm(total=len(paths), desc="averaging", leave=False, disable=None) as bar:

        def progress(checkpoints: float) -> None:
            check()
            bar.update(checkpoints)

        tree = sum_checkpoints(
            paths, coefficients, part=part, typed_keys=True, progress=progress
        )
    # Rename a complete checkpoint, so that an interrupted one is never at `output`.
    with tempfile.TemporaryDirectory(
        prefix=f"{output.name}{_UNFINISHED}", dir=output.parent
    ) as parent:
        folder = Path(parent, output.name)
        _orbax.write(folder, tree)
        text = json.dumps(made_from, indent=2) + "\n"
        (folder / "averaged_from.json").write_text(text, encoding="utf-8")
        # rename() fails on a non-empty folder but silently replaces an empty one.
        if os.path.lexists(output):
            raise FileExistsError(f"{output} exists and is not overwritten")
        check()
        folder.rename(output)


def _parser() -> _Parser:
    parser = _Parser(
        prog="python -m asgd_optax.checkpoints",
        description="Average checkpoints that Orbax saved in a run, and save the"
        " average as a checkpoint with an averaged_from.json in its folder.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("command", choices=["average"], help="what to do")
    add("run", metavar="RUN", type=Path, help="folder with the steps")
    add("steps", metavar="STEP", nargs="*", type=int, help="default: all finished")
    add("--last", metavar="K", type=int, help="average the last K steps")
    add(
        "--weights",
        default="uniform",
        help=f"{', '.join(_WEIGHTS)} (learning rate decay to emulate), or numbers"
        " c1,c2,..., the oldest step first: --weights=-4,5 (default: %(default)s)",
    )
    add(
        "--part",
        metavar="KEY[/KEY...]",
        help="subtree to average, such as params or opt_state/1/average; begins with"
        " the item's name if a step has several items (default: everything)",
    )
    add("--output", metavar="MERGED", required=True, help="folder to create")
    return parser


def _choose_steps(parser: _Parser, arguments: argparse.Namespace) -> dict[int, Path]:
    """Return the folders of the steps to average, the oldest first."""
    with needs("checkpoints"):
        from asgd_optax.checkpoints import _orbax

    run, last, steps = arguments.run, arguments.last, sorted(arguments.steps)
    finished = _orbax.find_steps(run) if run.is_dir() else {}
    if not finished:
        parser.error(f"argument RUN: no finished steps in {run}")
    available = f"finished steps in {run}: {', '.join(map(str, finished))}"
    if last is not None:
        if steps:
            parser.error("argument --last: not allowed with STEP")
        if not 0 < last <= len(finished):
            parser.error(f"argument --last: got {last}; {available}")
        steps = [*finished][-last:]
    for step in steps:
        if step not in finished:
            parser.error(f"argument STEP: no finished step {step}; {available}")
        if steps.count(step) > 1:
            parser.error(f"argument STEP: {step} is given twice")
    return {step: finished[step] for step in steps or finished}


def _coefficients(parser: _Parser, weights: str, n: int) -> np.ndarray:
    """Return the coefficients of `n` steps."""
    if weights == "uniform":
        return np.full(n, 1 / n)
    if weights in _WEIGHTS:
        return decay_coefficients(n, weights.replace("-", "_"))
    try:
        numbers = np.array([float(number) for number in weights.split(",")])
    except ValueError:
        numbers = np.array([])
    if len(numbers) != n or not np.isfinite(numbers).all():
        parser.error(
            f"argument --weights: must be {', '.join(_WEIGHTS)}, or a number for each"
            f" of the {n} steps, joined by commas; got {weights!r}"
        )
    return numbers


if __name__ == "__main__":
    run()
