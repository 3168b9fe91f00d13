# SPDX-License-Identifier: Apache-2.0
"""Coverage of random-scaling confidence intervals.

    python -m studies.coverage --output studies/results

Uses the designs of Lee, Liao, Seo & Shin (2022): one pass of SGD from zero over a
stream of independent observations, one per step. The d regressors are N(0, I), and the
true coefficients are evenly spaced from 0 to 1. The response is linear with noise
N(0, 1), or logistic. For quantile regression (2022b) the first regressor is an
intercept, and the noise is that of the linear design. Everything is in float32.

The learning rates are those of the papers, c t^-a, and those of the rules in
`docs/how_to/confidence_intervals.md`: for one run, and for the extrapolation of two
runs on the same observations, the second at twice the learning rate of the first.

Every operation is elementwise, so the replications are one more axis of the parameters.
All learning rates see the same data. Each run has several trackers: one that averages
from the first iterate, and others that start after a burn-in.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from statistics import NormalDist
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from asgd_optax import averaged_params, confidence_interval, running_random_scaling
from tools import command_line, report

CHUNK = 100  # observations drawn at once
BURN_IN = 100  # the burn-in is n / BURN_IN observations


class Design(NamedTuple):
    """A regression to learn from a stream, with coefficients of shape (d,)."""

    name: str
    loss: Callable[[jax.Array, jax.Array], jax.Array]
    # Takes a PRNG key, and the regressors times the coefficients.
    response: Callable[[jax.Array, jax.Array], jax.Array]
    coefficients: np.ndarray
    # The diagonal of H^-1 S H^-1: n times the least asymptotic variance.
    bounds: np.ndarray
    # A bound of the expected loss's second derivative in the prediction.
    curvature: float
    # The least eigenvalue of H.
    flattest: float
    intercept: bool = False

    @property
    def title(self) -> str:
        return f"{self.name}, d = {len(self.coefficients)}"


class Rate(NamedTuple):
    """The learning rate min(cap, c t^-a) of the t-th update."""

    c: float
    a: float
    cap: float = np.inf

    def __call__(self, step: jax.Array) -> jax.Array:
        return jnp.minimum(self.cap, self.c * (1.0 + step) ** -self.a)


class Method(NamedTuple):
    """Runs on the same observations, and the sum that gets the intervals.

    Attributes:
      multiples: factor of the learning rate in each run.
      weights: weight of each run's iterate in the sum.
    """

    multiples: tuple[int, ...]
    weights: tuple[int, ...]


ONE_RUN = Method((1,), (1,))
# Richardson extrapolation removes the bias proportional to the learning rate.
EXTRAPOLATED = Method((1, 2), (2, -1))


class Row(NamedTuple):
    """Results for one learning rate and start, over coefficients and replications.

    Attributes:
      coverage: fraction of the 95 % intervals that cover the true value.
      error: Monte Carlo standard error of the coverage. It is computed over
        replications, because the coefficients within one are dependent.
      first: coverage of the first coefficient, which the paper reports.
      length: mean length relative to the efficient length.
      rmse: root mean square of the average's errors, each divided by its bound.
      bias: root mean square over the coefficients of the mean error over
        replications, each divided by its bound. Without bias it is about 0.03 with
        1,000 replications.
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
    return Design("linear", linear_loss, linear_response, b, np.ones(d), 1.0, 1.0)


def logistic(d: int) -> Design:
    """Return logistic regression: H = S = E[s'(b.x) x x'], s the logistic function.

    In the direction of b and across it these are integrals over a normal number u:
    E[s'(|b| u) u^2] and E[s'(|b| u)].
    """
    b = np.linspace(0, 1, d)
    u = np.linspace(-12, 12, 10_001)
    weights = np.exp(-(u**2) / 2) / np.cosh(np.linalg.norm(b) * u / 2) ** 2
    weights /= 4 * np.sum(np.exp(-(u**2) / 2))
    along, across = np.sum(weights * u**2), np.sum(weights)
    squares = b**2 / np.sum(b**2)
    bounds = squares / along + (1 - squares) / across
    return Design("logistic", logistic_loss, logistic_response, b, bounds, 1 / 4, along)


