# SPDX-License-Identifier: Apache-2.0
"""How often the intervals of random scaling hold the truth.

    python -m benchmarks.coverage --output benchmarks/coverage.md

The designs of Lee, Liao, Seo & Shin (2022): one pass of SGD over a stream of
independent observations, one a step, from zero. The d regressors are N(0, I), the
true coefficients d numbers evenly spaced from 0 to 1; the response is linear with
noise N(0, 1), or logistic. For quantile regression (2022b) the first regressor is an
intercept, and the noise that of the linear design. The step sizes are theirs, c t^-a,
and those of the rules in `docs/guides/confidence_intervals.md`: of one run, and of two
on the same observations, the second at twice the rate of the first, extrapolated.
Float32.

Every transformation in the chain is elementwise, so the replications are one more axis
of the parameters. All step sizes see the same data, and two trackers stand in one
chain, one that averages from the first iterate on and one after a burn-in.
"""

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import NormalDist
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from asgd_optax import averaged_params, confidence_interval, running_random_scaling
from benchmarks import command_line

CHUNK = 100  # observations drawn at once
BURN_IN = 100  # one observation of so many


class Design(NamedTuple):
    """A regression to learn from a stream; its coefficients are of shape (d,)."""

    name: str
    loss: Callable[[jax.Array, jax.Array], jax.Array]
    # Of a key and the regressors times the coefficients.
    response: Callable[[jax.Array, jax.Array], jax.Array]
    coefficients: np.ndarray
    # The diagonal of H^-1 S H^-1: n times the least asymptotic variance.
    bounds: np.ndarray
    # At least the second derivative, by the prediction, of the expected loss.
    curvature: float
    intercept: bool = False

    @property
    def title(self) -> str:
        return f"{self.name}, d = {len(self.coefficients)}"


class Rate(NamedTuple):
    """The step size min(cap, c t^-a) of the t-th update."""

    c: float
    a: float
    cap: float = np.inf

    def __call__(self, step: jax.Array) -> jax.Array:
        return jnp.minimum(self.cap, self.c * (1.0 + step) ** -self.a)


class Method(NamedTuple):
    """Runs on the same observations, and what the intervals are made of.

    Attributes:
      multiples: what each run multiplies the step size by.
      weights: of the runs' iterates in their sum.
    """

    multiples: tuple[int, ...]
    weights: tuple[int, ...]


ONE_RUN = Method((1,), (1,))
# Without what is proportional to the rate: Richardson's extrapolation.
EXTRAPOLATED = Method((1, 2), (2, -1))


class Row(NamedTuple):
    """What one step size and one start gave, over coefficients and replications.

    Attributes:
      coverage: share of the 95 % intervals that hold the truth.
      error: its Monte Carlo standard error. The coefficients of one replication
        depend on each other; it is that of the mean over independent replications.
      first: coverage of the first coefficient, the figure of the paper.
      length: mean length over the efficient one.
      rmse: root of the mean square of the average's errors, each over its bound.
      bias: root of the mean square, over coefficients, of the mean error over
        replications, each over its bound; from 1,000 replications of no bias about
        0.03.
    """

    coverage: float
    error: float
    first: float
    length: float
    rmse: float
    bias: float


def linear_loss(prediction: jax.Array, y: jax.Array) -> jax.Array:
    return (prediction - y) ** 2 / 2


def logistic_loss(prediction: jax.Array, y: jax.Array) -> jax.Array:
    return jax.nn.softplus(prediction) - y * prediction


def linear_response(key: jax.Array, signal: jax.Array) -> jax.Array:
    return signal + jax.random.normal(key, signal.shape)


def logistic_response(key: jax.Array, signal: jax.Array) -> jax.Array:
    return (signal > jax.random.logistic(key, signal.shape)).astype(signal.dtype)


def linear(d: int) -> Design:
    b = np.linspace(0, 1, d)
    return Design("linear", linear_loss, linear_response, b, np.ones(d), 1.0)


