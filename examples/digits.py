# SPDX-License-Identifier: Apache-2.0
"""Handwritten digits with Flax NNX: the last iterate against the averaged one.

    python examples/digits.py

A small network learns scikit-learn's digits by SGD at a constant rate. Every
minibatch has fresh noise on its pixels, so the gradients stay noisy to the end and
the iterate keeps wandering around a minimum; its average comes to rest near it. (A
rate decayed to zero does as well, where the number of steps is known beforehand.)
The table compares the two on the test set, the figure follows them through
training on the validation set. All seeds train at once, under `nnx.vmap`.
"""

import argparse
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx
from matplotlib.ticker import LogLocator
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import tqdm

from asgd_optax import asgd, averaged_params

try:
    from examples import command_line
except ModuleNotFoundError:  # run as a script, with this folder on the path
    import command_line

MAX_GRADIENT_NORM = 1.0
HIDDEN_UNITS = 64
EVALUATIONS = 100  # along the curves

SCHEDULES = {
    "constant": lambda rate, steps: rate,
    "linear": lambda rate, steps: optax.linear_schedule(rate, 0.0, steps),
    "cosine": lambda rate, steps: optax.cosine_decay_schedule(rate, steps),
}


class Data(NamedTuple):
    """Images, of shape (examples, 64), and their labels, (examples,)."""

    images: np.ndarray
    labels: np.ndarray


class Scores(NamedTuple):
    """Cross-entropy and accuracy; the last axis is that of the seeds."""

    loss: np.ndarray
    accuracy: np.ndarray


class Results(NamedTuple):
    """What a run measured.

    Attributes:
      steps: the steps after which the curves were measured. Shape (evaluations,).
      last_curve: the iterates on the validation set. Shape (evaluations, seeds).
      average_curve: their average, as `last_curve`.
      last: the last iterate on the test set. Shape (seeds,).
      average: its average, as `last`.
    """

    steps: np.ndarray
    last_curve: Scores
    average_curve: Scores
    last: Scores
    average: Scores


def load_splits() -> tuple[Data, Data, Data]:
    """The same 997 training, 400 validation and 400 test images every time."""
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype(np.float32)
    split = {"test_size": 400, "random_state": 0}
    images, test_images, labels, test_labels = train_test_split(
        images, labels, stratify=labels, **split
    )
    images, val_images, labels, val_labels = train_test_split(
        images, labels, stratify=labels, **split
    )
    return (
        Data(images, labels),
        Data(val_images, val_labels),
        Data(test_images, test_labels),
    )


def minibatches(data: Data, size: int, noise: float, seed: int) -> Iterator[Data]:
    """Endless noisy minibatches; each epoch is a new order of the examples."""
    rng = np.random.default_rng(seed)
    while True:
        order = rng.permutation(len(data.labels))
        for start in range(0, len(order) - size + 1, size):
            picked = order[start : start + size]
            images = data.images[picked]
            errors = rng.standard_normal(images.shape, dtype=np.float32)
            yield Data(images + np.float32(noise) * errors, data.labels[picked])


def create(
    seed: jax.Array, tx: optax.GradientTransformation
) -> tuple[nnx.Module, nnx.Optimizer]:
    """A freshly initialised network and its optimizer."""
    rngs = nnx.Rngs(jax.random.key(seed))
    model = nnx.Sequential(
        nnx.Linear(64, HIDDEN_UNITS, rngs=rngs),
        nnx.relu,
        nnx.Linear(HIDDEN_UNITS, 10, rngs=rngs),
    )
    return model, nnx.Optimizer(model, tx, wrt=nnx.Param)


def score(model: nnx.Module, data: Data) -> Scores:
    """The model's mean cross-entropy and accuracy."""
    logits = model(data.images)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, data.labels)
    correct = jnp.argmax(logits, axis=-1) == data.labels
    return Scores(jnp.mean(losses), jnp.mean(correct))


@nnx.jit
@nnx.vmap
def train_step(model: nnx.Module, optimizer: nnx.Optimizer, batch: Data) -> None:
    """One step of every seed."""
    grads = nnx.grad(lambda model: score(model, batch).loss)(model)
    optimizer.update(model, grads)


@nnx.jit
@nnx.vmap(in_axes=(0, 0, None))
def evaluate(
    model: nnx.Module, optimizer: nnx.Optimizer, data: Data
) -> tuple[Scores, Scores]:
    """Every seed's scores: of the current iterate and of the average."""
    average = averaged_params(optimizer.opt_state, nnx.state(model, nnx.Param))
    averaged_model = nnx.merge(nnx.graphdef(model), average)
    return score(model, data), score(averaged_model, data)


def train(
    splits: tuple[Data, Data, Data],
    rate: float,
    schedule: str,
    t0: float,
    steps: int,
    batch_size: int,
    noise: float,
    seeds: int,
) -> Results:
    """Trains a network per seed; scores the iterate and its average on the way."""
    training, validation, test = splits
    learning_rate = SCHEDULES[schedule](rate, steps)
    tx = optax.chain(
        optax.clip_by_global_norm(MAX_GRADIENT_NORM),
        asgd(learning_rate, lambd=0.0, t0=t0),
    )
    model, optimizer = nnx.vmap(lambda seed: create(seed, tx))(jnp.arange(seeds))
    streams = [minibatches(training, batch_size, noise, seed) for seed in range(seeds)]
    every = math.ceil(steps / EVALUATIONS)
    measured, curves = [], []
    for step in tqdm(range(1, steps + 1), desc="training", unit="step"):
        batches = [next(stream) for stream in streams]
        train_step(model, optimizer, jax.tree.map(lambda *xs: np.stack(xs), *batches))
        if step % every == 0 or step == steps:
            measured.append(step)
            curves.append(evaluate(model, optimizer, validation))
    last_curve, average_curve = jax.tree.map(lambda *xs: np.stack(xs), *curves)
    last, average = jax.tree.map(np.asarray, evaluate(model, optimizer, test))
    return Results(np.array(measured), last_curve, average_curve, last, average)