def quantile(tau: float, d: int) -> Design:
    """Return quantile regression: H = f I, S = tau (1 - tau) I, f the noise's density.

    The noise is shifted so that its quantile is 0; the intercept contains the shift.
    """
    noise = NormalDist()
    shift = noise.inv_cdf(tau)

    def loss(prediction: jax.Array, y: jax.Array) -> jax.Array:
        """Compute the loss whose derivative is 1{y <= prediction} - tau."""
        above, below = tau * (y - prediction), (1 - tau) * (prediction - y)
        return jnp.where(y <= prediction, below, above)

    def response(key: jax.Array, signal: jax.Array) -> jax.Array:
        return linear_response(key, signal) - shift

    coefficients = np.linspace(0, 1, d)
    coefficients[0] += shift
    f = noise.pdf(shift)
    bounds = np.full(d, tau * (1 - tau) / f**2)
    name = f"quantile {tau:g}"
    return Design(name, loss, response, coefficients, bounds, 0.5, f, intercept=True)


class Study(NamedTuple):
    """Learning rates tried on one stream of data, including the rule's."""

    design: Design
    observations: int
    replications: int
    method: Method
    tried: Sequence[Rate]
    starts: Sequence[int]
    # Of the rule.
    rate: Rate
    start: int


def start(design: Design, n: int) -> int:
    """Return the burn-in of the rule."""
    return max(n // BURN_IN, 10 * len(design.coefficients))


def one_run(design: Design, n: int, replications: int, *others: Rate) -> Study:
    """Return a study of one run."""
    rate, last = Rate(0.5, 0.505, 1 / len(design.coefficients)), start(design, n)
    tried, starts = [*others, rate], sorted({0, n // BURN_IN, last})
    return Study(design, n, replications, ONE_RUN, tried, starts, rate, last)


def two_runs(design: Design, n: int, replications: int, *others: float) -> Study:
    """Return a study of two runs; the learning rates are those of the first run."""
    c = 1 / design.curvature
    rate, last = Rate(c, 0.505, c / (2 * len(design.coefficients))), start(design, n)
    tried = [rate._replace(c=each) for each in sorted({c, *others})]
    return Study(design, n, replications, EXTRAPOLATED, tried, [last], rate, last)


def sections(n: int, replications: int) -> list[list[Study]]:
    """Return the studies under each heading of the page."""
    few, fewer = replications // 4, replications // 10
    paper = [design(d) for design in (linear, logistic) for d in (5, 20)]
    quantiles = [quantile(tau, d) for tau in (0.5, 0.9) for d in (5, 20)]
    steps = [Rate(c, a) for a in (0.505, 0.667) for c in (0.5, 1.0)]
    return [
        [
            *[one_run(design, n, replications, *steps) for design in paper],
            # Logistic intervals with more observations.
            *[one_run(logistic(d), 10 * n, few) for d in (5, 20)],
            # The intervals fail without a sign here, for lack of curvature.
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
    """Draw regressors (CHUNK, d, replications), responses (CHUNK, replications)."""
    keys = jax.random.split(key)
    d = len(design.coefficients)
    x = jax.random.normal(keys[0], (CHUNK, d, replications))
    if design.intercept:
        x = x.at[:, 0].set(1)
    signal = jnp.einsum("d, tdr -> tr", jnp.asarray(design.coefficients, x.dtype), x)
    return x, design.response(keys[1], signal)


def states(study: Study, seed: int, counts: Sequence[int]) -> Iterator[list[Any]]:
    """Run a study, and yield the trackers' states after each of these observations.

    Args:
      study: the learning rates are the leading axis of the states.
      seed: of the stream.
      counts: ascending multiples of CHUNK. Read a state before you take the next one,
        because its arrays are donated.
    """
    design, _, replications, method, tried, starts, *_ = study
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

    carry = jax.vmap(init)(batch)
    key = jax.random.key(seed)
    title = f"{design.title}, {counts[-1]:,}"
    for chunk in tqdm(range(counts[-1] // CHUNK), desc=title, unit_scale=CHUNK):
        carry = advance(carry, jax.random.fold_in(key, chunk))
        if (chunk + 1) * CHUNK in counts:
            yield jax.block_until_ready(carry[-1])


def measure(study: Study, seed: int) -> tuple[list[list[Row]], float]:
    """Return the rows per start, one for each learning rate, and the seconds."""
    n, count = study.observations, len(study.tried)
    began = time.perf_counter()
    (scalings,) = states(study, seed, [n])
    seconds = time.perf_counter() - began
    return [summarise(study.design, s, n, count) for s in scalings], seconds


def summarise(design: Design, state: Any, observations: int, count: int) -> list[Row]:
    """Compute the rows of a tracker's state, whose leading axis is learning rates."""
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
# Coverage of random-scaling 95 % confidence intervals

{replications:,} replications (a quarter of them for n = {long:,}; for d = 200 a \
sixteenth, extrapolated a tenth), float32. The rules were chosen on other seeds.

- *coverage*: over all coefficients, ± its Monte Carlo standard error over independent
  replications; *first*: of the first coefficient, as the paper reports.
- *length*: mean length relative to the efficient one, which is
  2 · 1.96 · sqrt((H^-1 S H^-1)_jj / n). Its limit is 1.30, the price of not knowing H
  and S.
- *RMSE*: root mean square of the averages' errors times sqrt(n), over the Cramér-Rao
  bound, sqrt((H^-1 S H^-1)_jj).
- *bias*: the same for the mean error over the replications; {noise:.2f} is noise only
  ({long_noise:.2f} for n = {long:,}; for d = 200 {flat_noise:.2f}, extrapolated
  {wide_noise:.2f}).
- *seconds*: of the run that gave all rows of a design and n.

## One run

{0}

## Two runs, extrapolated

Both runs see the same observations; the second has twice the learning rate. The
intervals are those of 2 p - p', where p are the iterates of the first run and p' those
of the second.

{1}

## Quantile regression, one run

{2}

## Quantile regression, extrapolated

{3}
"""

HEADER = ["design", "n", "learning rate", "start", "coverage", "first"]
HEADER += ["length", "RMSE", "bias", "seconds"]


def format_row(
    study: Study, rate: Rate, start: int, row: Row, seconds: float
) -> list[str]:
    """Format the cells of a row; the rule's learning rate is bold."""
    formula = f"{rate.c:g} t^-{rate.a:g}"
    if np.isfinite(rate.cap):
        formula = f"min({rate.cap:g}, {formula})"
    if (rate, start) == (study.rate, study.start):
        formula = f"**{formula}**, the rule"
    figures = [
        f"{value:.3f}" if value < 100 else f"{value:.0e}"
        for value in (row.first, row.length, row.rmse, row.bias)
    ]
    return [
        study.design.title,
        f"{study.observations:,}",
        formula,
        f"{start:,}",
        f"{row.coverage:.4f} ± {row.error:.4f}",
        *figures,
        f"{seconds:.0f}",
    ]


def tables(observations: int, replications: int, seed: int) -> list[str]:
    """Run all studies, and format the page's tables."""
    tables = []
    seeds: dict[tuple[str, int], int] = {}  # all methods of a design see one stream
    for studies in sections(observations, replications):
        cells = []
        for study in studies:
            stream = study.design.title, study.observations
            seeds.setdefault(stream, seed + len(seeds))
            results, seconds = measure(study, seeds[stream])
            for k, rate in enumerate(study.tried):
                for start, rows in zip(study.starts, results, strict=True):
                    cells.append(format_row(study, rate, start, rows[k], seconds))
        tables.append(report.table(HEADER, cells))
    return tables


def main(argv: Sequence[str] | None = None) -> None:
    """Run all studies, and write the page."""
    parser = command_line.report_parser("Coverage of confidence intervals.")
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
        type=command_line.whole_number(32),
        default=1000,
        help="streams per design (default: %(default)s)",
    )
    parser.add_argument(
        "--seed",
        type=command_line.whole_number(0),
        default=2022,
        help="seed of the first design, from which the others count (default:"
        " %(default)s)",
    )
    options = parser.parse_args(argv)
    n, replications = options.observations, options.replications
    if options.quick:
        n, replications = 10 * CHUNK, 32
    page = PAGE.format(
        *tables(n, replications, options.seed),
        replications=replications,
        long=10 * n,
        noise=replications**-0.5,
        long_noise=(replications // 4) ** -0.5,
        flat_noise=(replications // 16) ** -0.5,
        wide_noise=(replications // 10) ** -0.5,
    )
    report.write("studies.coverage", page, options.output)


if __name__ == "__main__":
    main()
