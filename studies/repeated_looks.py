# SPDX-License-Identifier: Apache-2.0
"""Coverage of confidence intervals that are read repeatedly.

    python -m studies.repeated_looks --output studies/results

Uses designs, streams and learning rates of `studies.coverage`. The intervals are read
at 30 numbers n of averaged iterates, evenly spaced on a log scale from the first look
to the last. Averages and half-widths are recorded at the looks, so one run per design
serves all critical values and all first looks.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np

from asgd_optax import averaged_params, confidence_interval
from asgd_optax._accessors.critical_value import (
    critical_value,
    critical_value_of_looks,
)
from studies.coverage import CHUNK, Study, linear, logistic, one_run, states, two_runs
from tools import command_line, report

LEVEL = 0.95
LOOKS = 30
FIRST = (0.02, 0.1, 0.5)  # first looks, in observations of the whole stream
FIXED = (5, 10)  # numbers of looks that are fixed in advance


class Path(NamedTuple):
    """The intervals of all replications at the looks.

    Attributes:
      looks: numbers of averaged iterates.
      error: the average minus the true value over the half-width with a critical value
        of 1, in absolute value. Shape (looks, coefficients, replications).
      half: that half-width.
    """

    looks: np.ndarray
    error: np.ndarray
    half: np.ndarray

    def at(self, looks: np.ndarray) -> "Path":
        """Return the intervals at some of the looks."""
        rows = np.searchsorted(self.looks, looks)
        return Path(looks, self.error[rows], self.half[rows])


def log_spaced(first: float, last: int, count: int = LOOKS) -> np.ndarray:
    """Return the looks from `first` to `last`, rounded to chunks."""
    looks = np.geomspace(first, last, count) / CHUNK
    return CHUNK * np.unique(np.round(looks).astype(int))


def firsts(study: Study) -> list[int]:
    """Return the first looks of a study, in averaged iterates."""
    return [round(share * study.observations) for share in FIRST]


def record(study: Study, seed: int) -> Path:
    """Run a study of one learning rate and one start, and return its intervals."""
    last = study.observations - study.start
    watched = [log_spaced(first, last) for first in firsts(study)]
    fixed = [log_spaced(last / 10, last, count) for count in FIXED]
    looks = np.unique(np.concatenate([*watched, *fixed]))
    truth = study.design.coefficients[:, None]
    errors, halves = [], []
    for (state,) in states(study, seed, list(looks + study.start)):
        ends = jax.vmap(confidence_interval)(state)
        lower, upper = (np.asarray(end[0], np.float64) for end in ends)
        half = (upper - lower) / 2 / critical_value(LEVEL)
        average = np.asarray(averaged_params(state)[0], np.float64)
        errors.append(np.abs(average - truth) / half)
        halves.append(half)
    return Path(looks, np.array(errors), np.array(halves))


def share(covered: np.ndarray) -> str:
    """Format the percentage of intervals that cover, ± its standard error.

    Args:
      covered: of shape (coefficients, replications). Replications are independent.
    """
    replications = covered.mean(axis=0)
    error = replications.std(ddof=1) / np.sqrt(len(replications))
    return f"{100 * replications.mean():.1f} ± {100 * error:.1f}"


def stopped(path: Path) -> np.ndarray:
    """Return each coefficient's error at the first look with a short interval.

    An interval is short if it is shorter than the median of its kind at the look in the
    middle. If none is short the last look counts.
    """
    short = path.half < np.median(path.half[len(path.looks) // 2])
    short[-1] = True
    return np.take_along_axis(path.error, short.argmax(axis=0)[None], axis=0)[0]


def rules(n: int, replications: int) -> list[Study]:
    """Return the rules of the designs, each with one learning rate and one start."""
    few = replications // 4  # for d = 20, which takes four times as long
    every = [
        one_run(linear(5), n, replications),
        one_run(linear(20), n, few),
        two_runs(logistic(5), n, replications),
        one_run(logistic(5), n, replications),
        two_runs(logistic(20), n, few),
    ]
    return [study._replace(tried=[study.rate], starts=[study.start]) for study in every]


def rows_of(study: Study, path: Path) -> Iterator[tuple[list[str], list[str]]]:
    """Yield the rows of the first two tables for each first look."""
    last = path.looks[-1]
    d = len(study.design.coefficients)
    one_look = critical_value(LEVEL)
    for first in firsts(study):
        at = path.at(log_spaced(first, last))
        memory = study.rate.c * study.design.flattest * first ** (1 - study.rate.a)
        name = [study.design.title, str(len(study.method.weights)), f"{first:,}"]
        watched = critical_value_of_looks(LEVEL, last / first)
        joint = critical_value_of_looks(1 - (1 - LEVEL) / d, last / first)
        largest = at.error.max(axis=0)
        at_stop = stopped(at)
        yield (
            [
                *name,
                f"{memory:.0f}",
                share(at.error[0] <= one_look),
                share(largest <= one_look),
                share(largest <= watched),
                share(largest.max(axis=0, keepdims=True) <= joint),
            ],
            [
                *name,
                f"{watched / one_look:.2f}",
                share(at_stop <= one_look),
                share(at_stop <= watched),
            ],
        )


def fixed_row(study: Study, path: Path) -> list[str]:
    """Return the row of a study with looks that are fixed in advance."""
    last = path.looks[-1]
    row = [study.design.title, str(len(study.method.weights))]
    for count in FIXED:
        looks = log_spaced(last / 10, last, count)
        error = path.at(looks).error.max(axis=0)
        row.append(share(error <= critical_value(LEVEL)))
        row.append(share(error <= critical_value(1 - (1 - LEVEL) / count)))
    return row


PAGE = """\
# Coverage of confidence intervals that are read repeatedly

