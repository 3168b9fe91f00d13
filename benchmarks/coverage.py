# SPDX-License-Identifier: Apache-2.0
"""How often the intervals of `track_random_scaling` hold the truth.

    python -m benchmarks.coverage --output benchmarks/coverage.md

The designs of Lee, Liao, Seo & Shin (2022): one pass of SGD over a stream of
independent observations, one a step, from zero. The d regressors are N(0, I), the
true coefficients d numbers evenly spaced from 0 to 1; the response is linear with
noise N(0, 1), or logistic. The step sizes are theirs, c t^-a, and that of the rule in
`docs/guides/confidence_intervals.md`. Float32.

Every transformation in the chain is elementwise, so the replications are one more axis
of the parameters. All step sizes see the same data, and two trackers stand in one
chain, one that averages from the first iterate on and one after a burn-in.
"""

import os
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from asgd_optax import averaged_params, confidence_interval, track_random_scaling
from benchmarks import command_line

CHUNK = 100  # observations drawn at once
BURN_IN = 100  # one observation of so many


class Design(NamedTuple):
    """A regression to learn from a stream; its coefficients are of shape (d,)."""

    name: str
    loss: Callable[[jax.Array, jax.Array], jax.Array]
    coefficients: np.ndarray
    # The diagonal of H^-1 S H^-1: n times the least asymptotic variance.
    bounds: np.ndarray

    @property
    def title(self) -> str:
        return f"{self.name}, d = {len(self.coefficients)}"


class Rate(NamedTuple):
    """The step size min(cap, c t^-a) of the t-th update."""

    c: float
    a: float
    cap: float = np.inf


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


def linear(d: int) -> Design:
    return Design("linear", linear_loss, np.linspace(0, 1, d), np.ones(d))


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
    return Design("logistic", logistic_loss, b, bounds)


def rates(d: int) -> list[Rate]:
    """The paper's step sizes, and last the rule's: E|x|^2 is d."""
    paper = [Rate(c, a) for a in (0.505, 0.667) for c in (0.5, 1.0)]
    return [*paper, Rate(0.5, 0.505, 1 / d)]


