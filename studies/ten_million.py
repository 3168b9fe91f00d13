# SPDX-License-Identifier: Apache-2.0
"""Ten million observations, 20 regressors, one pass: time, memory and intervals.

    python -m studies.ten_million

The data are written once, to a NumPy file of float32: regressors N(0, I), coefficients
evenly spaced from 0 to 1, and two responses, one linear with noise N(0, 1) and one
logistic. The contestants are

- SGD by `studies.online_regression`, with confidence intervals;
- statsmodels' OLS, Logit and QuantReg, with confidence intervals;
- NumPy, with confidence intervals: sums of X'X over the chunks, and Newton's method,
  which takes a pass over the data per step;
- scikit-learn's averaged SGD, without intervals.

Contestants run one after another, each in its own process, because the peak memory of a
process never falls. All read the file in chunks and release the pages of each, so that
only one chunk counts as memory.
"""

import math
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from tools import command_line, report

# Each contestant imports what only it needs (jax, statsmodels, scikit-learn), to keep
# these packages out of the memory of the others.

D = 20
CHUNK = 100_000  # rows; 8.8 MB
SEED = 2022
TENTH = 10
NORMAL = 1.96

# The column of each regression's response, after the regressors.
RESPONSES = {"least squares": D, "logistic": D + 1, "median": D}
COLUMNS = D + 2


class Fit(NamedTuple):
    """An estimate, and its 95 % intervals if any. Shapes (D,)."""

    estimate: np.ndarray
    lower: np.ndarray | None = None
    upper: np.ndarray | None = None


