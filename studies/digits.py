# SPDX-License-Identifier: Apache-2.0
"""Losses on the digits by learning rate, schedule and noise.

    python -m studies.digits --rate 0.1 0.2 0.3 0.4 0.5 0.6 0.8 1.0 1.2
    python -m studies.digits --schedule linear --rate 0.8 1.2 1.6 2.0
    python -m studies.digits --noise 0

This study trains like `examples/digits.py`, with one row per learning rate. Choose the
learning rate at which the last iterate does best on the validation set. A choice by the
average would favour the average.
"""

import argparse
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import optax

from examples import digits
from tools import command_line, report

SCHEDULES = {
    "constant": lambda rate, steps: rate,
    "linear": lambda rate, steps: optax.linear_schedule(rate, 0.0, steps),
    "cosine": lambda rate, steps: optax.cosine_decay_schedule(rate, steps),
}
HEADER = """\
| rate | validation, last | validation, average | test, last      | test, average   \
| average lower |
| ---- | ---------------- | ------------------- | --------------- | --------------- \
| ------------- |"""


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse and check the options."""
    parser = command_line.Parser("Train on the digits at several rates.")
    parser.add_argument(
        "--rate",
        type=command_line.positive,
        nargs="+",
        default=[digits.LEARNING_RATE],
        help="initial learning rates (default: 0.6, as in the example)",
    )
    parser.add_argument(
        "--schedule",
        choices=SCHEDULES,
        default="constant",
        help="constant, or decayed to zero (default: %(default)s)",
    )
    parser.add_argument(
        "--noise",
        type=command_line.number(
            float, lambda n: 0 <= n < math.inf, "0 or more, and finite"
        ),
        default=digits.NOISE,
        help="standard deviation of the noise on the pixels, which are in [0, 1]"
        " (default: %(default)s)",
    )
    command_line.add_steps(parser, digits.STEPS, least=digits.EVALUATE_EVERY)
    command_line.add_seeds(parser, digits.SEEDS)
    return parser.parse_args(argv)


def row(rate: float, results: Any) -> str:
    """Format a row: losses at the end, mean ± standard deviation."""
    names = ("last", "averaged")
    validation = [results.curves[name].loss[-1] for name in names]
    test = [results.test[name].loss for name in names]
    cells = [report.spread(losses, 4) for losses in (*validation, *test)]
    lower = f"{np.sum(test[1] < test[0])} of {len(test[0])}"
    widths = (16, 19, 15, 15)
    spaced = " | ".join(f"{c:{w}}" for c, w in zip(cells, widths, strict=True))
    return f"| {rate:<4g} | {spaced} | {lower:13} |"


def main(argv: Sequence[str] | None = None) -> list[digits.Results]:
    """Train at every learning rate, print the table and return the results."""
    options = parse(argv)
    print(HEADER)
    measured = []
    for rate in options.rate:
        schedule = SCHEDULES[options.schedule](rate, options.steps)
        results = digits.train(schedule, options.noise, options.steps, options.seeds)
        print(row(rate, results), flush=True)
        measured.append(results)
    settings = {name: v for name, v in vars(options).items() if name != "rate"}
    print(report.describe(settings))
    return measured


if __name__ == "__main__":
    main()