def draw(
    design: Design, replications: int, key: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Regressors (CHUNK, d, replications) and responses (CHUNK, replications)."""
    keys = jax.random.split(key)
    d = len(design.coefficients)
    x = jax.random.normal(keys[0], (CHUNK, d, replications))
    signal = jnp.einsum("d, tdr -> tr", jnp.asarray(design.coefficients, x.dtype), x)
    if design.name == "linear":
        return x, signal + jax.random.normal(keys[1], signal.shape)
    threshold = jax.random.logistic(keys[1], signal.shape)
    return x, (signal > threshold).astype(x.dtype)


def measure(
    design: Design,
    tried: Sequence[Rate],
    starts: Sequence[int],
    observations: int,
    replications: int,
    seed: int,
) -> tuple[list[list[Row]], float]:
    """A list of rows for each start, a row for each rate; and the seconds it took."""

    def optimizer(rate: Rate) -> optax.GradientTransformationExtraArgs:
        def schedule(step: jax.Array) -> jax.Array:
            return jnp.minimum(rate.cap, rate.c * (1.0 + step) ** -rate.a)

        trackers = [(str(s), track_random_scaling(start=s)) for s in starts]
        return optax.named_chain(("sgd", optax.sgd(schedule)), *trackers)

    def init(rate: Rate) -> Any:
        params = jnp.zeros((len(design.coefficients), replications))
        return params, optimizer(rate).init(params)

    def step(data: Any, rate: Rate, carry: Any) -> Any:
        (x, y), (params, state) = data, carry
        # The gradient of a sum over replications is each replication's own.
        loss = lambda p: jnp.sum(design.loss(jnp.sum(p * x, axis=0), y))  # noqa: E731
        updates, state = optimizer(rate).update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

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
    carry = jax.block_until_ready(carry)
    seconds = time.perf_counter() - began
    states = carry[1]
    return [
        summarise(design, states[str(s)], observations, len(tried)) for s in starts
    ], seconds


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
# Coverage of the 95 % intervals of `track_random_scaling`

    {command}

{replications:,} replications (a quarter of them where n is {long:,}, a sixteenth \
where d is 200), float32, \
{cores} CPU cores, jax {jax}. The rule was chosen on other seeds.

- *coverage*: of all coefficients, ± its Monte Carlo standard error over independent
  replications; *first*: of the first coefficient, the figure of the paper.
- *length*: mean length over the efficient one, 2 · 1.96 · sqrt((H^-1 S H^-1)_jj / n).
  In the limit it is 1.30: what it costs to know nothing of H and S.
- *RMSE*: root of the mean square of the averages' errors times sqrt(n), over the
  Cramér-Rao bound, sqrt((H^-1 S H^-1)_jj).
- *bias*: the same of their mean over the replications; {noise:.2f} is noise alone
  ({long_noise:.2f} where n is {long:,}, {flat_noise:.2f} where d is 200).
- *seconds*: of the run that gave all rows of a design and n.

| design | n | step size | start | coverage | first | length | RMSE | bias | seconds |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |
{rows}
"""


def format_row(design: Design, n: int, rate: Rate, start: int, row: Row) -> str:
    step_size = f"{rate.c:g} t^-{rate.a:g}"
    if np.isfinite(rate.cap):
        step_size = f"min({rate.cap:g}, {step_size})"
        if start:
            step_size = f"**{step_size}**, the rule"
    figures = [
        f"{value:.3f}" if value < 100 else f"{value:.0e}"
        for value in (row.first, row.length, row.rmse, row.bias)
    ]
    cells = [
        design.title,
        f"{n:,}",
        step_size,
        f"{start:,}",
        f"{row.coverage:.4f} ± {row.error:.4f}",
        *figures,
    ]
    return f"| {' | '.join(cells)} |"


def study(observations: int, replications: int, seed: int) -> list[str]:
    """Runs all of it; returns the rows of the table."""
    paper = [
        (design(d), observations, rates(d), replications)
        for design in (linear, logistic)
        for d in (5, 20)
    ]
    # How far the logistic intervals get with more observations.
    longer = [
        (logistic(d), 10 * observations, rates(d)[-1:], replications // 4)
        for d in (5, 20)
    ]
    # Where the intervals fail, and do not show it: there is next to no curvature.
    flat = [(logistic(200), observations, rates(200)[-1:], replications // 16)]
    lines = []
    for number, (design, n, tried, count) in enumerate([*paper, *longer, *flat]):
        starts = [0, n // BURN_IN]
        results, seconds = measure(design, tried, starts, n, count, seed + number)
        for k, rate in enumerate(tried):
            for start, rows in zip(starts, results, strict=True):
                line = format_row(design, n, rate, start, rows[k])
                lines.append(f"{line} {seconds:.0f} |")
    return lines


def main(argv: Sequence[str] | None = None) -> None:
    parser = command_line.Parser("Coverage of the intervals.")
    parser.add_argument(
        "--observations",
        type=command_line.number(
            int, lambda n: n > 0 and n % CHUNK == 0, f"a positive multiple of {CHUNK}"
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
    rows = study(options.observations, options.replications, options.seed)
    page = PAGE.format(
        command=f"python -m benchmarks.coverage {' '.join(argv or sys.argv[1:])}",
        replications=options.replications,
        long=10 * options.observations,
        noise=options.replications**-0.5,
        long_noise=(options.replications // 4) ** -0.5,
        flat_noise=(options.replications // 16) ** -0.5,
        cores=os.cpu_count(),
        jax=jax.__version__,
        rows="\n".join(rows),
    )
    if options.output is None:
        print(page)
    else:
        options.output.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
