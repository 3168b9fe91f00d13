# SPDX-License-Identifier: Apache-2.0
"""Command-line options of the benchmarks and studies."""

import argparse
import contextlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn


@contextlib.contextmanager
def needs(extra: str) -> Iterator[None]:
    """End the program with a hint if an import inside needs an extra."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise SystemExit(f"this needs {error.name}: pip install '.[{extra}]'") from None


class Parser(argparse.ArgumentParser):
    """An argument parser that reports errors in one line, without the usage."""

    def __init__(self, description: str) -> None:
        super().__init__(description=description, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


def report_parser(description: str) -> Parser:
    """Return a parser with the options of programs that write a report."""
    parser = Parser(description)
    parser.add_argument(
        "--quick",
        action="store_true",
        help="use tiny sizes to check that it runs; the numbers mean nothing",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("out/reports"),
        help="folder for the tables and the picture (default: %(default)s)",
    )
    return parser


def number(
    kind: type, accepts: Callable[[Any], bool], wanted: str
) -> Callable[[str], Any]:
    """Return a `type=` for an option whose value must satisfy `accepts`."""

    def convert(text: str) -> Any:
        with contextlib.suppress(ValueError):
            if accepts(value := kind(text)):
                return value
        raise argparse.ArgumentTypeError(f"must be {wanted}, not {text!r}")

    return convert


def whole_number(least: int = 1, most: int = 2**31 - 1) -> Callable[[str], Any]:
    """Return a `type=` for a whole number in this range."""
    return number(
        int, lambda n: least <= n <= most, f"a whole number from {least} to {most}"
    )


positive = number(float, lambda x: 0 < x < math.inf, "positive and finite")


def add_steps(parser: Parser, default: int, least: int = 1) -> None:
    """Add the option `--steps`."""
    parser.add_argument(
        "--steps",
        type=whole_number(least),
        default=default,
        help="minibatches to train on (default: %(default)s)",
    )


def add_seeds(parser: Parser, default: int) -> None:
    """Add the option `--seeds`, for programs that train all seeds at once."""
    parser.add_argument(
        "--seeds",
        type=whole_number(2, 1000),  # a standard deviation needs two
        default=default,
        help="networks to train; a seed sets the initial weights and the"
        " minibatches (default: %(default)s)",
    )
