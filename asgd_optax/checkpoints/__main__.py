# SPDX-License-Identifier: Apache-2.0
"""The command of `asgd_optax.checkpoints`: steps of a run made into one checkpoint."""

import argparse
import contextlib
import json
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

import jax
import numpy as np

from asgd_optax._core.checks import needs
from asgd_optax.checkpoints import decay_coefficients

_WEIGHTS = ("uniform", "linear", "cosine", "minus-sqrt")
# Orbax takes what is named so for a save that was cut off: no step, nor a checkpoint.
_UNFINISHED = ".orbax-checkpoint-tmp-"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.fail(2, message)

    def fail(self, status: int, message: str) -> NoReturn:
        """One line, without the usage."""
        self.exit(status, f"{self.prog}: error: {' '.join(message.split())}\n")


def run() -> NoReturn:
    """The command as a program of its own, which leaves nothing when it is ended."""
    # On the host, whose accelerators may be in use: a TPU serves one process.
    jax.config.update("jax_platforms", "cpu")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    main()
    sys.exit()


def main(argv: Sequence[str] | None = None) -> None:
    """Parses, averages, and saves.

    Raises:
      SystemExit: 2 where an argument is refused, 1 where a checkpoint is or a file
        cannot be written, 130 where it is interrupted. Then nothing is left.
    """
    parser = _parser()
    arguments = parser.parse_intermixed_args(argv)
    try:
        with needs("checkpoints"):
            from asgd_optax.checkpoints._orbax_checkpoints import steps_of
        steps = _steps(parser, arguments, steps_of)
        coefficients = _coefficients(parser, arguments.weights, len(steps))
        output = _checked_output(parser, arguments.output)
        average(list(steps.values()), coefficients, arguments.part, output)
    except (OSError, ValueError, ModuleNotFoundError) as error:
        parser.fail(1, str(error))
    except KeyboardInterrupt:
        parser.fail(128 + signal.SIGINT, "interrupted: nothing was written")
    print(f"{output}: of {arguments.run} the steps {', '.join(map(str, steps))}")


def average(
    paths: Sequence[Path], coefficients: np.ndarray, part: str | None, output: Path
) -> None:
    """Saves the sum of checkpoints, and what it is made of, in a folder not there yet.

    Raises:
      ValueError: what `average_checkpoints` refuses, or what Orbax does not save.
      FileExistsError: the folder is there by now.
    """
    with needs("checkpoints"):
        from tqdm import tqdm

        from asgd_optax.checkpoints import _orbax_checkpoints
        from asgd_optax.checkpoints._combine_checkpoints import combine_checkpoints

    with tqdm(desc="averaging", unit="B", unit_scale=True, unit_divisor=1024) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        tree = combine_checkpoints(paths, coefficients, part=part, progress=progress)
    made_from = {
        "checkpoints": [os.path.abspath(path) for path in paths],
        "coefficients": coefficients.tolist(),
        "part": part,
    }
    with _renamed_into_place(output) as folder:
        _orbax_checkpoints.write(folder, tree)
        (folder / "averaged_from.json").write_text(
            json.dumps(made_from, indent=2) + "\n", encoding="utf-8"
        )


@contextlib.contextmanager
def _renamed_into_place(output: Path) -> Iterator[Path]:
    """A folder to be made, which is then `output`: at once, or not at all."""
    with tempfile.TemporaryDirectory(
        prefix=f"{output.name}{_UNFINISHED}", dir=output.parent
    ) as beside:
        folder = Path(beside, output.name)
        yield folder
        # Over what is not empty no folder is renamed; over an empty one it would be.
        _check_not_there(output)
        folder.rename(output)


def _check_not_there(output: Path) -> None:
    if os.path.lexists(output):
        raise FileExistsError(f"{output} exists, and is not written over")