class Rows(NamedTuple):
    """The first rows of a file, with one column as the response.

    Attributes:
      path: a file from `write`.
      response: the response's column.
      observations: number of rows.
      length: rows per chunk; the last chunk may be shorter.
    """

    path: Path
    response: int
    observations: int
    length: int = CHUNK

    def chunks(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield chunks of regressors and responses, in order."""
        for first in range(0, self.observations, self.length):
            last = min(first + self.length, self.observations)
            # Reopened, because the pages of an open map count as memory.
            rows = np.load(self.path, mmap_mode="r")[first:last]
            yield np.array(rows[:, :D]), np.array(rows[:, self.response])

    def whole(self) -> tuple[np.ndarray, np.ndarray]:
        """Return all regressors and responses in float64."""
        x, y = np.empty((self.observations, D)), np.empty(self.observations)
        first = 0
        for some_x, some_y in self.chunks():
            last = first + len(some_y)
            x[first:last], y[first:last] = some_x, some_y
            first = last
        return x, y


# Imports what it needs, and returns the function that is timed.
Contestant = Callable[[], Callable[[Rows], Fit]]


class Result(NamedTuple):
    """The result of a contestant.

    Attributes:
      fit: its estimate and intervals.
      seconds: from the first byte read to the last interval, compilation included.
      cpu: CPU seconds of all threads.
      imported: bytes of memory before anything is read.
      peak: peak memory in bytes.
    """

    fit: Fit
    seconds: float
    cpu: float
    imported: int
    peak: int


def truth() -> np.ndarray:
    return np.linspace(0, 1, D)


def start(observations: int) -> int:
    """Return the burn-in of SGD, by the rule of the guide."""
    return max(observations // 100, 10 * D)


def write(folder: Path, observations: int) -> Path:
    """Write the file of observations, unless it exists."""
    path = folder / f"{observations}x{COLUMNS}.npy"
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    # Renamed when complete, so that an interrupted file is never used.
    unfinished = path.with_suffix(".unfinished")
    rows = np.lib.format.open_memmap(
        unfinished, mode="w+", dtype=np.float32, shape=(observations, COLUMNS)
    )
    rng = np.random.default_rng(SEED)
    for first in tqdm(range(0, observations, CHUNK), desc="writing", unit="chunk"):
        chunk = rows[first : first + CHUNK]
        x = rng.standard_normal((len(chunk), D), np.float32)
        signal = x @ truth().astype(np.float32)
        chunk[:, :D] = x
        chunk[:, D] = signal + rng.standard_normal(len(chunk))
        chunk[:, D + 1] = signal > rng.logistic(size=len(chunk))
    rows.flush()
    del rows
    return unfinished.replace(path)


def ours(regression: str, method: str) -> Callable[[Rows], Fit]:
    """Fit by SGD, with a method of `studies.online_regression`."""
    from studies import online_regression as online

    def fit(rows: Rows) -> Fit:
        make = {"one rate": online.one_rate, "two rates": online.two_rates}[method]
        learner = make(online.LOSSES[regression], D, start(rows.observations))
        return Fit(*online.learn(learner, rows.chunks()))

    return fit


def normal_equations() -> Callable[[Rows], Fit]:
    """Fit exact least squares from X'X and X'y, summed in float64."""

    def fit(rows: Rows) -> Fit:
        xx, xy, yy = np.zeros((D, D)), np.zeros(D), 0.0
        for x, y in rows.chunks():
            x, y = x.astype(np.float64), y.astype(np.float64)
            xx += x.T @ x
            xy += x.T @ y
            yy += float(y @ y)
        w = np.linalg.solve(xx, xy)
        variance = (yy - xy @ w) / (rows.observations - D)
        half = NORMAL * np.sqrt(variance * np.diag(np.linalg.inv(xx)))
        return Fit(w, w - half, w + half)

    return fit


def newton() -> Callable[[Rows], Fit]:
    """Fit exact logistic regression by Newton's method in float64, a pass per step."""

    def fit(rows: Rows) -> Fit:
        w, half = np.zeros(D), np.zeros(D)
        step: np.ndarray = np.ones(D)
        while np.any(np.abs(step) > 1e-3 * half):  # convergence is quadratic
            gradient, hessian = np.zeros(D), np.zeros((D, D))
            for x, y in rows.chunks():
                x = x.astype(np.float64)
                mean = 1 / (1 + np.exp(-(x @ w)))
                gradient += x.T @ (y - mean)
                hessian += x.T @ (x * (mean * (1 - mean))[:, None])
            step = np.linalg.solve(hessian, gradient)
            w += step
            half = NORMAL * np.sqrt(np.diag(np.linalg.inv(hessian)))
        return Fit(w, w - half, w + half)

    return fit


def statsmodels(regression: str) -> Callable[[Rows], Fit]:
    """Fit the model of statsmodels with its defaults, with all data in memory."""
    with command_line.needs("bench"):
        import statsmodels.api as sm

    def fit(rows: Rows) -> Fit:
        x, y = rows.whole()
        if regression == "least squares":
            result = sm.OLS(y, x).fit()
        elif regression == "logistic":
            result = sm.Logit(y, x).fit(disp=False)
        else:
            result = sm.QuantReg(y, x).fit(q=0.5)
        return Fit(result.params, *result.conf_int().T)

    return fit


def scikit_learn(regression: str) -> Callable[[Rows], Fit]:
    """Fit by averaged SGD in scikit-learn, as close to our one rate as possible."""
    from sklearn.linear_model import SGDClassifier, SGDRegressor

    def fit(rows: Rows) -> Fit:
        options = {
            "penalty": None,
            "fit_intercept": False,
            "learning_rate": "invscaling",  # eta0 t^-power_t, without a bound
            "eta0": 0.5,
            "power_t": 0.505,
            "shuffle": False,
            # The first observation that is averaged.
            "average": start(rows.observations),
        }
        if regression == "least squares":
            model, classes = SGDRegressor(**options), {}
        else:
            model = SGDClassifier(loss="log_loss", **options)
            classes = {"classes": np.array([0, 1])}
        for x, y in rows.chunks():
            # In float32 the logistic average of ten million observations was 2.3
            # standard errors from the exact estimate, in float64 0.26.
            model.partial_fit(x.astype(np.float64), y.astype(np.float64), **classes)
        return Fit(np.ravel(model.coef_))

    return fit


ONE, TWO = "ours, one learning rate", "ours, two learning rates extrapolated"
STATSMODELS = "statsmodels"


def contestants(regression: str) -> dict[str, Contestant]:
    """Return the contestants of a regression, by name."""
    others: dict[str, dict[str, Contestant]] = {
        "least squares": {
            "scikit-learn": partial(scikit_learn, regression),
            "NumPy, X'X": normal_equations,
        },
        "logistic": {
            "scikit-learn": partial(scikit_learn, regression),
            "NumPy, Newton": newton,
        },
        "median": {},
    }
    return {
        ONE: partial(ours, regression, "one rate"),
        TWO: partial(ours, regression, "two rates"),
        **others[regression],
        STATSMODELS: partial(statsmodels, regression),
    }


def measure(contestant: Contestant, rows: Rows) -> Result:
    """Run a contestant in a new process."""
    fresh = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=fresh) as pool:
        return pool.submit(_measure_here, contestant, rows).result()