{replications:,} replications (a quarter of them for d = 20) of {n:,} observations,
float32, level 95 %. The intervals follow the rules of the
[coverage study](coverage.md), for one run or for two extrapolated runs. They are read
at {looks} numbers of averaged iterates, evenly spaced on a log scale from the first
look to the end of the stream. All shares are percentages, ± their Monte Carlo standard
error over independent replications.

## All looks

- *c λ n^(1-a)*: at the first look, with the first run's learning rate c t^-a and the
  least curvature λ.
- *one look*: share of the intervals at the first look that cover the true value,
  without `looks`.
- *fixed* and *`looks`*: share of the coefficients whose intervals cover the true value
  at *all* looks, without `looks` and with `looks=(first, last)`.
- *all coefficients*: share of the replications in which *all* coefficients are covered
  at *all* looks, with `looks=(first, last)` and `level=1 - 0.05 / d`.

{0}

## Stopping at a width

Share of the intervals that cover the true value at the look at which a reader stops.
The reader stops at the first look at which the interval is shorter than a tolerance, or
at the last look. The tolerance for each kind of interval is its median length at the
look in the middle of the range (on the log scale). Both kinds therefore stop at the
same looks. *length* is the length with `looks` relative to the fixed interval.

{1}

## Looks fixed in advance

Share of the coefficients whose intervals cover the true value at all of K looks, with
`level=0.95` and with `level=1 - 0.05 / K`. The looks are evenly spaced on a log scale
from a tenth of the last look to the last look.

{2}
"""

NAME = ["design", "runs"]
HEADERS = [
    [*NAME, "first", "c λ n^(1-a)", "one look", "fixed", "`looks`", "all coefficients"],
    [*NAME, "first", "length", "fixed", "`looks`"],
    [
        *NAME,
        *(f"K = {k}, {level}" for k in FIXED for level in ("0.95", "1 - 0.05 / K")),
    ],
]


def main(argv: Sequence[str] | None = None) -> None:
    """Run all designs, and write the page."""
    parser = command_line.report_parser("Coverage of intervals read repeatedly.")
    parser.add_argument(
        "--replications",
        type=command_line.whole_number(8),
        default=1000,
        help="streams per design; a quarter of them for d = 20 (default: %(default)s)",
    )
    parser.add_argument(
        "--seed",
        type=command_line.whole_number(0),
        default=2024,
        help="seed of the first design, from which the others count (default:"
        " %(default)s)",
    )
    options = parser.parse_args(argv)
    n, replications = 100_000, options.replications
    if options.quick:
        n, replications = 100 * CHUNK, 32
    rows: list[list[list[str]]] = [[], [], []]
    for k, study in enumerate(rules(n, replications)):
        path = record(study, options.seed + k)
        for all_looks, at_stop in rows_of(study, path):
            rows[0].append(all_looks)
            rows[1].append(at_stop)
        rows[2].append(fixed_row(study, path))
    tables = map(report.table, HEADERS, rows)
    page = PAGE.format(*tables, replications=replications, n=n, looks=LOOKS)
    report.write("studies.repeated_looks", page, options.output)


if __name__ == "__main__":
    main()