def _parser() -> _Parser:
    parser = _Parser(
        prog="python -m asgd_optax.checkpoints",
        description="Averages checkpoints of a run that Orbax saved, and saves the"
        " average as a checkpoint, with an averaged_from.json in its folder.",
        allow_abbrev=False,
    )
    parser.add_argument("command", choices=["average"], help="what to do")
    parser.add_argument(
        "run", metavar="RUN", type=Path, help="the folder in which the steps are"
    )
    parser.add_argument(
        "steps",
        metavar="STEP",
        nargs="*",
        type=_count(0),
        help="a step to average (default: all that are finished)",
    )
    parser.add_argument(
        "--last", metavar="K", type=_count(1), help="average the last K steps"
    )
    parser.add_argument(
        "--weights",
        type=_weights,
        default="uniform",
        help=f"{', '.join(_WEIGHTS)} (the decay of a rate that is emulated), or"
        " numbers c1,c2,..., the oldest step's first: --weights=-4,5 (default:"
        " %(default)s)",
    )
    parser.add_argument(
        "--part",
        metavar="KEY[/KEY...]",
        help="the subtree to average, such as params or opt_state/1/average; where a"
        " step has several items the first key is the item's (default: all of it)",
    )
    parser.add_argument(
        "--output",
        metavar="MERGED",
        type=Path,
        required=True,
        help="the folder to make; nothing may be there",
    )
    return parser


def _count(least: int) -> Callable[[str], int]:
    def convert(text: str) -> int:
        if text.isascii() and text.isdigit() and int(text) >= least:
            return int(text)
        raise argparse.ArgumentTypeError(
            f"must be a whole number, {least} or more, not {text!r}"
        )

    return convert


def _weights(text: str) -> str | np.ndarray:
    if text in _WEIGHTS:
        return text
    with contextlib.suppress(ValueError):
        numbers = np.array([float(number) for number in text.split(",")])
        if np.isfinite(numbers).all():
            return numbers
    raise argparse.ArgumentTypeError(
        f"must be {', '.join(_WEIGHTS)}, or numbers joined by commas, not {text!r}"
    )


def _steps(
    parser: _Parser,
    arguments: argparse.Namespace,
    steps_of: Callable[[Path], Mapping[int, Path]],
) -> dict[int, Path]:
    """The folders of the steps that are chosen, the oldest first."""
    if not arguments.run.is_dir():
        parser.error(f"argument RUN: there is no folder {arguments.run}")
    there = steps_of(arguments.run)
    if not there:
        parser.error(f"argument RUN: no finished step is in {arguments.run}")
    names = ", ".join(map(str, there))
    chosen = sorted(arguments.steps)
    if arguments.last is not None:
        if chosen:
            parser.error("argument --last: not allowed where a STEP is given")
        if arguments.last > len(there):
            parser.error(
                f"argument --last: {arguments.last} are more than the steps in"
                f" {arguments.run}: {names}"
            )
        chosen = list(there)[-arguments.last :]
    for n, step in enumerate(chosen):
        if step not in there:
            parser.error(
                f"argument STEP: no finished step {step} is in {arguments.run}, but"
                f" {names}"
            )
        if step in chosen[:n]:
            parser.error(f"argument STEP: {step} is given twice")
    return {step: there[step] for step in chosen or there}


def _coefficients(parser: _Parser, weights: str | np.ndarray, n: int) -> np.ndarray:
    if isinstance(weights, str):
        if weights == "uniform":
            return np.full(n, 1 / n)
        return decay_coefficients(n, weights.replace("-", "_"))
    if len(weights) != n:
        parser.error(f"argument --weights: {len(weights)} numbers, and {n} steps")
    return weights


def _checked_output(parser: _Parser, path: Path) -> Path:
    """Before anything is read; and absolute, as Orbax wants it."""
    output = Path(os.path.abspath(path))
    if os.path.lexists(output):
        parser.error(f"argument --output: {path} exists, and is not written over")
    if not output.parent.is_dir():
        parser.error(f"argument --output: there is no folder {output.parent}")
    if not os.access(output.parent, os.W_OK):
        parser.error(f"argument --output: cannot write in {output.parent}")
    return output


if __name__ == "__main__":
    run()
