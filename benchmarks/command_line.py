# SPDX-License-Identifier: Apache-2.0
"""What the studies' command lines share: options checked, one line an error."""

import argparse
import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import numpy as np


@contextlib.contextmanager
def needs(extra: str) -> Iterator[None]:
    """For imports of what an extra brings: ends the program where it is missing."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise SystemExit(f"this needs {error.name}: pip install '.[{extra}]'") from None


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, without the usage."""

    def __init__(self, description: str) -> None:
        super().__init__(description=description, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


def number(
    kind: type, accepts: Callable[[Any], bool], wanted: str
) -> Callable[[str], Any]:
    """What turns an option's text into a number that `accepts`, or refuses it."""

    def convert(text: str) -> Any:
        with contextlib.suppress(ValueError):
            if accepts(value := kind(text)):
                return value
        raise argparse.ArgumentTypeError(f"must be {wanted}, not {text!r}")

    return convert


# For `type=` of an option that counts, and of a rate.
count = number(int, lambda n: 1 <= n < 2**31, "a whole number, 1 or more, in 32 bits")
positive = number(float, lambda x: 0 < x < math.inf, "positive and finite")


def count_to(most: int, what: str) -> Callable[[str], Any]:
    """For `type=` of an option that counts to at most `most`, which is `what`."""
    return number(int, lambda n: 1 <= n <= most, f"from 1 to {most}, {what}")


def add_steps(parser: Parser, default: int, least: int = 1) -> None:
    """The option `--steps`, at least as many as this."""
    wanted = f"a whole number, {least} or more, in 32 bits"
    parser.add_argument(
        "--steps",
        type=number(int, lambda n: least <= n < 2**31, wanted),
        default=default,
        help="minibatches to train on (default: %(default)s)",
    )


def add_seeds(parser: Parser, default: int) -> None:
    """The option `--seeds`, of programs that train all of them at once."""
    parser.add_argument(
        "--seeds",
        # One has no standard deviation.
        type=number(int, lambda n: 2 <= n <= 1000, "a whole number from 2 to 1000"),
        default=default,
        help="networks to train; a seed sets the initial weights and the"
        " minibatches (default: %(default)s)",
    )


def check_output(parser: Parser, output: Path) -> None:
    """Ends the program unless a figure can be saved there; makes its folder.

    To be called last, so that no folder is made where another option is bad.
    """
    # Here, since not every study draws.
    from matplotlib.backend_bases import FigureCanvasBase

    if output.suffix[1:].lower() not in FigureCanvasBase.get_supported_filetypes():
        parser.error(
            "argument --output: matplotlib draws no"
            f" {output.suffix!r} files, but .png, .svg and .pdf"
        )
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        existed = output.exists()
        output.open("ab").close()
        if not existed:
            output.unlink()
    except OSError as error:
        parser.error(
            f"argument --output: cannot write {str(output)!r}: {error.strerror}"
        )


def describe(settings: Mapping[str, Any]) -> str:
    """The last lines of a study's output, under its table."""
    settings = dict(settings)
    output = settings.pop("output", None)
    described = ", ".join(
        f"{name.replace('_', ' ')} {value if isinstance(value, str) else f'{value:g}'}"
        for name, value in settings.items()
    )
    lines = f"\nMean ± standard deviation over the seeds. Settings: {described}."
    return lines if output is None else f"{lines}\nFigure: {output}"


def spread(values: np.ndarray, digits: int) -> str:
    """Mean ± standard deviation over the seeds."""
    # One seed has no sample deviation.
    deviation = np.std(values, ddof=min(1, len(values) - 1))
    return f"{np.mean(values):.{digits}f} ± {deviation:.{digits}f}"