def _measure_here(contestant: Contestant, rows: Rows) -> Result:
    fit = contestant()
    imported = peak_memory()
    began, cpu = time.perf_counter(), time.process_time()
    result = fit(rows)
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    return Result(result, seconds, cpu, imported, peak_memory())


def peak_memory() -> int:
    """Return the peak resident memory of this process in bytes (Linux only).

    `getrusage` does not serve: its value starts from the parent process.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return 1024 * int(line.split()[1])
    raise OSError("/proc/self/status has no VmHWM")


def study(path: Path, observations: int) -> dict[str, dict[tuple[str, int], Result]]:
    """Return the results by regression, and by contestant and observations."""
    tenth = observations // TENTH
    jobs = []
    for regression in RESPONSES:
        for name, contestant in contestants(regression).items():
            counts = [observations]
            if name in (ONE, TWO):
                counts = [tenth, observations]
            elif name == STATSMODELS and regression == "median":
                counts = [tenth]  # minutes, even so
            jobs += [(regression, name, contestant, n) for n in counts]
    results: dict[str, dict[tuple[str, int], Result]] = {r: {} for r in RESPONSES}
    for regression, name, contestant, n in (bar := tqdm(jobs, unit="run")):
        bar.set_description(f"{regression}, {name}, {n:,}")
        rows = Rows(path, RESPONSES[regression], n)
        results[regression][name, n] = measure(contestant, rows)
    return results


def bounds(regression: str) -> np.ndarray:
    """Return n times the least variances, the diagonal of H^-1 S H^-1."""
    # Imported here, because it imports jax.
    from studies import coverage

    if regression == "logistic":
        return coverage.logistic(D).bounds
    return np.full(D, math.pi / 2 if regression == "median" else 1.0)


def root_mean_square(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(values))))


def format_rows(regression: str, results: Mapping[tuple[str, int], Result]) -> str:
    """Format the table of a regression."""
    header = [
        "",
        "observations",
        "seconds",
        "CPU seconds",
        "memory (MB)",
        "of it imports",
        "from exact (s.e.)",
        "from truth (s.e.)",
        "half-width / efficient",
        f"true value covered, of {D}",
    ]
    table = []
    for (name, n), result in results.items():
        fit, error = result.fit, np.sqrt(bounds(regression) / n)
        exact = results.get((STATSMODELS, n))
        distance = width = covered = ""
        if exact is not None and name != STATSMODELS:
            away = root_mean_square((fit.estimate - exact.fit.estimate) / error)
            distance = f"{away:.3f}"
        if fit.lower is not None and fit.upper is not None:
            width = f"{np.mean((fit.upper - fit.lower) / (2 * NORMAL * error)):.2f}"
            covered = str(np.sum((fit.lower <= truth()) & (truth() <= fit.upper)))
        table.append(
            [
                name,
                f"{n:,}",
                f"{result.seconds:.1f}",
                f"{result.cpu:.1f}",
                f"{result.peak / 1e6:,.0f}",
                f"{result.imported / 1e6:,.0f}",
                distance,
                f"{root_mean_square((fit.estimate - truth()) / error):.2f}",
                width,
                covered,
            ]
        )
    return report.table(header, table)


PAGE = """\
# Ten million observations in one pass

