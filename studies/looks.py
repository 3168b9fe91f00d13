# SPDX-License-Identifier: Apache-2.0
"""Critical values of intervals that are read repeatedly, by simulation.

    python -m studies.looks

The study simulates Brownian paths W on [0, R] and takes the quantile of the supremum
over r in [1, R] of |W(r) / r| / sqrt(V(r) / r), with V the random scaling functional.
On a grid of n0 steps per unit of log r the supremum is too low by about 1 / sqrt(n0),
so the study extrapolates from two grids. For K looks that are fixed in advance, evenly
spaced in log r over a range of 10, it compares the quantile with the bound `level=1 -
0.05 / K`. It takes a minute.
"""

from collections.abc import Sequence

import numpy as np

from asgd_optax._accessors.critical_value import (
    critical_value,
    critical_value_of_looks,
)
from tools import command_line

LEVELS = (0.8, 0.95, 0.99)
RATIOS = (1.0, 2.0, 10.0, 100.0)
STEPS = 100, 400
COUNTS = (5, 10)  # numbers of looks that are fixed in advance


def suprema(
    steps: int,
    ratios: Sequence[float],
    paths: int,
    seed: int,
    *,
    only_at_ratios: bool = False,
) -> np.ndarray:
    """Return the suprema of `paths` paths, one row per ratio.

    Args:
      steps: number of grid points up to r = 1, and per unit of log r after it.
      ratios: values of R, ascending.
      paths: number of paths.
      seed: seed of the increments.
      only_at_ratios: take the suprema over the ratios instead of all r in [1, R].
    """
    rng = np.random.default_rng(seed)
    unit = np.arange(1, steps + 1) / steps
    later = np.exp(np.arange(1, steps * np.log(ratios[-1])) / steps)
    grid = np.unique(np.concatenate([unit, later, ratios]))
    w = np.zeros(paths)
    # Integrals of w^2 and s w over [0, r], by the trapezoidal rule.
    square, moment = np.zeros(paths), np.zeros(paths)
    supremum, rows, before = np.zeros(paths), [], 0.0
    for r in grid:
        step = r - before
        new = w + np.sqrt(step) * rng.standard_normal(paths)
        # The mean of w^2 between two grid points, with the bridge's variance.
        square += step * ((w * w + w * new + new * new) / 3 + step / 6)
        moment += step * ((2 * before + r) * w + (before + 2 * r) * new) / 6
        w, before = new, r
        if r in ratios or (r >= 1 and not only_at_ratios):
            mean = w / r
            # The integral of (w(s) - s mean)^2, over r^2.
            v = (square - 2 * mean * moment + mean * mean * r**3 / 3) / r**2
            np.maximum(supremum, np.abs(mean) / np.sqrt(v / r), out=supremum)
        if r in ratios:
            rows.append(supremum.copy())
    return np.array(rows)


def simulated(paths: int, seed: int = 0) -> np.ndarray:
    """Return critical values, shape (ratios, levels), extrapolated to a fine grid."""
    coarse, fine = (
        np.quantile(suprema(steps, RATIOS, paths, seed + i), LEVELS, axis=1).T
        for i, steps in enumerate(STEPS)
    )
    # The error is proportional to 1 / sqrt(steps), and STEPS differ by a factor of 4.
    extrapolated = 2 * fine - coarse
    extrapolated[0] = fine[0]  # R = 1 is one look: no supremum to miss
    return extrapolated


def simulated_at(count: int, paths: int, seed: int = 0) -> float:
    """Return the critical value at 95 % for this number of looks fixed in advance."""
    looks = np.geomspace(1, 10, count).tolist()
    maxima = suprema(STEPS[0], looks, paths, seed, only_at_ratios=True)[-1]
    return float(np.quantile(maxima, 0.95))


def main(argv: Sequence[str] | None = None) -> None:
    """Print a table of simulated critical values and those of the formula."""
    parser = command_line.Parser("Critical values for repeated looks, by simulation.")
    parser.add_argument(
        "--paths",
        type=command_line.whole_number(),
        default=500_000,
        help="number of simulated paths (default: %(default)s)",
    )
    paths = parser.parse_args(argv).paths
    values = simulated(paths)
    print(f"{paths} paths; simulated / formula (difference)")
    print("| R | " + " | ".join(f"{level:.0%}" for level in LEVELS) + " |")
    print("| ---: |" + " ---: |" * len(LEVELS))
    for ratio, row in zip(RATIOS, values, strict=True):
        cells = []
        for level, value in zip(LEVELS, row, strict=True):
            c = critical_value_of_looks(level, ratio)
            cells.append(f"{value:.2f} / {c:.2f} ({value / c - 1:+.1%})")
        print(f"| {ratio:g} | " + " | ".join(cells) + " |")
    print("\nK looks fixed in advance, 95 %; simulated / 1 - 0.05 / K (difference)")
    for count in COUNTS:
        value, c = simulated_at(count, paths), critical_value(1 - 0.05 / count)
        print(f"K = {count}: {value:.2f} / {c:.2f} ({c / value - 1:+.1%})")


if __name__ == "__main__":
    main()
