# SPDX-License-Identifier: Apache-2.0
"""Handwritten digits with Flax NNX: compare the last iterate with the average.

    python -m examples.digits

At a constant learning rate the weights wander around a minimum. Their average settles
near it. (A learning rate decayed to zero does as well, for a known number of steps.)
"""

from argparse import ArgumentParser
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import trange

from asgd_optax import asgd
from asgd_optax.flax import averaged_model

LEARNING_RATE = 0.6
STEPS = 4000  # averaging starts after half of them
BATCH_SIZE = 16
NOISE = 0.2  # standard deviation; pixels are in [0, 1]
MAX_GRADIENT_NORM = 1.0
HIDDEN_UNITS = 64
SEEDS = 10
EVALUATE_EVERY = 40
OUTPUT = Path("out/digits.png")

Data = namedtuple("Data", ["images", "labels"])  # of shapes (n, 64) and (n,)
Scores = namedtuple("Scores", ["loss", "accuracy"])  # the loss is the cross-entropy
# Validation Scores after `steps` and test Scores, for "last" and "averaged".
Results = namedtuple("Results", ["steps", "curves", "test"])


def load_splits() -> tuple[Data, Data, Data]:
    """Load the 997 training, 400 validation and 400 test examples, always the same."""
    x, y = load_digits(return_X_y=True)
    x = (x / 16).astype(np.float32)
    split = {"test_size": 400, "random_state": 0}
    x, x_test, y, y_test = train_test_split(x, y, stratify=y, **split)
    x, x_val, y, y_val = train_test_split(x, y, stratify=y, **split)
    return Data(x, y), Data(x_val, y_val), Data(x_test, y_test)


def minibatches(data: Data, size: int, noise: float, seed: int) -> Iterator[Data]:
    """Yield noisy minibatches forever, in a new order of the examples in each epoch."""
    rng = np.random.default_rng(seed)
    while True:
        order = rng.permutation(len(data.labels))
        for start in range(0, len(order) - size + 1, size):
            picked = order[start : start + size]
            errors = rng.standard_normal((size, 64), dtype=np.float32)
            yield Data(data.images[picked] + noise * errors, data.labels[picked])


def score(model: Any, data: Data) -> Scores:
    """Return the mean cross-entropy and the accuracy of a model."""
    logits = model(data.images)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, data.labels)
    return Scores(losses.mean(), (logits.argmax(axis=-1) == data.labels).mean())


@nnx.jit
@nnx.vmap
def train_step(model: nnx.Module, optimizer: nnx.Optimizer[Any], batch: Data) -> None:
    grads = nnx.grad(lambda model: score(model, batch).loss)(model)
    optimizer.update(model, grads)


@nnx.jit
@nnx.vmap(in_axes=(0, 0, None))
def evaluate(model: nnx.Module, optimizer: nnx.Optimizer[Any], data: Data) -> Any:
    averaged = averaged_model(model, optimizer)  # a copy; `model` does not change
    return {"last": score(model, data), "averaged": score(averaged, data)}


def train(rate: Any, noise: float, steps: int, seeds: int) -> Results:
    """Train a network per seed with a learning rate or a schedule."""
    training, validation, test = load_splits()
    clip = optax.clip_by_global_norm(MAX_GRADIENT_NORM)
    tx = optax.chain(clip, asgd(rate, lambd=0.0, t0=steps // 2))

    @nnx.vmap
    def create(seed: jax.Array) -> tuple[nnx.Module, nnx.Optimizer[Any]]:
        rngs = nnx.Rngs(jax.random.key(seed))
        hidden = nnx.Linear(64, HIDDEN_UNITS, rngs=rngs)
        output = nnx.Linear(HIDDEN_UNITS, 10, rngs=rngs)
        model = nnx.Sequential(hidden, nnx.relu, output)
        return model, nnx.Optimizer(model, tx, wrt=nnx.Param)

    model, optimizer = create(jnp.arange(seeds))
    streams = [minibatches(training, BATCH_SIZE, noise, seed) for seed in range(seeds)]
    curves = []
    for step in trange(1, steps + 1, desc="training"):
        batches = [next(stream) for stream in streams]
        train_step(model, optimizer, jax.tree.map(lambda *xs: np.stack(xs), *batches))
        if step % EVALUATE_EVERY == 0:
            curves.append(evaluate(model, optimizer, validation))
    curves = jax.tree.map(lambda *xs: np.stack(xs), *curves)
    scores = jax.tree.map(np.asarray, evaluate(model, optimizer, test))
    return Results(np.arange(EVALUATE_EVERY, steps + 1, EVALUATE_EVERY), curves, scores)


def draw(results: Results, t0: int, output: Path) -> None:
    """Draw mean and standard deviation of the validation losses over the seeds."""
    plt.style.use(Path(__file__).with_name("style.mplstyle"))
    figure, axes = plt.subplots(figsize=(7, 4.2))
    # Up to step t0 + 1 the average equals the last iterate, so it is not drawn.
    for name, color, first in [("last", "C0", 0), ("averaged", "C1", t0 + 2)]:
        shown = results.steps >= first
        steps, losses = results.steps[shown], results.curves[name].loss[shown]
        mean, std = losses.mean(axis=1), losses.std(axis=1, ddof=1)
        axes.fill_between(steps, mean - std, mean + std, fc=color, alpha=0.2, lw=0)
        axes.plot(steps, mean, c=color, label="average" if first else "last iterate")
    axes.axvline(t0, color="0.4", linestyle="--", label=f"averaging begins: t0 = {t0}")
    axes.set(xlabel="step", ylabel="validation loss, mean ± std", ylim=(0, 0.5))
    axes.legend()
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output)
    plt.close(figure)


def main(output: Path = OUTPUT, *, steps: int = STEPS, seeds: int = SEEDS) -> Results:
    results = train(LEARNING_RATE, NOISE, steps, seeds)
    draw(results, steps // 2, output)
    print("| iterate  | test loss       | test accuracy (%) |")
    print("| -------- | --------------- | ----------------- |")
    for name in ("last", "averaged"):
        loss = results.test[name].loss
        percent = 100 * results.test[name].accuracy
        losses = f"{loss.mean():.4f} ± {loss.std(ddof=1):.4f}"
        percents = f"{percent.mean():.2f} ± {percent.std(ddof=1):.2f}"
        print(f"| {name:8} | {losses} | {percents:17} |")
    return results


if __name__ == "__main__":
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=OUTPUT, help=f"default {OUTPUT}")
    main(parser.parse_args().output)