def table(results: Results) -> str:
    """The test scores of the two, mean ± standard deviation over the seeds."""
    lines = [
        "|                  | test loss       | test accuracy (%) |",
        "| ---------------- | --------------- | ----------------- |",
    ]
    for name, scores in (
        ("last iterate", results.last),
        ("averaged iterate", results.average),
    ):
        loss = command_line.spread(scores.loss, 4)
        accuracy = command_line.spread(100 * scores.accuracy, 2)
        lines.append(f"| {name:16} | {loss:15} | {accuracy:17} |")
    return "\n".join(lines)


def draw(results: Results, options: argparse.Namespace, output: Path) -> None:
    """Draws the validation losses: a line for seed 0, a band for all the seeds."""
    t0, steps = options.t0, options.steps
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")

    def plot(when: np.ndarray, losses: np.ndarray, color: str, name: str) -> None:
        lowest, highest = losses.min(axis=-1), losses.max(axis=-1)
        axes.fill_between(when, lowest, highest, color=color, alpha=0.25, linewidth=0)
        axes.plot(when, losses[:, 0], color=color, linewidth=1.8, label=name)

    # Orange and blue of Okabe & Ito, which every kind of colour vision tells apart.
    plot(results.steps, results.last_curve.loss, "#E69F00", "iterate")
    # Up to step t0 + 1 the average is the iterate itself.
    averaged = results.steps > t0 + 1
    if averaged.any():
        average_loss = results.average_curve.loss[averaged]
        plot(results.steps[averaged], average_loss, "#0072B2", "average")
        axes.axvline(t0, color="0.4", linestyle="--", linewidth=1)
        axes.annotate(
            f"averaging begins: t0 = {t0:g}",
            xy=(t0, 1),
            xycoords=("data", "axes fraction"),
            xytext=(5, -4) if t0 <= steps / 2 else (-5, -4),
            textcoords="offset points",
            horizontalalignment="left" if t0 <= steps / 2 else "right",
            verticalalignment="top",
        )
    axes.set(
        title=f"Digits, {options.schedule} rate: seed 0 (line), range of seeds (band)",
        xlabel="step",
        ylabel="validation loss (cross-entropy)",
        xlim=(0, steps),
    )
    # A logarithmic axis has no ticks where every seed has diverged to NaN.
    if np.isfinite(results.last_curve.loss).any():
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower left", frameon=False)
    figure.savefig(output, dpi=120)
    plt.close(figure)


def _parse(argv: Sequence[str] | None, examples: int) -> argparse.Namespace:
    """The options, checked; `examples` is the size of the training set."""
    number, count = command_line.number, command_line.count
    parser = command_line.Parser(
        "Train on the digits; compare the last iterate and the average."
    )
    parser.add_argument(
        "--rate",
        type=command_line.positive,
        default=0.6,
        help="learning rate, at the start (default: %(default)s)",
    )
    parser.add_argument(
        "--schedule",
        choices=SCHEDULES,
        default="constant",
        help="what becomes of the rate: constant, or decayed to zero (default:"
        " %(default)s)",
    )
    parser.add_argument(
        "--t0",
        type=number(float, lambda t: t >= 0, "0 or more, or inf"),
        help="steps before averaging begins, inf for never (default: half of them)",
    )
    parser.add_argument(
        "--steps",
        type=count,
        default=4000,
        help="minibatches to train on (default: %(default)s)",
    )
    parser.add_argument(
        "--batch-size",
        type=command_line.count_to(examples, "the size of the training set"),
        default=16,
        help="images in a minibatch (default: %(default)s)",
    )
    parser.add_argument(
        "--noise",
        type=number(float, lambda n: 0 <= n < math.inf, "0 or more, and finite"),
        default=0.2,
        help="standard deviation of the noise on the training images' pixels, which"
        " lie in [0, 1] (default: %(default)s)",
    )
    parser.add_argument(
        "--seeds",
        type=count,
        default=10,
        help="networks to train; a seed sets the initial weights and the"
        " minibatches (default: %(default)s)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("out/digits.png"),
        help="where to save the figure (default: %(default)s)",
    )
    options = parser.parse_args(argv)
    if options.t0 is None:
        options.t0 = options.steps // 2
    command_line.check_output(parser, options.output)
    return options


def main(argv: Sequence[str] | None = None) -> Results:
    """Trains, saves the figure, prints the table and returns what was measured."""
    splits = load_splits()
    options = _parse(argv, examples=len(splits[0].labels))
    settings = vars(options).copy()
    output = settings.pop("output")
    results = train(splits, **settings)
    draw(results, options, output)
    print(table(results))
    print(command_line.describe(vars(options)))
    return results


if __name__ == "__main__":
    main()
