# SPDX-License-Identifier: Apache-2.0
"""A language model without a horizon: averaged runs compared with tuned schedules.

    python -m studies.horizon_free_text

Trains the transformer of `examples/after_the_run.py`. A run without a horizon has a
constant learning rate, or one that decays as 1/sqrt(t). It is read at every horizon: as
its last iterate, as averages kept by the optimizer, and as the best mean of its last
steps. A cosine and a warmup-stable-decay schedule train for one horizon each.

Every row has its own peak learning rate, chosen on the validation text with one seed.
The other seeds measure the test loss. All runs of a seed begin with the same weights
and see the same batches.

Runs whose losses are in the folder of the runs are not repeated, so a study that was
interrupted resumes. Use another folder for another text.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx
from tqdm import tqdm

from asgd_optax import (
    AverageProfile,
    average_iterates,
    combine_averages,
    gamma_from_width,
    polynomial_weighting,
    posthoc_coefficients,
)
from examples import after_the_run as lesson
from studies import after_the_run
from tools import report

CONSTANT, ROOT = "constant", "1/sqrt(t)"
COSINE, STABLE = "cosine to 0", "warmup-stable-decay"
LAST, POLYNOMIAL, BEST = "last iterate", "polynomial, gamma 3", "best mean, afterwards"
WIDE, NARROW = "power, width 0.10", "power, width 0.05"
READINGS = LAST, POLYNOMIAL, WIDE, NARROW, BEST
# The averages in the optimizer's chain, by where they are in its state.
KEPT = {POLYNOMIAL: (1,), WIDE: (0, 4), NARROW: (0, 3)}
UNIFORM = 0, 2
ALPHAS = 100, 400  # steps
START = 3e-3  # the first peak learning rate that is tried
TUNING = 0  # the seed that chooses the peaks; the results have the seeds after it
# Lengths of the means, as fractions of the run.
WINDOWS = (0.05, 0.1, 0.15, 0.2, 0.3, 0.5)


class Sizes(NamedTuple):
    """Sizes of the study.

    Attributes:
      horizons: steps after which a run is read.
      tuned: the horizon for which all peaks are chosen.
    """

    horizons: tuple[int, ...]
    tuned: int


FULL, QUICK = Sizes((250, 500, 1000), 500), Sizes((125, 250), 125)


class Row(NamedTuple):
    """A kind of learning rate, and how its run is read."""

    kind: str
    reading: str


ROWS = [
    *(Row(kind, reading) for kind in (CONSTANT, ROOT) for reading in READINGS),
    Row(COSINE, LAST),
    Row(STABLE, LAST),
]


class Rate(NamedTuple):
    """A learning rate, with the warm-up of the example.

    Attributes:
      kind: CONSTANT, ROOT or COSINE.
      peak: the learning rate after the warm-up.
      alpha: of ROOT, peak * sqrt(alpha / (t + alpha)), t steps after the warm-up.
      horizon: of COSINE.
    """

    kind: str
    peak: float
    alpha: int = 0
    horizon: int = 0

    def __call__(self, n: jax.typing.ArrayLike) -> jax.typing.ArrayLike:
        """Return the learning rate after n steps."""
        warmup = lesson.WARMUP
        if self.kind == COSINE:
            length = self.horizon
            return optax.warmup_cosine_decay_schedule(0.0, self.peak, warmup, length)(n)
        rate = optax.warmup_constant_schedule(0.0, self.peak, warmup)(n)
        if self.kind == CONSTANT:
            return rate
        t = jnp.maximum(jnp.asarray(n) - warmup, 0)
        return rate * jnp.sqrt(self.alpha / (t + self.alpha))

    def cooldown(self, horizon: int) -> optax.Schedule:
        """Let this learning rate fall linearly to zero before the horizon."""
        length = round(after_the_run.COOLDOWN * horizon)
        down = optax.linear_schedule(self.peak, 0.0, length)
        return optax.join_schedules([self, down], [horizon - length])


Losses = dict[str, dict[str, float]]  # by reading, then by step


def create(schedule: optax.Schedule, seed: int) -> tuple[Any, Any]:
    """Create the example's model and optimizer, with one more average in the chain."""
    model, optimizer = lesson.create(schedule, seed)
    last = average_iterates(polynomial_weighting(3))
    tx = optax.chain(optimizer.tx, last)
    return model, nnx.Optimizer(model, tx, wrt=nnx.Param)


