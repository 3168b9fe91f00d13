# SPDX-License-Identifier: Apache-2.0
"""BatchNorm with Flax NNX: recompute the statistics for averaged weights.

    python -m examples.batch_norm

A small network with BatchNorm learns scikit-learn's digits by SGD at a constant
learning rate, and its weights are averaged. The running statistics belong to the last
iterate: the averaged weights produce different activations. `update_batch_stats`
recomputes the statistics over the training set. The table compares the last iterate and
the averaged weights with both kinds of statistics on the test set.
"""

from argparse import ArgumentParser
from collections import namedtuple
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import trange

from asgd_optax import average_iterates
from asgd_optax.flax import averaged_model, update_batch_stats

LEARNING_RATE = 3.0
STEPS = 2000  # averaging starts after a tenth of them
BATCH_SIZE = 32
HIDDEN_UNITS = 64
MOMENTUM = 0.9  # of the running statistics
SEEDS = 10

Data = namedtuple("Data", ["images", "labels"])  # of shapes (n, 64) and (n,)
Scores = namedtuple("Scores", ["loss", "accuracy"])  # the loss is the cross-entropy
# The last iterate, the averaged weights with its statistics, and with recomputed ones.
Results = namedtuple("Results", ["last", "stale", "updated"])
WEIGHTS = ["last iterate", "averaged", "averaged"]
STATISTICS = ["running", "stale", "recomputed"]


def load_splits() -> tuple[Data, Data]:
    """Load the 1297 training and 500 test examples, always the same."""
    x, y = load_digits(return_X_y=True)
    x = (x / 16).astype(np.float32)
    split = {"test_size": 500, "random_state": 0}
    x, x_test, y, y_test = train_test_split(x, y, stratify=y, **split)
    return Data(x, y), Data(x_test, y_test)


def minibatches(data: Data, seed: int) -> Iterator[Data]:
    """Yield minibatches forever, in a new order of the examples in each epoch."""
    rng = np.random.default_rng(seed)
    while True:
        order = rng.permutation(len(data.labels))
        for start in range(0, len(order) - BATCH_SIZE + 1, BATCH_SIZE):
            picked = order[start : start + BATCH_SIZE]
            yield Data(data.images[picked], data.labels[picked])


def create_model(rngs: nnx.Rngs) -> nnx.Sequential:
    """Create and initialise a network."""
    return nnx.Sequential(
        nnx.Linear(64, HIDDEN_UNITS, rngs=rngs),
        nnx.BatchNorm(HIDDEN_UNITS, momentum=MOMENTUM, rngs=rngs),
        nnx.relu,
        nnx.Linear(HIDDEN_UNITS, HIDDEN_UNITS, rngs=rngs),
        nnx.BatchNorm(HIDDEN_UNITS, momentum=MOMENTUM, rngs=rngs),
        nnx.relu,
        nnx.Linear(HIDDEN_UNITS, 10, rngs=rngs),
    )


def score(model: Any, data: Data) -> Scores:
    """Return the mean cross-entropy and the accuracy of a model."""
    logits = model(data.images)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, data.labels)
    return Scores(losses.mean(), (logits.argmax(axis=-1) == data.labels).mean())


@nnx.jit
@nnx.vmap
def train_step(model: nnx.Module, optimizer: nnx.Optimizer[Any], batch: Data) -> None:
    """Train every seed for one step."""
    grads = nnx.grad(lambda model: score(model, batch).loss)(model)
    optimizer.update(model, grads)


@nnx.jit
@nnx.vmap(in_axes=(0, None))
def evaluate(model: Any, data: Data) -> Scores:
    """Score every seed with the statistics stored in the model."""
    model = nnx.clone(model)  # leaves the original in training mode
    model.eval()
    return score(model, data)


# Runs every seed's network on the same images.
run = nnx.jit(nnx.vmap(lambda model, images: model(images), in_axes=(0, None)))


def train(training: Data, rate: float, steps: int, seeds: int) -> Any:
    """Train a network per seed; return them and their optimizer."""
    tx = optax.chain(optax.sgd(rate), average_iterates(start=steps // 10))

    @nnx.vmap
    def create(seed: jax.Array) -> tuple[nnx.Module, nnx.Optimizer[Any]]:
        model = create_model(nnx.Rngs(jax.random.key(seed)))
        return model, nnx.Optimizer(model, tx, wrt=nnx.Param)

    model, optimizer = create(jnp.arange(seeds))
    streams = [minibatches(training, seed) for seed in range(seeds)]
    for _ in trange(steps, desc="training"):
        batches = [next(stream) for stream in streams]
        train_step(model, optimizer, jax.tree.map(lambda *xs: np.stack(xs), *batches))
    return model, optimizer


def compare(model: nnx.Module, optimizer: Any, training: Data, test: Data) -> Results:
    """Return scores on the test set; `model` does not change."""
    averaged = averaged_model(model, optimizer)
    last, stale = evaluate(model, test), evaluate(averaged, test)
    # The last batch is smaller, so it has less weight.
    sections = range(BATCH_SIZE, len(training.images), BATCH_SIZE)
    update_batch_stats(averaged, np.split(training.images, sections), call=run)
    return jax.tree.map(np.asarray, Results(last, stale, evaluate(averaged, test)))


def main(
    rate: float = LEARNING_RATE, *, steps: int = STEPS, seeds: int = SEEDS
) -> Results:
    training, test = load_splits()
    model, optimizer = train(training, rate, steps, seeds)
    results = compare(model, optimizer, training, test)
    print("| weights      | statistics | test loss       | test accuracy (%) |")
    print("| ------------ | ---------- | --------------- | ----------------- |")
    for weights, statistics, scores in zip(WEIGHTS, STATISTICS, results, strict=True):
        loss, accuracy = scores
        losses = f"{loss.mean():.4f} ± {loss.std(ddof=1):.4f}"
        percents = f"{100 * accuracy.mean():.2f} ± {100 * accuracy.std(ddof=1):.2f}"
        print(f"| {weights:12} | {statistics:10} | {losses} | {percents:17} |")
    return results


if __name__ == "__main__":
    ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    main()
