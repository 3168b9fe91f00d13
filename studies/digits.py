# SPDX-License-Identifier: Apache-2.0
"""How the digits' losses depend on the rate, on its schedule and on the noise.

    python -m benchmarks.digits --rate 0.1 0.2 0.3 0.4 0.5 0.6 0.8 1.0 1.2
    python -m benchmarks.digits --schedule linear --rate 0.8 1.2 1.6 2.0
    python -m benchmarks.digits --noise 0

The training of `examples/digits.py`, a row a rate. The rate to take is the one at
which the last iterate does best on the validation set: choosing it by the average
would favour the average.
"""

import argparse
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import optax

from benchmarks import command_line
from examples import digits

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
    """The options, checked."""
    parser = command_line.Parser("Train on the digits at several rates.")
    parser.add_argument(
        "--rate",
        type=command_line.positive,
        nargs="+",
        default=[digits.RATE],
        help="learning rates, at the start (default: 0.6, as in the example)",
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
        help="standard deviation of the noise on the training images' pixels, which"
        " lie in [0, 1] (default: %(default)s)",
    )
    command_line.add_steps(parser, digits.STEPS, least=digits.EVALUATE_EVERY)
    command_line.add_seeds(parser, digits.SEEDS)
    return parser.parse_args(argv)


def row(rate: float, results: Any) -> str:
    """A rate's line of the table: losses at the end, mean ± standard deviation."""
    names = ("last", "averaged")
    validation = [results.curves[name].loss[-1] for name in names]
    test = [results.test[name].loss for name in names]
    cells = [command_line.spread(losses, 4) for losses in (*validation, *test)]
    lower = f"{np.sum(test[1] < test[0])} of {len(test[0])}"
    widths = (16, 19, 15, 15)
    spaced = " | ".join(f"{c:{w}}" for c, w in zip(cells, widths, strict=True))
    return f"| {rate:<4g} | {spaced} | {lower:13} |"


def main(argv: Sequence[str] | None = None) -> list[digits.Results]:
    """Trains at every rate, prints the table and returns what was measured."""
    options = parse(argv)
    print(HEADER)
    measured = []
    for rate in options.rate:
        schedule = SCHEDULES[options.schedule](rate, options.steps)
        results = digits.train(schedule, options.noise, options.steps, options.seeds)
        print(row(rate, results), flush=True)
        measured.append(results)
    settings = {name: v for name, v in vars(options).items() if name != "rate"}
    print(command_line.describe(settings))
    return measured


if __name__ == "__main__":
    main()