def logistic(d: int) -> Design:
    """With H = S = E[s'(b.x) x x'], s the logistic function.

    In the direction of b and across it they are integrals over one normal number u:
    E[s'(|b| u) u^2] and E[s'(|b| u)].
    """
    b = np.linspace(0, 1, d)
    u = np.linspace(-12, 12, 10_001)
    weights = np.exp(-(u**2) / 2) / np.cosh(np.linalg.norm(b) * u / 2) ** 2
    weights /= 4 * np.sum(np.exp(-(u**2) / 2))
    along, across = np.sum(weights * u**2), np.sum(weights)
    squares = b**2 / np.sum(b**2)
    bounds = squares / along + (1 - squares) / across
    return Design("logistic", logistic_loss, logistic_response, b, bounds, 1 / 4)


def quantile(tau: float, d: int) -> Design:
    """With H = f I and S = tau (1 - tau) I, f the noise's density at its quantile.

    The noise is shifted to a quantile of 0: all of it is in the intercept.
    """
    noise = NormalDist()
    shift = noise.inv_cdf(tau)

    def loss(prediction: jax.Array, y: jax.Array) -> jax.Array:
        """Its derivative is 1{y <= prediction} - tau."""
        above, below = tau * (y - prediction), (1 - tau) * (prediction - y)
        return jnp.where(y <= prediction, below, above)

    def response(key: jax.Array, signal: jax.Array) -> jax.Array:
        return linear_response(key, signal) - shift

    coefficients = np.linspace(0, 1, d)
    coefficients[0] += shift
    bounds = np.full(d, tau * (1 - tau) / noise.pdf(shift) ** 2)
    name = f"quantile {tau:g}"
    return Design(name, loss, response, coefficients, bounds, 0.5, intercept=True)


class Study(NamedTuple):
    """Step sizes tried on one stream of data, the rule's among them."""

    design: Design
    observations: int
    replications: int
    method: Method
    tried: Sequence[Rate]
    starts: Sequence[int]
    # The rule's own.
    rate: Rate
    start: int


