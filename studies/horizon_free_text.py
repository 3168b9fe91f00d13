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

import argparse
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
    polynomial_weighting,
    posthoc_coefficients,
)
from examples import after_the_run as lesson
from studies import after_the_run
from tools import command_line, report

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
WINDOWS = 0.05, 0.1, 0.15, 0.2, 0.3, 0.5  # lengths of the means, as fractions of the run


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
        self.score = after_the_run.scorer(validation, test)
        self.initial = nnx.state(create(lambda _: 0.0, seed))

        @jax.jit
        def advance(state: Any, rates: jax.Array, batches: jax.Array) -> Any:
            graphdef = nnx.graphdef(create(lambda n: rates[n], seed))

            def step(state: Any, batch: jax.Array) -> tuple[Any, None]:
                trained = nnx.merge(graphdef, state)
                lesson.train_step(*trained, batch)
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
            found: Losses = json.loads(path.read_text())
            if wanted <= found.keys():
                return found
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
        return rate._replace(peak=climb(lambda x: measure(rate._replace(peak=x)), rate.peak))

    if row.kind == COSINE:
        return best(Rate(COSINE, 2 * START, 0, horizon))
    if row.kind != ROOT:
        return best(Rate(CONSTANT, START))
    rates: list[Rate] = []
    for alpha in sorted(ALPHAS, reverse=True):
        start = rates[-1].peak if rates else START
        rates.append(best(Rate(ROOT, start, alpha)))
    return min(rates, key=measure)


def results(
    trainer: Trainer, tuned: Mapping[Row, Rate], horizons: Sequence[int]
) -> tuple[dict[Row, dict[int, float]], dict[int, float]]:
    """Return a seed's test losses by row and horizon, and its best windows."""
    rows: dict[Row, dict[int, float]] = {row: {} for row in tuned}
    windows: dict[int, float] = {}
    for rate in dict.fromkeys(tuned.values()):
        here = [row for row in tuned if tuned[row] == rate]
        if rate.kind == COSINE:
            for n in horizons:
                found = trainer.losses(rate._replace(horizon=n), (n,), (LAST,))
                rows[here[0]][n] = found[LAST][str(n)]
            continue
        readings = [row.reading for row in here if row.kind != STABLE]
        cooldowns = horizons if Row(STABLE, LAST) in here else ()
        ends = horizons if readings else ()
        found = trainer.losses(rate, ends, readings, cooldowns)
        for row in here:
            losses = found[STABLE if row.kind == STABLE else row.reading]
            rows[row] = {n: losses[str(n)] for n in horizons}
        if Row(CONSTANT, BEST) in here:
            windows = {n: found["window"][str(n)] for n in horizons}
    return rows, windows


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command_line.report_parser("Averaged runs of a language model, schedules.")
    parser.add_argument(
        "--seeds",
        type=command_line.whole_number(1, 100),
        default=3,
        help="seeds of the results (default: %(default)s)",
    )
    parser.add_argument(
        "--text",
        type=Path,
        default=lesson.TEXT,
        help="folder of Python files to read (default: the standard library)",
    )
    parser.add_argument(
        "--runs",
        type=Path,
        default=Path("out/horizon_free_text"),
        help="folder for the losses of finished runs (default: %(default)s)",
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Train what is missing, measure, and write the tables and the picture."""
    options = parse(argv)
    sizes, runs = FULL, options.runs
    if options.quick:
        sizes, runs = QUICK, options.runs / "quick"
        for name, value in after_the_run.TINY.items():
            setattr(lesson, name, value)
    texts = lesson.load(options.text)
    trainer = Trainer(texts, TUNING, sizes, runs)
    tuned = {}
    for row in sorted(ROWS, key=lambda row: row.kind == ROOT):
        tuned[row] = tune(trainer, row, sizes.tuned)
        print(row, tuned[row], flush=True)
    for seed in range(1, options.seeds + 1):
        print(results(Trainer(texts, TUNING + seed, sizes, runs), tuned, sizes.horizons))


if __name__ == "__main__":
    main()
