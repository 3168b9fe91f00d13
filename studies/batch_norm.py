# SPDX-License-Identifier: Apache-2.0
"""What stale statistics of BatchNorm cost at other rates.

    python -m benchmarks.batch_norm --rate 0.3

The training of `examples/batch_norm.py`, whose rate, 3, is one at which they do harm:
at a small one the iterates lie close together, and their statistics serve the average.
"""

from collections.abc import Sequence

from benchmarks import command_line
from examples import batch_norm


def main(argv: Sequence[str] | None = None) -> batch_norm.Results:
    """Trains, prints the table and returns what was measured."""
    parser = command_line.Parser(
        "Average a network with BatchNorm; compare its statistics."
    )
    parser.add_argument(
        "--rate",
        type=command_line.positive,
        default=batch_norm.RATE,
        help="learning rate, constant (default: %(default)s)",
    )
    command_line.add_steps(parser, batch_norm.STEPS)
    command_line.add_seeds(parser, batch_norm.SEEDS)
    options = parser.parse_args(argv)
    results = batch_norm.main(options.rate, steps=options.steps, seeds=options.seeds)
    print(command_line.describe(vars(options)))
    return results


if __name__ == "__main__":
    main()
