# SPDX-License-Identifier: Apache-2.0
"""How often the diabetes intervals hold the truth, over the factor of the step size.

    python -m benchmarks.online_inference

The streams of `examples/online_inference.py`, a row a c of min(1/d, c t^-0.505). The
rule of `docs/guides/confidence_intervals.md` is c = 1/2; the loss of these data has
little curvature in one direction.
"""

from collections.abc import Sequence

import numpy as np

from benchmarks import command_line
from examples import online_inference
from examples.online_inference import NAMES, OBSERVATIONS, READINGS, STREAMS, Study


def main(argv: Sequence[str] | None = None) -> list[Study]:
    """Follows the streams at every rate, prints the table, returns the studies."""
    parser = command_line.Parser("Coverage on the diabetes data at several rates.")
    parser.add_argument(
        "--rate",
        type=command_line.positive,
        nargs="+",
        default=[0.5, 5.0, 20.0],
        help="the factors c (default: 0.5 5 20)",
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
        type=command_line.count_to(10**6, "a million"),
        default=STREAMS,
        help="to count over (default: %(default)s)",
    )
    options = parser.parse_args(argv)
    print("| c    | covered (%)  | least covered | mean length |")
    print("| ---- | ------------ | ------------- | ----------- |")
    studies = []
    for c in options.rate:
        study = online_inference.follow(c, options.observations, options.streams)
        shares = 100 * study.covered()
        error = shares.mean(axis=1).std() / np.sqrt(options.streams)
        worst = shares.mean(axis=0).argmin()
        lower, upper = (ends[-1].mean() for ends in study.intervals)
        overall = f"{shares.mean():.1f} ± {error:.1f}"
        least = f"{NAMES[worst]}, {shares[:, worst].mean():.0f} %"
        print(
            f"| {c:<4g} | {overall:12} | {least:13} | {upper - lower:<11.4f} |",
            flush=True,
        )
        studies.append(study)
    return studies


if __name__ == "__main__":
    main()
