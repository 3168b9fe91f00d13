# SPDX-License-Identifier: Apache-2.0
"""Error bars from one pass: regression on a stream, one observation a step.

    python examples/online_inference.py

SGD with `track_random_scaling` in its chain sees every observation once, keeps a few
numbers a coefficient, and gives confidence intervals at any time. Three streams:

- *diabetes*: scikit-learn's diabetes data, standardised, its 442 patients drawn again
  and again with replacement. What such a stream is drawn from is the data set: the
  intervals are for its least-squares coefficients, and shrink about them as the stream
  goes on. The textbook's intervals, which the table gives beside, are for another
  unknown, the population of which the 442 are a sample; no resampling narrows those.
- *linear* and *logistic*: simulated, with known coefficients.

Each stream is replicated, to count how often the intervals hold the truth. All the
replications of a study are one `vmap` over one `scan`.
"""

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from scipy import stats
from sklearn.datasets import load_diabetes
from tqdm import tqdm

from asgd_optax import averaged_params, confidence_interval, track_random_scaling

try:
    from examples import command_line
except ModuleNotFoundError:  # run as a script, with this folder on the path
    import command_line

READINGS = 200  # of the intervals along a stream, evenly spaced
LEVEL = 0.95
# Line colours of Okabe & Ito, which every kind of colour vision tells apart.
BLUE, ORANGE, GREEN = "#0072B2", "#D55E00", "#009E73"


class Stream(NamedTuple):
    """What is observed, and what is to be learned from it.

    Attributes:
      draw: a key to one observation, the regressors (d,) and the response ().
      loss: of the prediction and the response, both of shape ().
      truth: the coefficients that minimise the expected loss. Shape (d,).
      rate: the factor c of the step size min(1/d, c t^-0.505); 1/2 by the rule in the
        docstring of `track_random_scaling`.
    """

    draw: Callable[[jax.Array], tuple[jax.Array, jax.Array]]
    loss: Callable[[jax.Array, jax.Array], jax.Array]
    truth: np.ndarray
    rate: float


class Study(NamedTuple):
    """What the replications of a stream gave; the intervals are at 95 %.

    Attributes:
      truth: the coefficients to be found. Shape (d,).
      observations: the numbers of observations at the readings. Shape (readings,).
      lower: lower ends, shape (readings, replications, d); NaN before the averaging.
      upper: upper ends, as `lower`.
      average: the averaged coefficients at the end. Shape (replications, d).
    """

    truth: np.ndarray
    observations: np.ndarray
    lower: np.ndarray
    upper: np.ndarray
    average: np.ndarray

    def coverage(self) -> np.ndarray:
        """Shares of the last intervals that hold the truth. Shape (replications,)."""
        held = (self.lower[-1] <= self.truth) & (self.truth <= self.upper[-1])
        return held.mean(axis=-1)

    def lengths(self) -> np.ndarray:
        """Mean length over replications and coefficients. Shape (readings,)."""
        return (self.upper - self.lower).mean(axis=(1, 2))


class LeastSquares(NamedTuple):
    """The textbook's regression on the 442 patients; all of shape (d,).

    Attributes:
      coefficients: the least-squares solution.
      half_width: of its 95 % interval for the population, by Student's t.
    """

    names: list[str]
    coefficients: np.ndarray
    half_width: np.ndarray


class Results(NamedTuple):
    """The studies of the three streams, and the textbook's answer to the first."""

    least_squares: LeastSquares
    diabetes: Study
    linear: Study
    logistic: Study


def squared_loss(prediction: jax.Array, y: jax.Array) -> jax.Array:
    return (prediction - y) ** 2 / 2


def logistic_loss(prediction: jax.Array, y: jax.Array) -> jax.Array:
    return jax.nn.softplus(prediction) - y * prediction


