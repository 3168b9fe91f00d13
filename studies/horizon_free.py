# SPDX-License-Identifier: Apache-2.0
"""Learning rates that do not know the horizon, averaged, compared with schedules.

    python -m studies.horizon_free

Linear regression in one pass with batches of one sample. The inputs are normal with
variances lambda_i = i^-a, the true parameters satisfy lambda_i w_i^2 = i^-b, and the
noise has variance 1. A run without a horizon is read at every power of two. A cosine
or a warmup-stable-decay schedule needs a run of its own for each.

The peak learning rates are tuned on the expected excess risk, which follows an exact
recursion, so tuning needs no seeds. Then all rows train on the same samples, all seeds
at once, in scans from one horizon to the next. Results of a design that are in the
folder `--cache` are not computed again.
"""

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from matplotlib.lines import Line2D
from matplotlib.ticker import NullFormatter
from tqdm import tqdm

from asgd_optax import (
    average_iterates,
    averaged_params,
    exponential_weighting,
    polynomial_weighting,
    uniform_weighting,
)
from asgd_optax._core.numerics import enable_x64
from tools import command_line, report

DESIGNS = (1.5, 2.5), (1.5, 3.0), (2.0, 1.5)
PEAKS = 2.0 ** np.arange(-10, 4.5, 0.5)  # times 1 / (the sum of the variances)
SHIFTS = 2.0 ** np.arange(0, 17, 4)  # alpha of the learning rate 1 / sqrt(t)
CONSTANT, ROOT = "constant", "1/sqrt(t), alpha"
LAST, UNIFORM, POLYNOMIAL, EMA = "last iterate", "uniform", "polynomial", "EMA"
WEIGHTINGS = {
    UNIFORM: uniform_weighting(),
    POLYNOMIAL: polynomial_weighting(3),
    EMA: exponential_weighting(0.999),
}
READINGS = LAST, *WEIGHTINGS
SCHEDULES = "cosine to 0", "stable, then decay to 0"
FRACTION = 0.2  # the last fraction of the horizon, in which the second one decays
FITTED = 7  # horizons, the longest ones, in the fit of an exponent


class Sizes(NamedTuple):
    """Sizes of the study.

    Attributes:
      d: number of parameters.
      first, last: binary logarithms of the horizons.
      seeds: number of runs of each row.
    """

    d: int
    first: int
    last: int
    seeds: int

    @property
    def horizons(self) -> np.ndarray:
        return 2 ** np.arange(self.first, self.last + 1)


FULL, QUICK = Sizes(2000, 8, 18, 20), Sizes(50, 4, 6, 2)


class Design(NamedTuple):
    """A regression with variances i^-a and a source i^-b."""

    a: float
    b: float

    @property
    def gamma(self) -> float:
        """Exponent of the learning rate that balances bias and variance."""
        return max(1 - self.a / self.b, 0.0)

    @property
    def optimum(self) -> float:
        """The best exponent of the excess risk in one pass of SGD."""
        return -(self.b - 1) / max(self.a, self.b)

    def exponent(self, gamma: float, reading: str) -> float:
        """Return the predicted exponent of the excess risk at a rate of t^-gamma.

        About k = T^((1 - gamma)/a) coordinates are learned after T steps. The others
        leave a bias of k^-(b - 1). Averaging leaves a variance of k/T; the last iterate
        has one in proportion to its learning rate.
        """
        bias = (1 - gamma) * (self.b - 1) / self.a
        variance = gamma if reading == LAST else 1 - (1 - gamma) / self.a
        return 0 - min(bias, variance)

    def variances(self, d: int) -> np.ndarray:
        return np.arange(1, d + 1) ** -self.a

    def source(self, d: int) -> np.ndarray:
        return np.arange(1, d + 1) ** -self.b


class Row(NamedTuple):
    """A learning rate and how its run is read.

    The learning rate at step t = 0, 1, … is peak * (alpha / (t + alpha))^gamma.
    """

    schedule: str
    reading: str
    gamma: float
    peak: float
    alpha: float