class Trainer:
    """Trains, and keeps the losses of finished runs in a folder."""

    def __init__(
        self, texts: Sequence[np.ndarray], seed: int, sizes: Sizes, folder: Path
    ) -> None:
        training, validation, test = texts
        self.text = training
        self.seed = seed
        self.longest = max(sizes.horizons)
        self.folder = folder
        self.found: dict[Rate, Losses] = {}
        self.score = after_the_run.scorer(validation, test)
        self.initial = nnx.state(create(lambda _: 0.0, seed))

        @jax.jit
        def advance(state: Any, rates: jax.Array, batches: jax.Array) -> Any:
            graphdef = nnx.graphdef(create(lambda n: rates[n], seed))

            def step(state: Any, batch: jax.Array) -> tuple[Any, None]:
                model, optimizer = trained = nnx.merge(graphdef, state)
                lesson.train_step(model, optimizer, batch)
                return nnx.state(trained), None

            return jax.lax.scan(step, state, batches)[0]

        self.advance = advance

    def train(
        self,
        rate: optax.Schedule,
        last: int,
        first: int = 0,
        state: Any = None,
        visit: Callable[[int, Any], None] = lambda n, state: None,
    ) -> Any:
        """Train from step `first` to `last`, and visit the state between chunks."""
        rates = jnp.array([rate(n) for n in range(self.longest)])
        state = self.initial if state is None else state
        for n in tqdm(range(first, last, lesson.EVERY), leave=False):
            steps = range(n + 1, n + 1 + lesson.EVERY)
            batches = [lesson.draw_batch(self.text, (self.seed, n)) for n in steps]
            state = self.advance(state, rates, jnp.stack(batches))
            visit(steps[-1], state)
        return state

    def losses(
        self,
        rate: Rate,
        ends: Sequence[int],
        readings: Sequence[str],
        cooldowns: Sequence[int] = (),
        *,
        validate: bool = False,
    ) -> Losses:
        """Train once, and read the run at these steps.

        Args:
          rate: the learning rate.
          ends: steps after which the run is read.
          readings: how it is read.
          cooldowns: horizons to which a cooldown leads from this run; their losses are
            read as STABLE.
          validate: whether to measure losses on the validation text, not the test text.
        """
        kind = "".join(filter(str.isalnum, rate.kind))
        name = "_".join(map(str, [kind, *rate[1:]]))
        path = self.folder / f"seed_{self.seed}" / f"{name}.json"
        wanted = {*readings, *([STABLE] if cooldowns else [])}
        if path.exists():
            self.found[rate] = json.loads(path.read_text())
            if wanted <= self.found[rate].keys():
                return self.found[rate]
        losses: Losses = {reading: {} for reading in [*wanted, "window"]}
        uniform: dict[int, Any] = {}
        length = after_the_run.COOLDOWN
        branches = {n - round(length * n): n for n in cooldowns}

        def visit(n: int, state: Any) -> None:
            uniform[n] = jax.device_get(average_at(state, UNIFORM))
            if n in ends:
                for reading in readings:
                    if reading == BEST:
                        window = self.best_window(uniform, n)
                        losses["window"][str(n)] = window
                        params = mean(uniform, n - window, n)
                    elif reading == LAST:
                        params = state[0]
                    else:
                        params = average_at(state, KEPT[reading])
                    losses[reading][str(n)] = self.score(params, validate=validate)
            if n in branches:
                end = branches[n]
                final = self.train(rate.cooldown(end), end, n, state)
                loss = self.score(final[0], validate=validate)
                losses[STABLE][str(end)] = loss

        self.train(rate, max([*ends, *branches]), visit=visit)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(losses))
        self.found[rate] = losses
        return losses

    def best_window(self, uniform: Mapping[int, Any], end: int) -> int:
        """Choose the length of the mean up to `end` by the validation text."""
        every = lesson.EVERY
        lengths = {max(round(share * end / every), 1) * every for share in WINDOWS}

        def measure(length: int) -> float:
            return self.score(mean(uniform, end - length, end), validate=True)

        return min(sorted(lengths), key=measure)


def average_at(state: Any, place: Sequence[int]) -> Any:
    """Return an average in the optimizer's state."""
    found = state[1]["opt_state"]
    for key in place:
        found = found[key]
    return found["average"]


