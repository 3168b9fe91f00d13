# SPDX-License-Identifier: Apache-2.0
"""Effect of stale BatchNorm statistics at other learning rates.

    python -m studies.batch_norm --rate 0.3

This study trains like `examples/batch_norm.py`. That example has a learning rate of 3,
at which stale statistics do harm. At a small learning rate the iterates are close
together, so their statistics fit the average.
"""

from collections.abc import Sequence

from examples import batch_norm
from tools import command_line, report


def main(argv: Sequence[str] | None = None) -> batch_norm.Results:
    """Train, print the table and return the scores."""
    parser = command_line.Parser(
        "Average a network with BatchNorm; compare its statistics."
    )
    parser.add_argument(
        "--rate",
        type=command_line.positive,
        default=batch_norm.LEARNING_RATE,
        help="learning rate, constant (default: %(default)s)",
    )
    command_line.add_steps(parser, batch_norm.STEPS)
    command_line.add_seeds(parser, batch_norm.SEEDS)
    options = parser.parse_args(argv)
    results = batch_norm.main(options.rate, steps=options.steps, seeds=options.seeds)
    print(report.describe(vars(options)))
    return results


if __name__ == "__main__":
    main()
