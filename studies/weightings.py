# SPDX-License-Identifier: Apache-2.0
"""Weightings compared at other learning rates of Adam.

    python -m studies.weightings --rate 0.02

This study trains like `examples/weightings.py`. At a larger learning rate there is more
noise to average away, which favours the uniform weighting.
"""

from collections.abc import Sequence

from examples import weightings
from tools import command_line, report


def main(argv: Sequence[str] | None = None) -> weightings.Results:
    """Train, print the table and return the losses."""
    parser = command_line.Parser("Train with Adam; compare the weightings.")
    parser.add_argument(
        "--rate",
        type=command_line.positive,
        default=weightings.LEARNING_RATE,
        help="Adam's learning rate (default: %(default)s)",
    )
    command_line.add_steps(parser, weightings.STEPS)
    command_line.add_seeds(parser, weightings.SEEDS)
    options = parser.parse_args(argv)
    results = weightings.train(options.rate, options.steps, options.seeds)
    print("|              | test loss       |\n| ------------ | --------------- |")
    for name in weightings.COLORS:
        print(f"| {name:12} | {report.spread(results.test[name], 4):15} |")
    print(report.describe(vars(options)))
    return results


if __name__ == "__main__":
    main()