def mean(uniform: Mapping[int, Any], start: int, end: int) -> Any:
    """Compute the mean of the iterates after `start` from two uniform averages."""
    steps = [n for n in (start, end) if n]
    target = AverageProfile(end, start=start)
    fit = posthoc_coefficients([AverageProfile(n) for n in steps], target)
    return combine_averages([uniform[n] for n in steps], fit.coefficients)


def climb(measure: Callable[[float], float], start: float) -> float:
    """Find a minimum in steps of a factor of 2; NaN counts as infinite."""

    def safe(x: float) -> float:
        return math.inf if math.isnan(loss := measure(x)) else loss

    factor = 2.0 if safe(2 * start) < safe(start) else 0.5
    while safe(factor * start) < safe(start):
        start *= factor
    return start


def refine(measure: Callable[[float], float], best: float) -> float:
    """Return the minimum of a parabola through three points, to a factor of sqrt(2).

    The points are `best` and its neighbours on the grid of powers of 2.
    """
    low, middle, high = (measure(best * factor) for factor in (0.5, 1, 2))
    vertex = (low - high) / (2 * (low - 2 * middle + high))
    halves = round(2 * vertex) if math.isfinite(vertex) else 0
    return float(f"{best * 2 ** (halves / 2):.3g}")


def tune(trainer: Trainer, row: Row, horizon: int) -> Rate:
    """Choose the learning rate of a row by its loss on the validation text."""

    def measure(rate: Rate) -> float:
        if row.kind == COSINE:
            found = trainer.losses(rate, (horizon,), (LAST,), validate=True)
        else:
            branches = (horizon,) if rate.kind == CONSTANT else ()
            found = trainer.losses(rate, (horizon,), READINGS, branches, validate=True)
        reading = STABLE if row.kind == STABLE else row.reading
        return found[reading][str(horizon)]

    def best(rate: Rate) -> Rate:
        peak = climb(lambda x: measure(rate._replace(peak=x)), rate.peak)
        return rate._replace(peak=peak)

    if row.kind == COSINE:
        chosen = best(Rate(COSINE, 2 * START, 0, horizon))
    elif row.kind == ROOT:
        start, rates = START, []
        for alpha in sorted(ALPHAS, reverse=True):
            rates.append(best(Rate(ROOT, start, alpha)))
            start = rates[-1].peak
        chosen = min(rates, key=measure)
    else:
        chosen = best(Rate(CONSTANT, START))
    peak = refine(lambda x: measure(chosen._replace(peak=x)), chosen.peak)
    return chosen._replace(peak=peak)


class Result(NamedTuple):
    """Test losses of a seed by row and horizon, and the lengths of its best means."""

    rows: dict[Row, dict[int, float]]
    windows: dict[str, dict[int, float]]


def measure_seed(
    trainer: Trainer, tuned: Mapping[Row, Rate], horizons: Sequence[int]
) -> Result:
    """Train a seed at the chosen learning rates."""
    result = Result({}, {})
    for rate in dict.fromkeys(tuned.values()):
        rows = [row for row in tuned if tuned[row] == rate]
        if rate.kind == COSINE:
            result.rows[rows[0]] = {
                n: trainer.losses(rate._replace(horizon=n), (n,), (LAST,))[LAST][str(n)]
                for n in horizons
            }
            continue
        readings = [row.reading for row in rows if row.kind != STABLE]
        ends = horizons if readings else ()
        cooldowns = horizons if Row(STABLE, LAST) in rows else ()
        found = trainer.losses(rate, ends, readings, cooldowns)
        for row in rows:
            losses = found[STABLE if row.kind == STABLE else row.reading]
            result.rows[row] = {n: losses[str(n)] for n in horizons}
        if BEST in readings:
            result.windows[rate.kind] = {n: found["window"][str(n)] for n in horizons}
    return result