def start(design: Design, n: int) -> int:
    return max(n // BURN_IN, 10 * len(design.coefficients))


def one_run(design: Design, n: int, replications: int, *others: Rate) -> Study:
    rate, last = Rate(0.5, 0.505, 1 / len(design.coefficients)), start(design, n)
    tried, starts = [*others, rate], sorted({0, n // BURN_IN, last})
    return Study(design, n, replications, ONE_RUN, tried, starts, rate, last)


def two_runs(design: Design, n: int, replications: int, *others: float) -> Study:
    """The rates are those of the first run, min(cap, c t^-a), the cap the rule's."""
    c = 1 / design.curvature
    rate, last = Rate(c, 0.505, c / (2 * len(design.coefficients))), start(design, n)
    tried = [rate._replace(c=each) for each in sorted({c, *others})]
    return Study(design, n, replications, EXTRAPOLATED, tried, [last], rate, last)


def sections(n: int, replications: int) -> list[list[Study]]:
    """What stands under each heading of the page."""
    few, fewer = replications // 4, replications // 10
    paper = [design(d) for design in (linear, logistic) for d in (5, 20)]
    quantiles = [quantile(tau, d) for tau in (0.5, 0.9) for d in (5, 20)]
    steps = [Rate(c, a) for a in (0.505, 0.667) for c in (0.5, 1.0)]
    return [
        [
            *[one_run(design, n, replications, *steps) for design in paper],
            # How far the logistic intervals get with more observations.
            *[one_run(logistic(d), 10 * n, few) for d in (5, 20)],
            # Where they fail, and do not show it: there is next to no curvature.
            one_run(logistic(200), n, replications // 16),
            one_run(linear(200), n, replications // 16),
            *[one_run(logistic(d), n // 10, replications) for d in (5, 20)],
        ],
        [
            *[two_runs(design, n, replications, 1, 2, 4) for design in paper],
            *[two_runs(logistic(d), 10 * n, few, 2) for d in (5, 20)],
            *[two_runs(logistic(d), n // 10, replications, 1, 2) for d in (5, 20)],
            *[two_runs(design(200), n, fewer) for design in (linear, logistic)],
        ],
        [one_run(design, n, replications) for design in quantiles],
        [two_runs(design, n, replications, 1, 4) for design in quantiles],
    ]


def draw(
    design: Design, replications: int, key: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Regressors (CHUNK, d, replications) and responses (CHUNK, replications)."""
    keys = jax.random.split(key)
    d = len(design.coefficients)
    x = jax.random.normal(keys[0], (CHUNK, d, replications))
    if design.intercept:
        x = x.at[:, 0].set(1)
    signal = jnp.einsum("d, tdr -> tr", jnp.asarray(design.coefficients, x.dtype), x)
    return x, design.response(keys[1], signal)


def measure(study: Study, seed: int) -> tuple[list[list[Row]], float]:
    """A list of rows for each start, a row for each rate; and the seconds it took."""
    design, observations, replications, method, tried, starts, *_ = study
    trackers = [running_random_scaling(start=s) for s in starts]
    multiples = jnp.array(method.multiples)

    def init(rate: Rate) -> Any:
        params = jnp.zeros((len(design.coefficients), replications))
        runs = jnp.stack([params] * len(multiples))
        states = jax.vmap(optax.sgd(rate).init)(runs)
        return runs, states, [tracker.init(params) for tracker in trackers]

    def step(data: Any, rate: Rate, carry: Any) -> Any:
        (x, y), (runs, states, scalings) = data, carry

        def update(multiple: jax.Array, params: jax.Array, state: Any) -> Any:
            # The gradient of a sum over replications is each replication's own.
            loss = lambda p: jnp.sum(design.loss(jnp.sum(p * x, axis=0), y))  # noqa: E731
            optimizer = optax.sgd(lambda step: multiple * rate(step))
            updates, state = optimizer.update(jax.grad(loss)(params), state, params)
            return optax.apply_updates(params, updates), state

        runs, states = jax.vmap(update)(multiples, runs, states)
        iterate = sum(w * p for w, p in zip(method.weights, runs, strict=True))
        scalings = [
            tracker.update(scaling, iterate)
            for tracker, scaling in zip(trackers, scalings, strict=True)
        ]
        return runs, states, scalings

    batch = jax.tree.map(lambda *values: jnp.asarray(values), *tried)

    @partial(jax.jit, donate_argnums=0)
    def advance(carry: Any, key: jax.Array) -> Any:
        def body(carry: Any, data: Any) -> Any:
            return jax.vmap(partial(step, data))(batch, carry), None

        return jax.lax.scan(body, carry, draw(design, replications, key))[0]

    began = time.perf_counter()
    carry = jax.vmap(init)(batch)
    key = jax.random.key(seed)
    title = f"{design.title}, {observations:,}"
    for chunk in tqdm(range(observations // CHUNK), desc=title, unit_scale=CHUNK):
        carry = advance(carry, jax.random.fold_in(key, chunk))
    *_, scalings = jax.block_until_ready(carry)
    seconds = time.perf_counter() - began
    return [summarise(design, s, observations, len(tried)) for s in scalings], seconds


def summarise(design: Design, state: Any, observations: int, count: int) -> list[Row]:
    """The rows of one tracker's state, whose leaves are led by the axis of rates."""
    lower, upper = (
        np.asarray(end, np.float64) for end in jax.vmap(confidence_interval)(state)
    )
    truth = design.coefficients[:, None]
    scale = np.sqrt(design.bounds[:, None] / observations)
    errors = (np.asarray(averaged_params(state), np.float64) - truth) / scale
    covered = (lower <= truth) & (truth <= upper)
    lengths = (upper - lower) / (2 * 1.96 * scale)
    return [
        Row(
            coverage=covered[k].mean(),
            error=covered[k].mean(axis=0).std(ddof=1) / np.sqrt(covered.shape[-1]),
            first=covered[k, 0].mean(),
            length=lengths[k].mean(),
            rmse=np.sqrt(np.mean(errors[k] ** 2)),
            bias=np.sqrt(np.mean(errors[k].mean(axis=-1) ** 2)),
        )
        for k in range(count)
    ]


PAGE = """\
# Coverage of the 95 % intervals of random scaling

    {command}

{replications:,} replications (a quarter of them where n is {long:,}; where d is 200 \
a sixteenth, extrapolated a tenth), float32, {cores} CPU cores, jax {jax}. The rules \
were chosen on other seeds.

- *coverage*: of all coefficients, ± its Monte Carlo standard error over independent
  replications; *first*: of the first coefficient, the figure of the paper.
- *length*: mean length over the efficient one, 2 · 1.96 · sqrt((H^-1 S H^-1)_jj / n).
  In the limit it is 1.30: what it costs to know nothing of H and S.
- *RMSE*: root of the mean square of the averages' errors times sqrt(n), over the
  Cramér-Rao bound, sqrt((H^-1 S H^-1)_jj).
- *bias*: the same of their mean over the replications; {noise:.2f} is noise alone
  ({long_noise:.2f} where n is {long:,}; where d is 200 {flat_noise:.2f}, extrapolated
  {wide_noise:.2f}).
- *seconds*: of the run that gave all rows of a design and n.

## One run

{0}

## Two runs, extrapolated

On the same observations, at the step size and at twice that: the intervals are those of
2 p - p', p the iterates of the first and p' of the second.

{1}

## Quantile regression, one run

{2}

## Quantile regression, extrapolated

{3}
"""

HEAD = """\
| design | n | step size | start | coverage | first | length | RMSE | bias | seconds |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"""


def format_row(study: Study, rate: Rate, start: int, row: Row, seconds: float) -> str:
    step_size = f"{rate.c:g} t^-{rate.a:g}"
    if np.isfinite(rate.cap):
        step_size = f"min({rate.cap:g}, {step_size})"
    if (rate, start) == (study.rate, study.start):
        step_size = f"**{step_size}**, the rule"
    figures = [
        f"{value:.3f}" if value < 100 else f"{value:.0e}"
        for value in (row.first, row.length, row.rmse, row.bias)
    ]
    cells = [
        study.design.title,
        f"{study.observations:,}",
        step_size,
        f"{start:,}",
        f"{row.coverage:.4f} ± {row.error:.4f}",
        *figures,
        f"{seconds:.0f}",
    ]
    return f"| {' | '.join(cells)} |"


def tables(observations: int, replications: int, seed: int) -> Iterator[list[str]]:
    """The page's tables, as far as they have come, after each design."""
    parts = sections(observations, replications)
    tables = [HEAD] * len(parts)
    seeds: dict[tuple[str, int], int] = {}  # one stream a design, for all its methods
    for part, studies in enumerate(parts):
        for study in studies:
            stream = study.design.title, study.observations
            seeds.setdefault(stream, seed + len(seeds))
            results, seconds = measure(study, seeds[stream])
            for k, rate in enumerate(study.tried):
                for start, rows in zip(study.starts, results, strict=True):
                    line = format_row(study, rate, start, rows[k], seconds)
                    tables[part] += f"\n{line}"
            yield tables


def main(argv: Sequence[str] | None = None) -> None:
    parser = command_line.Parser("Coverage of the intervals.")
    parser.add_argument(
        "--observations",
        type=command_line.number(
            int,
            lambda n: n > 0 and n % (10 * CHUNK) == 0,  # the shortest have a tenth
            f"a positive multiple of {10 * CHUNK}",
        ),
        default=100_000,
        help="length of a stream (default: %(default)s)",
    )
    parser.add_argument(
        "--replications",
        type=command_line.number(int, lambda n: n >= 32, "32 or more"),
        default=1000,
        help="streams of a design (default: %(default)s)",
    )
    parser.add_argument(
        "--seed",
        type=command_line.number(int, lambda n: 0 <= n < 2**31, "from 0 to 2147483647"),
        default=2022,
        help="of the first design; the others count on (default: %(default)s)",
    )
    parser.add_argument("--output", type=Path, help="where to write the page")
    options = parser.parse_args(argv)
    if options.output is not None:  # now, not when all has been run
        try:
            options.output.open("a").close()
        except OSError as error:
            parser.error(f"argument --output: {options.output}: {error.strerror}")
    n, replications = options.observations, options.replications
    page = ""
    for parts in tables(n, replications, options.seed):
        page = PAGE.format(
            *parts,
            command=f"python -m benchmarks.coverage {' '.join(argv or sys.argv[1:])}",
            replications=replications,
            long=10 * n,
            noise=replications**-0.5,
            long_noise=(replications // 4) ** -0.5,
            flat_noise=(replications // 16) ** -0.5,
            wide_noise=(replications // 10) ** -0.5,
            cores=os.cpu_count(),
            jax=jax.__version__,
        )
        if options.output is not None:  # what there is, so that nothing is lost
            options.output.write_text(page, encoding="utf-8")
    if options.output is None:
        print(page)


if __name__ == "__main__":
    main()