class Result(NamedTuple):
    """Results of a design.

    Attributes:
      rows: the tuned runs without a horizon.
      expected: their expected excess risks, shape (rows, horizons).
      measured: their excess risks, shape (rows, horizons, seeds).
      peaks: the tuned peaks of the schedules, shape (2, horizons).
      expected_scheduled, measured_scheduled: as above, for the schedules.
      large: expected excess risks of the rows with 500 times as many parameters.
    """

    rows: list[Row]
    expected: np.ndarray
    measured: np.ndarray
    peaks: np.ndarray
    expected_scheduled: np.ndarray
    measured_scheduled: np.ndarray
    large: np.ndarray


class Groups(NamedTuple):
    """Coordinates with nearly equal variances, as one: shapes (groups,)."""

    size: np.ndarray
    variance: np.ndarray
    source: np.ndarray


def group(design: Design, d: int, ratio: float = 1.03) -> Groups:
    """Group coordinates whose indices differ by a factor of at most `ratio`."""
    starts = [0]
    while starts[-1] < d:
        starts.append(max(starts[-1] + 1, int(starts[-1] * ratio)))
    starts.pop()
    size = np.diff([*starts, d]).astype(float)
    mean = np.add.reduceat(design.variances(d), starts) / size
    return Groups(size, mean, np.add.reduceat(design.source(d), starts))


def step_risk(risk: Any, rate: jax.Array, groups: Groups) -> Any:
    """Return the expected excess risk of each group after a step of SGD.

    For a normal input x of variances v, the error e of the parameters becomes
    e - rate * (x . e - noise) * x, so E[e_i^2] gains a factor 1 - 2 rate v_i +
    2 rate^2 v_i^2 and rate^2 v_i (sum_j v_j E[e_j^2] + 1).
    """
    speed = rate[:, None] * groups.variance
    total = jnp.sum(risk, axis=1, keepdims=True)
    return risk * (1 - 2 * speed + 2 * speed**2) + groups.size * speed**2 * (total + 1)


def decayed(t: Any, peak: Any, alpha: Any, gamma: Any) -> Any:
    return peak * (alpha / (t + alpha)) ** gamma


def scheduled(t: Any, peak: Any, horizon: Any, cosine: Any) -> Any:
    """Return the learning rate of a cosine, or of a linear decay at the end."""
    fraction = t / horizon
    down = jnp.minimum(1, (1 - fraction) / FRACTION)
    return peak * jnp.where(cosine, (1 + jnp.cos(jnp.pi * fraction)) / 2, down)