PAGE = """\
# A language model without a horizon

The transformer and the text of [one averaged run compared with \
schedules](after_the_run.md): {parameters} parameters, AdamW (b2 0.95, weight decay \
0.1), clipped gradients, batches of {batch} pieces of {context} bytes, a warm-up of \
{warmup} steps. Test losses in nats per byte, {seeds}. All runs of a seed begin with \
the same weights and see the same batches.

**Without a horizon.** One run serves all horizons. The learning rate is constant, or \
peak · sqrt(alpha / (t + alpha)), t steps after the warm-up. The run is read as its \
last iterate, as `polynomial_weighting(3)`, and as power-function averages of relative \
width 0.10 and 0.05 (gamma {wide:.1f} and {narrow:.1f}). *Best mean*: the mean of the \
last {windows} % of the steps; the validation text chooses the length at each horizon.

**With a horizon.** The cosine trains once for each horizon. Warmup-stable-decay falls \
linearly over the last {percent:g} %; it resumes from a constant run of the same peak.

**Tuning.** Each row has its own peak, chosen with seed {tuning} by the validation \
loss after {tuned} steps and used at all horizons. The tuning runs form a grid with a \
factor of 2, extended until both neighbours of the best peak are worse. A parabola \
through these three losses gives the peak to a factor of sqrt(2). Alpha is {alphas}.

## Test loss

{losses}

Differences of each seed from the better schedule of the same horizon, {seeds}. Below \
zero, the run is better than both schedules:

{differences}

![Test losses by horizon, and the differences](horizon_free_text.png)

Lengths of the best means in steps, by seed:

{lengths}

Steps per seed: {once:,} for a run without a horizon, {cosine:,} for the cosine at \
all horizons, {stable:,} for warmup-stable-decay.

## Validation loss of the tuning runs

{tuning_table}
"""


def format_page(
    trainer: Trainer, tuned: Mapping[Row, Rate], results: Sequence[Result], sizes: Sizes
) -> str:
    horizons = sizes.horizons
    header = ["learning rate", "read as", "peak", "alpha"]
    columns = [*header, *(f"{n:,} steps" for n in horizons)]
    losses, differences = [], []
    for row in ROWS:
        rate = tuned[row]
        cells = [*row, f"{rate.peak:g}", str(rate.alpha or "")]
        columns_of = losses_of(results, row, horizons).T
        losses.append(cells + [spread(column) for column in columns_of])
        above = excess(results, row, horizons).T
        differences.append(cells[:2] + [spread(column, "+") for column in above])
    lengths = [
        [
            kind,
            *(
                " / ".join(str(result.windows[kind][n]) for result in results)
                for n in horizons
            ),
        ]
        for kind in (CONSTANT, ROOT)
    ]
    tuning = [
        [
            rate.kind,
            f"{rate.peak:g}",
            str(rate.alpha or ""),
            *(
                f"{found[reading][str(sizes.tuned)]:.3f}" if reading in found else ""
                for reading in (*READINGS, STABLE)
            ),
        ]
        for rate, found in sorted(trainer.found.items(), key=by_kind)
    ]
    last = [round(after_the_run.COOLDOWN * n) for n in horizons]
    parameters = jax.tree.leaves(trainer.initial[0])
    return PAGE.format(
        parameters=f"{sum(leaf.size for leaf in parameters):,}",
        batch=lesson.BATCH_SIZE,
        context=lesson.CONTEXT,
        warmup=lesson.WARMUP,
        seeds=f"mean ± standard deviation over {len(results)} seeds"
        if len(results) > 1
        else "one seed",
        wide=gamma_from_width(0.1),
        narrow=gamma_from_width(0.05),
        windows=", ".join(f"{100 * share:g}" for share in WINDOWS),
        percent=100 * after_the_run.COOLDOWN,
        tuning=TUNING,
        tuned=sizes.tuned,
        alphas=" or ".join(map(str, ALPHAS)),
        losses=report.table(columns, losses),
        differences=report.table(columns[:2] + columns[4:], differences),
        lengths=report.table(["learning rate", *columns[4:]], lengths),
        once=max(horizons),
        cosine=sum(horizons),
        stable=max(horizons) - last[-1] + sum(last),
        tuning_table=report.table(
            ["learning rate", "peak", "alpha", *READINGS, "decay over the end"], tuning
        ),
    )


def spread(values: np.ndarray, sign: str = "") -> str:
    """Format the mean ± the standard deviation, which one seed does not have."""
    if not values.any():
        return "0"
    mean = f"{values.mean():{sign}.3f}"
    if len(values) == 1:
        return mean
    # Without line breaks.
    return f"{mean}\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}{values.std(ddof=1):.3f}"


def by_kind(item: tuple[Rate, Losses]) -> tuple[int, int, float]:
    rate, _ = item
    return [CONSTANT, ROOT, COSINE].index(rate.kind), rate.alpha, rate.peak