{observations:,} observations of {d} regressors N(0, I), with coefficients evenly spaced
from 0 to 1. The response is logistic, or linear with noise N(0, 1) (also for the
median). The data are on disk in float32, {size:,.0f} MB, and read in chunks of
{chunk:,}.

## Least squares

{least_squares}

## Logistic regression

{logistic}

## Median regression

{median}

- *ours*: SGD, one observation per step, with the intervals of random scaling
  (`online_regression.py`), in float32. One learning rate: min(1/d, t^-0.505 / 2). Two
  learning rates: min(1/2d, t^-0.505) / L and twice that, extrapolated; L is 1, 1/4 and
  1/2, a bound of the loss's curvature. Averaging begins after n / 100. The rows with a
  tenth of the observations show that memory does not grow.
- *scikit-learn*: `SGDRegressor` and `SGDClassifier` by `partial_fit`, without penalty,
  at t^-0.505 / 2, averaged after n / 100, in float64. It has no intervals.
- *NumPy*: a few lines that sum d² numbers over the chunks in float64: exact, with
  intervals. Least squares takes one pass over the data, Newton's method one per step.
- *statsmodels*: `OLS`, `Logit` and `QuantReg` with their defaults, with all data in
  memory in float64. QuantReg gets only the first {tenth:,}, for which it takes minutes.
- *seconds*: from the first byte read to the last interval, with compilation but without
  imports; *CPU seconds*: of all threads.
- *memory*: the peak resident memory of the process (VmHWM), one process per row; *of it
  imports*: before anything is read. The file is mapped again for each chunk, so only
  one chunk of its pages counts, and the operating system's file cache does not.
- *from exact*, *from truth*: distance from statsmodels' estimate on the same number of
  observations, and from the true coefficients. It is a root mean square over the
  coefficients, in efficient standard errors, sqrt((H^-1 S H^-1)_jj / n).
- *half-width / efficient*: mean half-width of the 95 % intervals over {normal}
  efficient standard errors. For random scaling its mean over streams tends to 1.30.
- *true value covered*: on one stream. `python -m studies.coverage` measures the
  coverage over many streams.
"""


def format_page(
    results: Mapping[str, Mapping[tuple[str, int], Result]],
    observations: int,
    size: int,
) -> str:
    """Format the tables and their explanation."""
    return PAGE.format(
        observations=observations,
        tenth=observations // TENTH,
        d=D,
        size=size / 1e6,
        chunk=CHUNK,
        normal=NORMAL,
        **{
            regression.replace(" ", "_"): format_rows(regression, rows)
            for regression, rows in results.items()
        },
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Write the data, run the contestants, and write the table."""
    parser = command_line.report_parser("Ten million observations in one pass.")
    parser.add_argument(
        "--observations",
        type=command_line.whole_number(10_000),
        default=10_000_000,
        help="number of observations; a tenth is tried too (default: %(default)s)",
    )
    parser.add_argument(
        "--data",
        type=Path,
        default=Path("out/ten_million"),
        help="folder where the observations are kept (default: %(default)s)",
    )
    options = parser.parse_args(argv)
    with command_line.needs("bench"):  # fail before the others run
        import statsmodels.api  # noqa: F401
    observations = 20_000 if options.quick else options.observations
    path = write(options.data, observations)
    results = study(path, observations)
    page = format_page(results, observations, os.path.getsize(path))
    report.write("studies.ten_million", page, options.output)


if __name__ == "__main__":
    main()
