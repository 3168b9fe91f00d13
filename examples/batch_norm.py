# SPDX-License-Identifier: Apache-2.0
"""BatchNorm with Flax NNX: averaged weights need statistics of their own.

    python examples/batch_norm.py

A small network with BatchNorm learns scikit-learn's digits by SGD at a constant
rate, and the mean of its iterates is taken. The running statistics have followed
the iterates: with them the averaged weights are normalised by means and variances
of activations that they do not have. `update_batch_stats` estimates the statistics
anew over the training set. The table compares, on the test set, the last iterate
and the averaged weights with either statistics. The rate is large, so that the
iterates are far apart: at `--rate 0.3` stale statistics do much less harm. All seeds
train at once, under `nnx.vmap`.
"""

import argparse
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import tqdm

from asgd_optax import average_iterates, averaged_params
from asgd_optax.flax import update_batch_stats

try:
    from examples import command_line, digits
    from examples.digits import Data, Scores
except ModuleNotFoundError:  # run as a script, with this folder on the path
    import command_line
    import digits
    from digits import Data, Scores

BATCH_SIZE = 32
HIDDEN_UNITS = 64
MOMENTUM = 0.9  # of the running statistics


class Results(NamedTuple):
    """What a run measured.

    Attributes:
      last: the last iterate, with the running statistics.
      stale: the averaged weights, with the last iterate's running statistics.
      updated: the averaged weights, with statistics estimated anew.
    """

    last: Scores
    stale: Scores
    updated: Scores


def load_splits() -> tuple[Data, Data]:
    """The same 1297 training and 500 test images every time."""
    images, labels = load_digits(return_X_y=True)
    images, test_images, labels, test_labels = train_test_split(
        (images / 16).astype(np.float32),
        labels,
        test_size=500,
        stratify=labels,
        random_state=0,
    )
    return Data(images, labels), Data(test_images, test_labels)


def minibatches(data: Data, seed: int) -> Iterator[Data]:
    """Endless minibatches; each epoch is a new order of the examples."""
    rng = np.random.default_rng(seed)
    while True:
        order = rng.permutation(len(data.labels))
        for start in range(0, len(order) - BATCH_SIZE + 1, BATCH_SIZE):
            picked = order[start : start + BATCH_SIZE]
            yield Data(data.images[picked], data.labels[picked])


def create(
    seed: jax.Array, tx: optax.GradientTransformation
) -> tuple[nnx.Module, nnx.Optimizer]:
    """A freshly initialised network and its optimizer."""
    rngs = nnx.Rngs(jax.random.key(seed))
    model = nnx.Sequential(
        nnx.Linear(64, HIDDEN_UNITS, rngs=rngs),
        nnx.BatchNorm(HIDDEN_UNITS, momentum=MOMENTUM, rngs=rngs),
        nnx.relu,
        nnx.Linear(HIDDEN_UNITS, HIDDEN_UNITS, rngs=rngs),
        nnx.BatchNorm(HIDDEN_UNITS, momentum=MOMENTUM, rngs=rngs),
        nnx.relu,
        nnx.Linear(HIDDEN_UNITS, 10, rngs=rngs),
    )
    return model, nnx.Optimizer(model, tx, wrt=nnx.Param)


@nnx.jit
@nnx.vmap(in_axes=(0, None))
def run(model: nnx.Module, images: jax.Array) -> jax.Array:
    """Every seed's network on the same images."""
    return model(images)


evaluate = nnx.jit(nnx.vmap(digits.score, in_axes=(0, None)))


def train(
    splits: tuple[Data, Data], rate: float, start: float, steps: int, seeds: int
) -> Results:
    """Trains a network per seed; scores its iterate and its average on the test set."""
    training, test = splits
    tx = optax.chain(optax.sgd(rate), average_iterates(start=start))
    model, optimizer = nnx.vmap(lambda seed: create(seed, tx))(jnp.arange(seeds))
    streams = [minibatches(training, seed) for seed in range(seeds)]
    for _ in tqdm(range(steps), desc="training", unit="step"):
        batches = [next(stream) for stream in streams]
        batch = jax.tree.map(lambda *xs: np.stack(xs), *batches)
        digits.train_step(model, optimizer, batch)

    model.eval()
    last = evaluate(model, test)
    nnx.update(model, averaged_params(optimizer.opt_state, nnx.state(model, nnx.Param)))
    stale = evaluate(model, test)
    # The last of these batches is smaller, and weighs less.
    sections = range(BATCH_SIZE, len(training.images), BATCH_SIZE)
    update_batch_stats(model, np.split(training.images, sections), call=run)
    updated = evaluate(model, test)
    return jax.tree.map(np.asarray, Results(last, stale, updated))


def table(results: Results) -> str:
    """The test scores of the three, mean ± standard deviation over the seeds."""
    lines = [
        "| weights      | statistics      | test loss       | test accuracy (%) |",
        "| ------------ | --------------- | --------------- | ----------------- |",
    ]
    for weights, statistics, scores in (
        ("last iterate", "running", results.last),
        ("averaged", "stale", results.stale),
        ("averaged", "estimated anew", results.updated),
    ):
        loss = command_line.spread(scores.loss, 4)
        accuracy = command_line.spread(100 * scores.accuracy, 2)
        lines.append(f"| {weights:12} | {statistics:15} | {loss:15} | {accuracy:17} |")
    return "\n".join(lines)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options, checked."""
    count = command_line.count
    parser = command_line.Parser(
        "Average a network with BatchNorm; compare its statistics."
    )
    parser.add_argument(
        "--rate",
        type=command_line.positive,
        default=3.0,
        help="learning rate, constant (default: %(default)s)",
    )
    parser.add_argument(
        "--start",
        type=command_line.start,
        help="steps before averaging begins, inf for never (default: a tenth of them)",
    )
    parser.add_argument(
        "--steps",
        type=count,
        default=2000,
        help="minibatches to train on (default: %(default)s)",
    )
    parser.add_argument(
        "--seeds",
        type=count,
        default=10,
        help="networks to train (default: %(default)s)",
    )
    options = parser.parse_args(argv)
    if options.start is None:
        options.start = float(options.steps // 10)
    return options


def main(argv: Sequence[str] | None = None) -> Results:
    """Trains, prints the table and returns what was measured."""
    options = parse(argv)
    results = train(load_splits(), **vars(options))
    print(table(results))
    print(command_line.describe(vars(options)))
    return results


if __name__ == "__main__":
    main()
