# SPDX-License-Identifier: Apache-2.0
"""Coverage of the tumour example's intervals by learning rate.

    python -m studies.online_inference

Follows the streams of `examples/online_inference.py` at learning rates
min(1/d, c t^-0.505). There is a row for every c and estimate: the average at one
learning rate, and the extrapolation from c and 2c. The rule in
`docs/how_to/confidence_intervals.md` is c = 1/2. All numbers are over the questions.
"""

from collections.abc import Sequence

import numpy as np

from examples import online_inference
from examples.online_inference import (
    ESTIMATES,
    OBSERVATIONS,
    QUESTIONS,
    READINGS,
    STREAMS,
    Study,
)
from tools import command_line


def main(argv: Sequence[str] | None = None) -> list[Study]:
    """Follow the streams at every learning rate, print and return the results."""
    parser = command_line.Parser("Coverage on the tumours by learning rate.")
    parser.add_argument(
        "--rate",
        type=command_line.positive,
        nargs="+",
        default=[0.5, 2.0, 5.0, 10.0],
        help="the factors c (default: 0.5 2 5 10)",
    )
    parser.add_argument(
        "--observations",
        type=command_line.number(
            int,
            lambda n: 0 < n <= 10**8 and n % READINGS == 0,
            f"a positive multiple of {READINGS}, at most 100,000,000",
        ),
        default=OBSERVATIONS,
        help="length of a stream (default: %(default)s)",
    )
    parser.add_argument(
        "--streams",
        type=command_line.whole_number(1, 10**6),
        default=STREAMS,
        help="number of streams (default: %(default)s)",
    )
    options = parser.parse_args(argv)
    print(
        "| c   | estimate  | covered (%) | least covered              | bias | length |"
    )
    print(
        "| --- | --------- | ----------- | -------------------------- | ---- | ------ |"
    )
    names, studies = list(QUESTIONS), []
    for c in options.rate:
        study = online_inference.follow(c, options.observations, options.streams)
        lower, upper = (ends[-1] for ends in study.intervals)
        for k, estimate in enumerate(ESTIMATES):
            shares = 100 * study.covered[:, k]
            error = shares.mean(axis=1).std() / np.sqrt(options.streams)
            worst = shares.mean(axis=0).argmin()
            middle, length = (lower + upper)[:, k] / 2, (upper - lower)[:, k].mean()
            # Of the mean over the streams, in their standard deviations.
            bias = (middle.mean(axis=0) - study.truth) / middle.std(axis=0)
            overall = f"{shares.mean():.1f} ± {error:.1f}"
            least = f"{names[worst]}, {shares[:, worst].mean():.0f} %"
            print(
                f"| {c:<3g} | {estimate:9} | {overall:11} | {least:26} |"
                f" {np.sqrt(np.mean(bias**2)):.2f} | {length:.4f} |",
                flush=True,
            )
        studies.append(study)
    return studies


if __name__ == "__main__":
    main()
