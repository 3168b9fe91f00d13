# SPDX-License-Identifier: Apache-2.0
"""Error bars from one pass: regression on a stream, one observation a step.

    python -m examples.online_inference

SGD with `track_random_scaling` in its chain gives confidence intervals at any time. The
stream is scikit-learn's diabetes data, its 442 patients drawn again and again; its
intervals are for these data's least-squares coefficients, and close in on them. The
textbook's are for another unknown, the population behind the 442; no resampling narrows
those. A hundred streams, one `vmap` over one `scan`, count how many hold the truth.
"""

import io
from argparse import SUPPRESS, ArgumentParser
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
from tqdm import trange

from asgd_optax import ConfidenceInterval, confidence_interval, track_random_scaling

OBSERVATIONS, STREAMS, READINGS = 100_000, 100, 200
LEVEL, OUTPUT = 0.95, Path("out/online_inference.png")
# c of the step size min(1/d, c t^-0.505): ten times the rule's, for the blood values s1
# to s6 nearly determine each other: one direction has a hundredth of the curvature.
RATE = 5.0
NAMES = load_diabetes().feature_names
SHOWN = "bmi", "s1"  # along a stream: among the surest, and the least sure


class Study(NamedTuple):
    """The textbook's regression, (d,), and the streams' intervals for it."""

    truth: np.ndarray
    half_width: np.ndarray  # of the textbook's intervals, for the population
    observations: np.ndarray  # so many before each reading
    intervals: ConfidenceInterval  # (readings, streams, d); NaN before the averaging

    def covered(self) -> np.ndarray:
        """Whether the last intervals hold the truth: (streams, d)."""
        lower, upper = (ends[-1] for ends in self.intervals)
        return (lower <= self.truth) & (self.truth <= upper)


def least_squares(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The textbook's coefficients, and the half-widths of its intervals."""
    inverse = np.linalg.inv(x.T @ x)
    coefficients = inverse @ x.T @ y
    freedom = len(x) - len(coefficients) - 1  # the mean of y has been estimated too
    variances = np.sum((y - x @ coefficients) ** 2) / freedom * np.diag(inverse)
    return coefficients, stats.t.ppf((1 + LEVEL) / 2, freedom) * np.sqrt(variances)


def follow(c: float, observations: int, streams: int) -> Study:
    """SGD over all streams at once; reads the intervals `READINGS` times."""
    x, y = ((a - a.mean(0)) / a.std(0) for a in load_diabetes(return_X_y=True))
    patients = jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32)
    d, size = x.shape[1], observations // READINGS
    rate = lambda t: jnp.minimum(1 / d, c * (1.0 + t) ** -0.505)  # noqa: E731
    tx = optax.chain(optax.sgd(rate), track_random_scaling(start=observations // 100))

    def observe(carry: Any, key: jax.Array) -> tuple[Any, None]:
        params, state = carry
        patient = jax.random.randint(key, (), 0, len(x))
        regressors, response = (values[patient] for values in patients)
        grads = (regressors @ params - response) * regressors
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    @partial(jax.jit, donate_argnums=0)
    @jax.vmap
    def learn(carry: Any, key: jax.Array) -> tuple[Any, ConfidenceInterval]:
        carry, _ = jax.lax.scan(observe, carry, jax.random.split(key, size))
        return carry, confidence_interval(carry[1], LEVEL)

    params, read = jnp.zeros((streams, d)), []
    carry = params, jax.vmap(tx.init)(params)
    for reading in trange(READINGS, desc=f"c = {c:g}", unit="obs", unit_scale=size):
        key = jax.random.fold_in(jax.random.key(0), reading)
        carry, intervals = learn(carry, jax.random.split(key, streams))
        read.append(intervals)
    intervals = jax.tree.map(lambda *ends: np.stack(ends), *read)
    return Study(*least_squares(x, y), size * np.arange(1, READINGS + 1), intervals)


def draw(study: Study, output: Path) -> None:
    """The coefficients, and intervals that shrink as the data arrive."""
    plt.style.use(Path(__file__).with_name("style.mplstyle"))
    figure, axes = plt.subplot_mosaic("ab;ac", figsize=(9, 5.2))
    rows, n = np.arange(len(NAMES)), study.observations
    bars = partial(axes["a"].errorbar, fmt="o", markersize=3, capsize=4)
    population = "least squares on the 442 patients: for the population"
    bars(study.truth, rows - 0.15, xerr=study.half_width, color="C5", label=population)
    lower, upper = (ends[:, 0] for ends in study.intervals)
    middle, half = (lower + upper) / 2, (upper - lower) / 2
    drawn = f"one stream of {n[-1]:,} draws from them: for the 442"
    bars(middle[-1], rows + 0.15, xerr=half[-1], color="C1", label=drawn)
    axes["a"].set(yticks=rows, yticklabels=NAMES, ylim=(len(rows) - 0.5, -0.7))
    axes["a"].set(xlabel="coefficient", title="Diabetes: 95 % intervals at the end")
    for name, ax in zip(SHOWN, (axes["b"], axes["c"]), strict=True):
        j = NAMES.index(name)
        ax.fill_between(n, lower[:, j], upper[:, j], color="C1", alpha=0.25, lw=0)
        ax.plot(n, middle[:, j], color="C1")
        truth = ax.axhline(study.truth[j], color="0.3", linestyle="--")
        ax.set(xscale="log", xlabel="draws", ylabel=f"coefficient of {name}")
    axes["b"].set(xlabel="", title="along the stream")
    truth.set_label("the 442's least squares")
    figure.legend(loc="outside lower center", ncols=2)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output)
    plt.close(figure)


def main(output: Path = OUTPUT, n: int = OBSERVATIONS, streams: int = STREAMS) -> Study:
    """Follows the streams, saves the figure, prints the table, returns the study."""
    study = follow(RATE, n, streams)
    draw(study, output)
    lower, upper = (ends[-1, 0] for ends in study.intervals)
    covered = 100 * study.covered()
    print("| diabetes | least squares, population | one stream, data set | covered |")
    print("| -------- | ------------------------- | -------------------- | ------- |")
    for j, name in enumerate(NAMES):
        textbook = f"{study.truth[j]:+.3f} ± {study.half_width[j]:.3f}"
        stream = f"{(lower + upper)[j] / 2:+.4f} ± {(upper - lower)[j] / 2:.4f}"
        percent = f"{covered[:, j].mean():.0f} %"
        print(f"| {name:8} | {textbook:25} | {stream:20} | {percent:7} |")
    error = covered.mean(axis=1).std() / np.sqrt(streams)
    print(f"\n{covered.mean():.1f} ± {error:.1f} % of the intervals hold the truth.")
    return study


if __name__ == "__main__":
    parser = ArgumentParser(usage=SUPPRESS, description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, default=OUTPUT, help=f"default {OUTPUT}")
    output = parser.parse_args().output
    try:  # now, not after the training; a picture that is there stays as it is
        plt.savefig(io.BytesIO(), format=output.suffix[1:])
        output.parent.mkdir(parents=True, exist_ok=True)
        output.open("ab").close()
    except (OSError, ValueError) as error:
        parser.error(f"argument --output: {error}")
    main(output)