@partial(jax.jit, static_argnames="last")
def expected_risks(groups: Groups, rates: tuple[Any, Any, Any], last: int) -> Any:
    """Return the expected excess risks at 1, 2, …, 2^last steps.

    Args:
      groups: of the coordinates.
      rates: peaks, alphas and gammas, shape (rates,).
      last: binary logarithm of the number of steps.

    Returns:
      An array of shape (1 + last, readings, rates).
    """
    # For each average: the expectations of average^2 and of average * iterate.
    zero = jnp.broadcast_to(groups.source, (len(rates[0]), len(groups.size)))
    carry = zero, dict.fromkeys(WEIGHTINGS, (zero, zero))

    def step(t: jax.Array, carry: Any) -> Any:
        risk, averages = carry
        rate = decayed(t, *rates)
        risk = step_risk(risk, rate, groups)
        shrink = 1 - rate[:, None] * groups.variance
        updated = {}
        for name, (square, product) in averages.items():
            w = jnp.asarray(WEIGHTINGS[name](t + 1), risk.dtype)
            moved = shrink * product
            square = (1 - w) ** 2 * square + 2 * w * (1 - w) * moved + w**2 * risk
            updated[name] = square, (1 - w) * moved + w * risk
        return risk, updated

    def to_horizon(carry: Any, horizon: jax.Array) -> Any:
        carry = jax.lax.fori_loop(horizon // 2, horizon, step, carry)
        squares = [carry[1][name][0] for name in WEIGHTINGS]
        risks = [jnp.sum(x, axis=1) for x in (carry[0], *squares)]
        return carry, jnp.stack(risks)

    horizons = 2 ** jnp.arange(last + 1)
    return jax.lax.scan(to_horizon, carry, horizons)[1]


@jax.jit
def expected_scheduled(groups: Groups, peaks: Any, horizon: Any, cosine: Any) -> Any:
    """Return the expected excess risks at the end of a schedule, shape (peaks,)."""

    def step(t: jax.Array, risk: Any) -> Any:
        return step_risk(risk, scheduled(t, peaks, horizon, cosine), groups)

    start = jnp.broadcast_to(groups.source, (len(peaks), len(groups.size)))
    return jnp.sum(jax.lax.fori_loop(0, horizon, step, start), axis=1)


def tune(design: Design, sizes: Sizes) -> tuple[list[Row], np.ndarray]:
    """Return the rows without a horizon and their risks, shape (rows, horizons).

    The peak of a row has the least geometric mean of the expected excess risks at all
    horizons, because one run serves them all.
    """
    peaks = PEAKS / design.variances(sizes.d).sum()
    grids: dict[str, tuple[float, Any]] = {CONSTANT: (0.0, [1.0])}
    for gamma in sorted({design.gamma, 0.5} - {0.0}):
        grids[f"t^-{gamma:g}"] = gamma, [1.0]
    grids[ROOT] = 0.5, SHIFTS
    candidates = [
        (name, peak, alpha, gamma)
        for name, (gamma, alphas) in grids.items()
        for alpha in alphas
        for peak in peaks
    ]
    names, *rates = map(np.array, zip(*candidates, strict=True))
    with enable_x64(True):
        risks = expected_risks(group(design, sizes.d), tuple(rates), last=sizes.last)
        risks = np.asarray(risks)[sizes.first :]
    means = np.log(np.where(np.isfinite(risks), risks, np.inf)).mean(axis=0)
    rows, expected = [], []
    for name in grids:
        for j, reading in enumerate(READINGS):
            best = np.argmin(np.where(names == name, means[j], np.inf))
            _, peak, alpha, gamma = candidates[best]
            rows.append(Row(name, reading, gamma, float(peak), float(alpha)))
            expected.append(risks[:, j, best])
    return rows, np.array(expected)


def tune_schedules(design: Design, sizes: Sizes) -> tuple[np.ndarray, np.ndarray]:
    """Return the best peaks and their expected risks, both of shape (2, horizons)."""
    peaks = PEAKS / design.variances(sizes.d).sum()
    best = np.empty((2, 2, len(sizes.horizons)))
    with enable_x64(True):
        groups = group(design, sizes.d)
        for j, horizon in enumerate(sizes.horizons.tolist()):
            for i, cosine in enumerate((True, False)):
                risks = expected_scheduled(groups, peaks, horizon, cosine)
                n = np.argmin(np.where(np.isfinite(risks), risks, np.inf))
                best[:, i, j] = peaks[n], risks[n]
    return best[0], best[1]


def row_risks(design: Design, d: int, sizes: Sizes, rows: list[Row]) -> np.ndarray:
    """Return the expected risks with `d` parameters, shape (rows, horizons)."""
    rates = [
        np.array([getattr(r, x) for r in rows]) for x in ("peak", "alpha", "gamma")
    ]
    with enable_x64(True):
        risks = np.asarray(
            expected_risks(group(design, d), tuple(rates), last=sizes.last)
        )
    which = [READINGS.index(row.reading) for row in rows]
    return risks[sizes.first :, which, np.arange(len(rows))].T


def simulate(
    design: Design, sizes: Sizes, rows: list[Row], peaks: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Train all rows and schedules on the same samples, all seeds at once.

    Returns:
      Excess risks of the rows, shape (rows, horizons, seeds), and of the schedules,
      shape (2, horizons, seeds).
    """
    horizons, seeds = sizes.horizons, sizes.seeds
    variances = jnp.asarray(design.variances(sizes.d), jnp.float32)
    deviations = jnp.sqrt(variances)
    true = jnp.asarray(np.sqrt(design.source(sizes.d) / variances), jnp.float32)
    by_reading = {x: [row for row in rows if row.reading == x] for x in READINGS}

    def optimizer(reading: str) -> optax.GradientTransformationExtraArgs:
        fields = ("peak", "alpha", "gamma")
        own = [jnp.array([getattr(r, x) for r in by_reading[reading]]) for x in fields]
        sgd = optax.scale_by_schedule(lambda t: -decayed(t, *own)[:, None])
        if reading == LAST:
            return optax.chain(sgd)
        return optax.chain(sgd, average_iterates(WEIGHTINGS[reading]))

    optimizers = {reading: optimizer(reading) for reading in READINGS}

    def descend(w: Any, x: Any, y: Any) -> Any:
        return (w @ x - y)[:, None] * x

    def risk(w: jax.Array) -> jax.Array:
        return jnp.sum(variances * (w - true) ** 2, axis=-1)

    @partial(jax.jit, static_argnames="length", donate_argnums=0)
    def advance(carry: Any, plan: Any, keys: Any, first: Any, length: int) -> Any:
        """Take `length` steps; `plan` has the remaining schedules."""

        def step(key: jax.Array, carry: Any, t: jax.Array) -> Any:
            free, planned = carry
            z = jax.random.normal(jax.random.fold_in(key, t), (sizes.d + 1,))
            x = deviations * z[1:]
            y = x @ true + z[0]
            new = {}
            for reading, (w, state) in free.items():
                tx = optimizers[reading]
                updates, state = tx.update(descend(w, x, y), state, w)
                new[reading] = optax.apply_updates(w, updates), state
            rate = scheduled(t, *plan)[:, None]
            return (new, planned - rate * descend(planned, x, y)), None

        def run(carry: Any, key: jax.Array) -> Any:
            steps = first + jnp.arange(length)
            return jax.lax.scan(partial(step, key), carry, steps)[0]

        return jax.vmap(run)(carry, keys)

    @jax.jit
    @jax.vmap
    def read(free: Any) -> dict[str, jax.Array]:
        risks = {}
        for reading, (w, state) in free.items():
            average = w if reading == LAST else averaged_params(state, w)
            risks[reading] = risk(average)
        return risks

    def initial(key: jax.Array) -> Any:
        starts = {x: jnp.zeros((len(r), sizes.d)) for x, r in by_reading.items()}
        free = {x: (w, optimizers[x].init(w)) for x, w in starts.items()}
        return free, jnp.zeros((peaks.size, sizes.d))

    # The schedules that end first come first: they are dropped as they end.
    plan = [
        jnp.asarray(np.ravel(x, order="F"))
        for x in np.broadcast_arrays(peaks, horizons, np.array([[True], [False]]))
    ]
    keys = jax.random.split(jax.random.key(0), seeds)
    carry = jax.vmap(initial)(keys)
    measured = np.empty((len(rows), len(horizons), seeds))
    at_end = np.empty((2, len(horizons), seeds))
    before = 0
    for j, horizon in enumerate(tqdm(horizons.tolist(), desc=str(design))):
        carry = advance(carry, plan, keys, before, length=horizon - before)
        free, planned = carry
        risks = {name: np.asarray(x).T for name, x in read(free).items()}
        for i, row in enumerate(rows):
            n = by_reading[row.reading].index(row)
            measured[i, j] = risks[row.reading][n]
        at_end[:, j] = np.asarray(risk(planned[:, :2])).T
        carry = free, planned[:, 2:]
        plan = [x[2:] for x in plan]
        before = horizon
    return measured, at_end


def compute(design: Design, sizes: Sizes, cache: Path) -> Result:
    """Tune and train a design, or read its results from the folder `cache`."""
    name = f"a{design.a:g}_b{design.b:g}_d{sizes.d}_{sizes.last}_{sizes.seeds}.npz"
    if (path := cache / name).exists():
        with np.load(path) as saved:
            fields = dict(saved)
        rows = [Row(*row) for row in json.loads(str(fields.pop("rows")))]
        return Result(rows, **fields)
    rows, expected = tune(design, sizes)
    peaks, expected_scheduled = tune_schedules(design, sizes)
    large = row_risks(design, 500 * sizes.d, sizes, rows)
    measured, scheduled = simulate(design, sizes, rows, peaks)
    result = Result(
        rows, expected, measured, peaks, expected_scheduled, scheduled, large
    )
    cache.mkdir(parents=True, exist_ok=True)
    np.savez(path, **(result._asdict() | {"rows": json.dumps(rows)}))
    return result


def slopes(horizons: np.ndarray, risks: np.ndarray) -> np.ndarray:
    """Return the exponents fitted to the longest horizons.

    Args:
      horizons: shape (horizons,).
      risks: shape (horizons,) or (horizons, seeds).
    """
    x, y = np.log(horizons[-FITTED:]), np.log(risks[-FITTED:])
    return np.asarray(np.polyfit(x, y, 1)[0])


def mean_and_error(values: np.ndarray, form: str) -> str:
    """Format the mean ± its standard error over the seeds, without line breaks."""
    error = values.std(ddof=1) / np.sqrt(len(values))
    return f"{values.mean():{form}}\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}{error:{form}}"


def envelope(result: Result) -> np.ndarray:
    """Return the lower of the schedules' mean excess risks, shape (horizons,)."""
    return np.asarray(result.measured_scheduled.mean(axis=-1).min(axis=0))


def gaps(result: Result) -> np.ndarray:
    """Return mean excess risks relative to the envelope, shape (rows, horizons)."""
    return np.asarray(result.measured.mean(axis=-1) / envelope(result))


def expected_gaps(result: Result) -> np.ndarray:
    """Return the same for the expected excess risks."""
    return np.asarray(result.expected / result.expected_scheduled.min(axis=0))


def deviations(result: Result) -> np.ndarray:
    """Return measured minus expected mean risks, in standard errors."""
    measured = np.concatenate([result.measured, result.measured_scheduled])
    expected = np.concatenate([result.expected, result.expected_scheduled])
    error = measured.std(axis=-1, ddof=1) / np.sqrt(measured.shape[-1])
    return np.asarray((measured.mean(axis=-1) - expected) / error)


def exponent_table(design: Design, sizes: Sizes, result: Result) -> str:
    """Format the tuned peaks, the excess risks at the end and the exponents."""
    horizons, trace = sizes.horizons, design.variances(sizes.d).sum()
    rows = []
    for row, risks, expected, large in zip(
        result.rows, result.measured, result.expected, result.large, strict=True
    ):
        predicted = design.exponent(row.gamma, row.reading)
        rows.append(
            [
                row.schedule,
                row.reading,
                f"{row.peak * trace:.2g}",
                f"{row.alpha:g}" if row.schedule == ROOT else "",
                mean_and_error(risks[-1], ".5f"),
                mean_and_error(slopes(horizons, risks), ".3f"),
                f"{slopes(horizons, expected):.3f}",
                f"{slopes(horizons, large):.3f}",
                "" if row.reading == EMA else f"{predicted:.3f}",
            ]
        )
    for name, peaks, risks, expected in zip(
        SCHEDULES,
        result.peaks,
        result.measured_scheduled,
        result.expected_scheduled,
        strict=True,
    ):
        rows.append(
            [
                name,
                "a run per horizon",
                f"{peaks[0] * trace:.2g} to {peaks[-1] * trace:.2g}",
                "",
                mean_and_error(risks[-1], ".5f"),
                mean_and_error(slopes(horizons, risks), ".3f"),
                f"{slopes(horizons, expected):.3f}",
                "",
                f"{design.optimum:.3f}",
            ]
        )
    header = ["learning rate", "read as", "peak", "alpha", "excess risk", "exponent"]
    header += ["expected", f"d = {500 * sizes.d:,}", "predicted"]
    return report.table(header, rows)


def gap_table(
    sizes: Sizes, result: Result, relative: np.ndarray, scheduled: np.ndarray
) -> str:
    """Format the excess risks relative to the envelope at every horizon.

    Args:
      sizes: of the study.
      result: of the design.
      relative: to the envelope, shape (rows, horizons).
      scheduled: excess risks of the schedules, shape (2, horizons).
    """
    rows = [
        [row.schedule, row.reading, *(f"{gap:.2f}" for gap in line)]
        for row, line in zip(result.rows, relative, strict=True)
    ]
    best = [("cosine", "decay")[n] for n in scheduled.argmin(axis=0)]
    rows.append(["envelope", "risk", *(f"{x:.4f}" for x in scheduled.min(axis=0))])
    rows.append(["", "best", *best])
    exponents = range(sizes.first, sizes.last + 1)
    return report.table(
        ["learning rate", "read as", *(f"2^{n}" for n in exponents)], rows
    )


def cost_table(sizes: Sizes) -> str:
    """Format the steps that an excess risk at every horizon costs."""
    last, total = int(sizes.horizons[-1]), int(sizes.horizons.sum())
    steps = {
        "one run without a horizon": last,
        "stable, then decay, resumed from one run": last + round(FRACTION * total),
        "a schedule with a run per horizon": total,
    }
    rows = [[name, f"{n:,}", f"{n / last:.2f}"] for name, n in steps.items()]
    return report.table(["", "steps", "relative"], rows)


COLORS = {CONSTANT: "C4", ROOT: "C2"}  # t^-gamma: C1
STYLES = {LAST: ":", UNIFORM: "--", POLYNOMIAL: "-"}
TICKS = 0.5, 0.7, 1, 1.5, 2, 3, 5, 8


def drawn_rows(design: Design, result: Result) -> list[tuple[int, str, str]]:
    """Return index, colour and line style of the rows in the picture."""
    power = f"t^-{design.gamma or 0.5:g}"
    colors = COLORS | {power: "C1"}
    return [
        (n, colors[row.schedule], STYLES[row.reading])
        for n, row in enumerate(result.rows)
        if row.schedule in colors and row.reading in STYLES
    ]


def draw_design(axes: Any, design: Design, sizes: Sizes, result: Result) -> None:
    """Draw the excess risks of a design, and the same relative to the envelope."""
    left, right = axes
    horizons, best, relative = sizes.horizons, envelope(result), gaps(result)
    left.plot(horizons, best, "k-", lw=4, alpha=0.25)
    right.axhline(1, color="k", lw=4, alpha=0.25)
    for n, color, style in drawn_rows(design, result):
        left.plot(horizons, result.measured[n].mean(axis=-1), style, color=color)
        right.plot(horizons, relative[n], style, color=color)
    slope = design.optimum
    line = 0.55 * best[-1] * (horizons / horizons[-1]) ** slope
    left.plot(horizons, line, color="k", lw=0.8)
    left.text(0.04, 0.06, f"predicted slope {slope:.2f}", transform=left.transAxes)
    title = f"a = {design.a:g}, b = {design.b:g}"
    left.set(xscale="log", yscale="log", ylabel="excess risk", title=title)
    left.yaxis.set_minor_formatter(NullFormatter())
    left.set_ylim(top=10 ** np.ceil(np.log10(left.get_ylim()[1])))
    right.set(xscale="log", yscale="log", ylabel="relative to the envelope")
    right.set_title(title)
    right.set_yticks(TICKS, [f"{tick:g}" for tick in TICKS])
    right.minorticks_off()
    # Label the schedules at their last iterates, at least 8 % of the axis apart.
    ends = sorted(
        (relative[n, -1], result.rows[n].schedule, color)
        for n, color, style in drawn_rows(design, result)
        if style == STYLES[LAST]
    )
    height = -np.inf
    for y, name, color in ends:
        place = right.transAxes.inverted().transform(right.transData.transform((1, y)))
        height = max(place[1], height + 0.08)
        right.text(
            1.01, height, name, color=color, va="center", transform=right.transAxes
        )


def draw(results: dict[Design, Result], sizes: Sizes, output: Path) -> None:
    """Draw every design."""
    plt.style.use(report.STYLE)
    shape = len(results), 2
    size = 8, 3 * len(results)
    figure, axes = plt.subplots(*shape, figsize=size, sharex=True, squeeze=False)
    for row, (design, result) in zip(axes, results.items(), strict=True):
        draw_design(row, design, sizes, result)
    for axis in axes[-1]:
        axis.set_xlabel("horizon (steps)")
    styles = [Line2D([], [], color="0.3", ls=style) for style in STYLES.values()]
    styles.append(Line2D([], [], color="k", lw=4, alpha=0.25))
    names = [*STYLES, "envelope: best schedule, a run per horizon"]
    figure.legend(styles, names, loc="outside upper center", ncols=4)
    figure.savefig(output)
    plt.close(figure)


PAGE = """\
# Learning rates without a horizon

Linear regression in one pass, batches of one sample, d = {d:,} parameters that start \
at zero, noise of variance 1. Input i has the variance i^-a. Its source, the variance \
times the squared true parameter, is i^-b. *Excess risk*: the expected squared error \
of a prediction, less the noise. {seeds} seeds; horizons 2^{first} to 2^{last}.

**Without a horizon.** One run serves all horizons. It is read as its last iterate, \
its uniform average, `polynomial_weighting(3)`, or an EMA of decay 0.999. "1/sqrt(t), \
alpha" is sqrt(alpha / (t + alpha)).

**With a horizon.** The cosine, and the stable learning rate that decays linearly over \
the last 20 %, train once for each horizon, each time with its own peak. They are read \
at their last iterate. The lower of their two means is the *envelope*. The regression \
needs no warm-up.

**Tuning.** The expected excess risk follows an exact recursion, so tuning needs no \
seeds. Peaks come from a grid with a factor of sqrt(2) that reaches divergence, alpha \
from {alphas}. A run without a horizon has one peak for all horizons: that of the \
least geometric mean of the expected excess risks. Peaks are in units of 1 / (sum of \
the variances). Next to divergence, rare runs raise the expectation, and the mean of a \
few seeds is lower.

**Exponents.** All are fitted to the {fitted} longest horizons. *Exponent*: the mean ± \
standard error of the fits to each seed. *Expected*: the fit to the expected excess \
risk. *d = {large:,}*: the same with {large:,} parameters. *Predicted*: the limit for \
many steps and parameters, -min((1 - gamma)(b - 1)/a, v) for a learning rate of \
t^-gamma, with v = 1 - (1 - gamma)/a for averages and v = gamma for the last iterate. \
At gamma = max(1 - a/b, 0) an average has -(b - 1)/max(a, b). These are heuristic \
derivations.

{sections}
## Cost

Steps for the excess risk at every horizon, with known peaks. A stable learning rate \
can resume each decay from one run, but then all horizons share its peak.

{cost}

![Excess risk by horizon, and relative to the envelope](horizon_free.png)
"""

SECTION = """\
## a = {a:g}, b = {b:g}: gamma = {gamma:g}, predicted exponent {optimum:.3f}

{exponents}

Mean excess risk relative to the envelope (below 1: better than the best schedule \
with a run for that horizon):

{gaps}

The same in expectation, without the noise of {seeds} seeds:

{expected_gaps}

The {count} means over the seeds differ from their expectations by {rms:.1f} standard \
errors (root mean square), and by at most {most:.1f}. The rows share their samples.

"""


def main(argv: Sequence[str] | None = None) -> dict[Design, Result]:
    """Tune, train, and write the tables and the picture."""
    parser = command_line.report_parser("Learning rates without a horizon.")
    parser.add_argument(
        "--cache",
        type=Path,
        default=Path("out/horizon_free"),
        help="folder for the results of each design (default: %(default)s)",
    )
    options = parser.parse_args(argv)
    sizes = QUICK if options.quick else FULL
    results = {d: compute(d, sizes, options.cache) for d in map(Design._make, DESIGNS)}
    sections = []
    for design, result in results.items():
        distance = deviations(result)
        sections.append(
            SECTION.format(
                **design._asdict(),
                seeds=sizes.seeds,
                gamma=design.gamma,
                optimum=design.optimum,
                exponents=exponent_table(design, sizes, result),
                gaps=gap_table(
                    sizes, result, gaps(result), result.measured_scheduled.mean(-1)
                ),
                expected_gaps=gap_table(
                    sizes, result, expected_gaps(result), result.expected_scheduled
                ),
                count=distance.size,
                rms=np.sqrt(np.mean(distance**2)),
                most=np.abs(distance).max(),
            )
        )
    page = PAGE.format(
        **sizes._asdict(),
        alphas=", ".join(f"{shift:g}" for shift in SHIFTS),
        fitted=FITTED,
        large=500 * sizes.d,
        sections="".join(sections).rstrip() + "\n",
        cost=cost_table(sizes),
    )
    report.write("studies.horizon_free", page, options.output)
    draw(results, sizes, options.output / "horizon_free.png")
    return results


if __name__ == "__main__":
    main()