def losses_of(
    results: Sequence[Result], row: Row, horizons: Sequence[int]
) -> np.ndarray:
    """Return the test losses of a row, by seed and horizon."""
    return np.array([[result.rows[row][n] for n in horizons] for result in results])


def excess(results: Sequence[Result], row: Row, horizons: Sequence[int]) -> np.ndarray:
    """Return the losses of a row less those of the schedule with the lower mean."""
    schedules = np.array([losses_of(results, row, horizons) for row in ROWS[-2:]])
    best = schedules.mean(1).argmin(0)
    return (
        losses_of(results, row, horizons) - schedules[best, :, range(len(horizons))].T
    )


COLORS = {LAST: "C0", POLYNOMIAL: "C1", WIDE: "C1", NARROW: "C1", BEST: "C4"}
STYLES = {WIDE: "--", NARROW: ":"}


def draw(results: Sequence[Result], sizes: Sizes, output: Path) -> None:
    """Draw the losses, and their differences from the better schedule."""
    plt.style.use(report.STYLE)
    figure, axes = plt.subplots(2, 2, figsize=(8, 6.4), sharex=True, sharey="col")
    steps = sizes.horizons
    for (left, right), kind in zip(axes, (CONSTANT, ROOT), strict=True):
        ends = []
        for row in ROWS:
            if row.kind in (COSINE, STABLE):
                color, style, name = "C2" if row.kind == COSINE else "C5", "s", row.kind
            elif row.kind == kind:
                color, name = COLORS[row.reading], row.reading
                style = ".-" if row.reading not in STYLES else "." + STYLES[row.reading]
            else:
                continue
            over = excess(results, row, steps).mean(0)
            left.plot(steps, losses_of(results, row, steps).mean(0), style, color=color)
            right.plot(steps, over, style, color=color)
            ends.append((over[-1], name, color))
        left.set(title=f"learning rate: {kind}", xscale="log", yscale="log")
        left.set(ylabel="test loss (nats per byte)")
        left.yaxis.set_major_formatter("{x:g}")
        left.yaxis.set_minor_formatter("{x:g}")
        right.set(title="above the better schedule", ylabel="difference")
        left.set_xticks(steps, [f"{n:,}" for n in steps])
        left.set_xticks([], minor=True)
        label(right, ends)
    for axis in axes[-1]:
        axis.set_xlabel("steps")
    figure.savefig(output)
    plt.close(figure)


def label(axes: Any, ends: Sequence[tuple[float, str, str]]) -> None:
    """Label curves at their last points, at least 8 % of the axis apart."""
    axes.figure.canvas.draw()
    to_axes = axes.transData + axes.transAxes.inverted()
    ends = sorted(ends)
    heights = [to_axes.transform((1, y))[1] for y, _, _ in ends]
    for n in range(1, len(heights)):
        heights[n] = max(heights[n], heights[n - 1] + 0.08)
    highest = 1.0
    for n in reversed(range(len(heights))):
        heights[n] = min(heights[n], highest)
        highest = heights[n] - 0.08
    for (_, name, color), height in zip(ends, heights, strict=True):
        axes.text(
            1.02, height, name, color=color, va="center", transform=axes.transAxes
        )


def main(argv: Sequence[str] | None = None) -> None:
    """Train what is missing, measure, and write the tables and the picture."""
    parser = after_the_run.parser_of(
        "horizon_free_text",
        "Averaged runs of a language model, schedules.",
        "seeds of the results",
        "the losses of finished runs",
    )
    options = parser.parse_args(argv)
    sizes, runs = QUICK if options.quick else FULL, after_the_run.runs_of(options)
    texts = lesson.load(options.text)
    trainer = Trainer(texts, TUNING, sizes, runs)
    tuned = {row: tune(trainer, row, sizes.tuned) for row in ROWS}
    results: list[Result] = []
    for seed in range(TUNING + 1, TUNING + 1 + options.seeds):
        here = Trainer(texts, seed, sizes, runs)
        results.append(measure_seed(here, tuned, sizes.horizons))
        # A study that is interrupted leaves the report of the finished seeds.
        page = format_page(trainer, tuned, results, sizes)
        report.write("studies.horizon_free_text", page, options.output)
        draw(results, sizes, options.output / "horizon_free_text.png")


if __name__ == "__main__":
    main()
