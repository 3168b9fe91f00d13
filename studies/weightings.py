# SPDX-License-Identifier: Apache-2.0
"""How the weightings compare at other rates of Adam.

    python -m benchmarks.weightings --rate 0.02

The training of `examples/weightings.py`: at a larger rate there is more noise to
average away, and the uniform weighting gains on the others.
"""

from collections.abc import Sequence

from benchmarks import command_line
from examples import weightings


def main(argv: Sequence[str] | None = None) -> weightings.Results:
    """Trains, prints the table and returns what was measured."""
    parser = command_line.Parser("Train with Adam; compare the weightings.")
    parser.add_argument(
        "--rate",
        type=command_line.positive,
        default=weightings.RATE,
        help="Adam's learning rate (default: %(default)s)",
    )
    command_line.add_steps(parser, weightings.STEPS)
    command_line.add_seeds(parser, weightings.SEEDS)
    options = parser.parse_args(argv)
    results = weightings.train(options.rate, options.steps, options.seeds)
    print("|              | test loss       |\n| ------------ | --------------- |")
    for name in weightings.COLORS:
        print(f"| {name:12} | {command_line.spread(results.test[name], 4):15} |")
    print(command_line.describe(vars(options)))
    return results


if __name__ == "__main__":
    main()