def diabetes(rate: float) -> tuple[LeastSquares, Stream]:
    """The bundled data, every column and the response of mean 0 and variance 1."""
    data = load_diabetes()
    x, y = (
        (a - a.mean(axis=0)) / a.std(axis=0) for a in (data["data"], data["target"])
    )
    n, d = x.shape
    inverse = np.linalg.inv(x.T @ x)
    coefficients = inverse @ x.T @ y
    freedom = n - d - 1  # the mean of the response has been estimated too
    variance = np.sum((y - x @ coefficients) ** 2) / freedom
    quantile = stats.t.ppf((1 + LEVEL) / 2, freedom)
    half_width = quantile * np.sqrt(variance * np.diag(inverse))
    patients = jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32)

    def draw(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        patient = jax.random.randint(key, (), 0, n)
        return patients[0][patient], patients[1][patient]

    stream = Stream(draw, squared_loss, coefficients, rate)
    return LeastSquares(list(data["feature_names"]), coefficients, half_width), stream


def simulated(kind: str, d: int = 5) -> Stream:
    """Regressors N(0, I), coefficients evenly spaced from 0 to 1."""
    truth = np.linspace(0, 1, d)

    def draw(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        keys = jax.random.split(key)
        x = jax.random.normal(keys[0], (d,))
        signal = x @ jnp.asarray(truth, x.dtype)
        if kind == "linear":
            return x, signal + jax.random.normal(keys[1])
        return x, (signal > jax.random.logistic(keys[1])).astype(x.dtype)

    loss = squared_loss if kind == "linear" else logistic_loss
    return Stream(draw, loss, truth, rate=0.5)


def follow(name: str, stream: Stream, observations: int, replications: int) -> Study:
    """SGD over `replications` streams; reads all intervals `READINGS` times."""
    d = len(stream.truth)

    def rate(step: jax.Array) -> jax.Array:
        return jnp.minimum(1 / d, stream.rate * (1.0 + step) ** -0.505)

    tx = optax.chain(optax.sgd(rate), track_random_scaling(start=observations // 100))

    def loss(params: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
        return stream.loss(x @ params, y)

    def observe(carry: Any, observation: Any) -> tuple[Any, None]:
        params, state = carry
        grads = jax.grad(loss)(params, *observation)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    def learn(carry: Any, key: jax.Array) -> tuple[Any, Any]:
        keys = jax.random.split(key, observations // READINGS)
        carry, _ = jax.lax.scan(observe, carry, jax.vmap(stream.draw)(keys))
        return carry, confidence_interval(carry[1], LEVEL)

    @partial(jax.jit, donate_argnums=0)
    def learn_all(carry: Any, key: jax.Array) -> tuple[Any, Any]:
        return jax.vmap(learn)(carry, jax.random.split(key, replications))

    params = jnp.zeros((replications, d))
    carry, readings = (params, jax.vmap(tx.init)(params)), []
    key = jax.random.key(0)
    size = observations // READINGS
    for reading in tqdm(range(READINGS), desc=name, unit="obs", unit_scale=size):
        carry, interval = learn_all(carry, jax.random.fold_in(key, reading))
        readings.append(jax.tree.map(np.asarray, interval))
    return Study(
        stream.truth,
        size * np.arange(1, READINGS + 1),
        np.stack([interval.lower for interval in readings]),
        np.stack([interval.upper for interval in readings]),
        np.asarray(averaged_params(carry[1])),
    )


def table(results: Results) -> str:
    """The diabetes coefficients of the textbook, and of the first stream."""
    lines = [
        "| diabetes | least squares, population | one stream, data set | covered |",
        "| -------- | ------------------------ | -------------------- | ------- |",
    ]
    textbook, study = results.least_squares, results.diabetes
    half_width = (study.upper[-1, 0] - study.lower[-1, 0]) / 2
    held = (study.lower[-1] <= study.truth) & (study.truth <= study.upper[-1])
    for j, name in enumerate(textbook.names):
        cells = [
            f"{textbook.coefficients[j]:+.3f} ± {textbook.half_width[j]:.3f}",
            f"{study.average[0, j]:+.4f} ± {half_width[j]:.4f}",
            f"{100 * held[:, j].mean():.0f} %",
        ]
        lines.append(f"| {name:8} | {cells[0]:24} | {cells[1]:20} | {cells[2]:7} |")
    lines.append("")
    for kind in ("diabetes", "linear", "logistic"):
        covered = getattr(results, kind).coverage()
        error = np.std(covered) / np.sqrt(len(covered))
        lines.append(
            f"{kind}: {100 * np.mean(covered):.1f} ± {100 * error:.1f} % of the"
            " intervals hold the truth"
        )
    return "\n".join(lines)


def draw(results: Results, output: Path) -> None:
    """Draws the coefficients of the diabetes data, and intervals that shrink."""
    figure, axes = plt.subplot_mosaic(
        [["diabetes", "linear"], ["diabetes", "logistic"]],
        figsize=(9, 4.8),
        layout="constrained",
    )
    draw_coefficients(axes["diabetes"], results.least_squares, results.diabetes)
    draw_shrinking(axes["linear"], results.linear, "linear", GREEN)
    draw_shrinking(axes["logistic"], results.logistic, "logistic", ORANGE)
    axes["linear"].sharex(axes["logistic"])
    axes["linear"].tick_params(labelbottom=False)
    axes["logistic"].set_xlabel("observations")
    for ax in axes.values():
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(output, dpi=110)
    plt.close(figure)


def draw_coefficients(ax: Any, textbook: LeastSquares, study: Study) -> None:
    rows = np.arange(len(textbook.names))
    ax.errorbar(
        textbook.coefficients,
        rows - 0.15,
        xerr=textbook.half_width,
        fmt="o",
        color="0.55",
        markersize=4,
        capsize=2,
        label="least squares on the 442, for the population",
    )
    lower, upper = study.lower[-1, 0], study.upper[-1, 0]
    ax.errorbar(
        (lower + upper) / 2,
        rows + 0.15,
        xerr=(upper - lower) / 2,
        fmt="none",
        color=BLUE,
        linewidth=3,
        capsize=4,
        label=f"{study.observations[-1]:,} draws from them, for the 442",
    )
    ax.set(
        yticks=rows,
        yticklabels=textbook.names,
        ylim=(len(rows) - 0.5, -2.2),  # downwards; the legend stands on top
    )
    ax.set_title("Diabetes: coefficients, 95 % intervals", fontsize=11)
    ax.legend(loc="upper left", frameon=False, fontsize="small")


def draw_shrinking(ax: Any, study: Study, kind: str, color: str) -> None:
    """One stream's interval for the middle coefficient as the data arrive."""
    middle = len(study.truth) // 2
    truth, n = study.truth[middle], study.observations
    lower, upper = study.lower[:, :, middle], study.upper[:, :, middle]
    ax.fill_between(n, lower[:, 0], upper[:, 0], color=color, alpha=0.35, linewidth=0)
    ax.plot(n, (lower[:, 0] + upper[:, 0]) / 2, color=color, label="one stream")
    half = (upper - lower).mean(axis=-1) / 2
    for sign, label in ((1, "truth ± mean half-width"), (-1, None)):
        ax.plot(n, truth + sign * half, ":", color="0.3", linewidth=1, label=label)
    ax.axhline(truth, color="0.3", linewidth=1)
    covered = 100 * study.coverage().mean()
    ax.set_title(f"Simulated, {kind}: {covered:.1f} % cover at the end", fontsize=11)
    ax.set(ylabel=f"coefficient, true {truth:g}", xscale="log")
    ax.legend(loc="lower right", frameon=False, fontsize="small")


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command_line.Parser(
        "Learn regressions from streams, with confidence intervals at any time."
    )
    parser.add_argument(
        "--observations",
        type=command_line.number(
            int,
            lambda n: n > 0 and n % READINGS == 0,
            f"a positive multiple of {READINGS}",
        ),
        default=100_000,
        help="length of a stream (default: %(default)s)",
    )
    parser.add_argument(
        "--replications",
        type=command_line.count,
        default=100,
        help="streams of each kind (default: %(default)s)",
    )
    # Ten times the rule's c: the blood values s1 to s6 nearly determine each other, and
    # in one direction the loss has a hundredth of the curvature of the others.
    parser.add_argument(
        "--rate",
        type=command_line.positive,
        default=5.0,
        help="c of the step size min(1/d, c t^-0.505) on the diabetes data (default:"
        " %(default)s)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("out/online_inference.png"),
        help="where to save the figure (default: %(default)s)",
    )
    options = parser.parse_args(argv)
    command_line.check_output(parser, options.output)
    return options


def main(argv: Sequence[str] | None = None) -> Results:
    """Follows the streams, saves the figure, prints the table, returns all of it."""
    options = _parse(argv)
    least_squares, patients = diabetes(options.rate)
    streams = {
        "diabetes": patients,
        "linear": simulated("linear"),
        "logistic": simulated("logistic"),
    }
    studies = {
        name: follow(name, stream, options.observations, options.replications)
        for name, stream in streams.items()
    }
    results = Results(least_squares, **studies)
    draw(results, options.output)
    print(table(results))
    print(
        f"\nSettings: observations {options.observations}, replications"
        f" {options.replications}, rate {options.rate:g}.\nFigure: {options.output}"
    )
    return results


if __name__ == "__main__":
    main()
