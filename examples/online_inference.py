# SPDX-License-Identifier: Apache-2.0
"""Unbiased confidence intervals from one pass: logistic regression on a stream.

    python -m examples.online_inference

The regression predicts whether a tumour is malignant. Coefficients, a contrast and log
odds are streams for `running_random_scaling`. A second run, at twice the learning rate,
removes the bias of SGD's average: 2 p_c - p_2c. The stream draws from scikit-learn's
569 tumours with replacement. The intervals are for the maximum-likelihood fit to all.
"""

from argparse import ArgumentParser
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_breast_cancer
from sklearn.linear_model import LogisticRegression
from tqdm import trange

from asgd_optax import (
    ConfidenceInterval,
    confidence_interval,
    running_random_scaling,
)

OBSERVATIONS = 100_000  # per stream
STREAMS = 400
READINGS = 200
LEARNING_RATE = 5.0  # c of min(1/d, c t^-0.505)
OUTPUT = Path("out/online_inference.png")
COLUMNS = 1, 4, 8  # mean texture, smoothness and symmetry
QUESTIONS = {  # linear combinations of the intercept and the coefficients
    "texture": (0, 1, 0, 0),
    "smoothness": (0, 0, 1, 0),
    "symmetry": (0, 0, 0, 1),
    "smoothness - texture": (0, -1, 1, 0),
    "log odds at +1 sd": (1, 1, 1, 1),
}
ESTIMATES = {"one run": "C2", "two runs": "C1"}  # p_c and 2 p_c - p_2c


class Study(NamedTuple):
    """True answers, shape (q,), and the streams' intervals for them."""

    truth: np.ndarray
    observations: np.ndarray  # their number before each reading
    intervals: ConfidenceInterval  # (readings, streams, 2, q), NaN before averaging
    covered: np.ndarray  # (streams, 2, q): do the last ones cover the truth?


def tumours() -> tuple[np.ndarray, np.ndarray]:
    """Return a constant and the features, (569, 4), and whether each is malignant."""
    data = load_breast_cancer()
    x = data.data[:, COLUMNS]
    x = (x - x.mean(axis=0)) / x.std(axis=0)
    return np.insert(x, 0, 1, axis=1), 1.0 - data.target


def follow(c: float, observations: int, streams: int) -> Study:
    """Run SGD over all streams at once; read the intervals `READINGS` times."""
    x, y = (jnp.asarray(a, jnp.float32) for a in tumours())
    questions = np.array(list(QUESTIONS.values()), np.float32)
    d = x.shape[1]
    size = observations // READINGS
    scaling = running_random_scaling(start=observations // 100)

    def observe(carry: Any, key: jax.Array) -> tuple[Any, None]:
        t, params, state = carry
        row = jax.random.randint(key, (), 0, len(x))

        @jax.vmap
        def descend(factor: jax.Array, p: jax.Array) -> jax.Array:
            error = jax.nn.sigmoid(x[row] @ p) - y[row]
            return p - factor * jnp.minimum(1 / d, c * t**-0.505) * error * x[row]

        once, twice = params = descend(jnp.array([1.0, 2.0]), params)
        estimates = jnp.stack([once, 2 * once - twice]) @ questions.T
        return (t + 1, params, scaling.update(state, estimates)), None

    @partial(jax.jit, donate_argnums=0)
    @jax.vmap
    def learn(carry: Any, key: jax.Array) -> tuple[Any, ConfidenceInterval]:
        carry, _ = jax.lax.scan(observe, carry, jax.random.split(key, size))
        return carry, confidence_interval(carry[-1])

    carry: Any = 1.0, jnp.zeros((2, d)), scaling.init(np.zeros((2, len(QUESTIONS))))
    carry = jax.tree.map(lambda a: jnp.stack([a] * streams), carry)
    read = []
    for reading in trange(READINGS, desc=f"c = {c:g}"):
        carry, ends = learn(carry, jax.random.split(jax.random.key(reading), streams))
        read.append(ends)
    lower, upper = intervals = jax.tree.map(lambda *ends: np.stack(ends), *read)
    exact = LogisticRegression(C=np.inf, fit_intercept=False, tol=1e-8, max_iter=1000)
    truth = questions @ exact.fit(*tumours()).coef_[0]
    covered = (lower[-1] <= truth) & (truth <= upper[-1])
    return Study(truth, size * np.arange(1, READINGS + 1), intervals, covered)


def draw(study: Study, output: Path) -> None:
    """Draw the coverage of all intervals, and the intervals of one stream."""
    plt.style.use(Path(__file__).with_name("style.mplstyle"))
    figure, axes = plt.subplot_mosaic("ab;ac", figsize=(9, 4.8))
    rows = np.arange(len(QUESTIONS))
    covered = 100 * study.covered
    late = slice(READINGS // 10, None)
    n = study.observations[late]
    share = covered.mean(axis=0)
    error = 2 * covered.std(axis=0) / len(covered) ** 0.5
    for k, (name, color) in enumerate(ESTIMATES.items()):
        bars = partial(axes["a"].errorbar, fmt="o", color=color, label=name)
        bars(share[k], rows + (k - 0.5) / 5, xerr=error[k])
        for j, ax in (0, axes["b"]), (-1, axes["c"]):
            lower, upper = (ends[late, 0, k, j] for ends in study.intervals)
            ax.fill_between(n, lower, upper, color=color, alpha=0.25, lw=0)
            ax.plot(n, (lower + upper) / 2, color=color)
            ax.axhline(study.truth[j], color="0.3", linestyle="--")
            ax.set(ylabel=list(QUESTIONS)[j], xscale="log", xlabel="draws, one stream")
    axes["a"].axvline(95, color="0.3", linestyle="--", label="95 %; true value")
    axes["a"].set(yticks=rows, yticklabels=QUESTIONS, ylim=(len(rows) - 0.5, -0.5))
    axes["a"].set(xlabel="intervals that cover the true value (%)")
    figure.legend(loc="outside lower center", ncols=3)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output)


def main(output: Path = OUTPUT, n: int = OBSERVATIONS, streams: int = STREAMS) -> Study:
    study = follow(LEARNING_RATE, n, streams)
    draw(study, output)
    lower, upper = (ends[-1, 0] for ends in study.intervals)
    print("| question             | estimate  | one stream       | all 569 | covered |")
    print("| -------------------- | --------- | ---------------- | ------- | ------- |")
    for j, name in enumerate(QUESTIONS):
        for k, estimate in enumerate(ESTIMATES):
            ends = f"{lower[k, j]:+.3f} to {upper[k, j]:+.3f}"
            truth, share = f"{study.truth[j]:+.3f}", study.covered[:, k, j].mean()
            print(f"| {name:20} | {estimate:9} | {ends} | {truth:7} | {share:<7.0%} |")
    return study


if __name__ == "__main__":
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=OUTPUT, help=f"default {OUTPUT}")
    main(parser.parse_args().output)
