# SPDX-License-Identifier: Apache-2.0
"""Compare weightings: one run of Adam, its last iterate and three averages.

    python -m examples.weightings

A network learns scikit-learn's digits by Adam at a constant learning rate, with noisy
minibatches and three averages in the chain. The uniform average remembers the bad start
of the training. The polynomial average forgets it, for runs of any length. The
exponential average has a fixed window, so its noise stops falling.
"""

from argparse import ArgumentParser
from collections import namedtuple
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import tqdm

from asgd_optax import average_iterates, averaged_params, polynomial_weighting

LEARNING_RATE = 0.01
STEPS = 4000
BATCH_SIZE = 16
NOISE = 0.2  # standard deviation; pixels are in [0, 1]
GAMMA = 3.0  # of the polynomial average
DECAY = 0.99  # of the exponential average
HIDDEN_UNITS = 64
SEEDS = 20
EVALUATIONS = 60
OUTPUT = Path("out/weightings.png")
COLORS = {"last iterate": 0, "uniform": 2, "polynomial": 4, "exponential": 1}

# Test losses after `steps` and at the end, by name of the average.
Results = namedtuple("Results", ["steps", "curves", "test"])


def load_splits() -> list[Any]:
    """Load 997 training and 400 test examples, the same as in `examples/digits.py`."""
    x, y = load_digits(return_X_y=True)
    x = (x / 16).astype(np.float32)
    split = {"test_size": 400, "random_state": 0}
    x, x_test, y, y_test = train_test_split(x, y, stratify=y, **split)
    x, _, y, _ = train_test_split(x, y, stratify=y, **split)
    return jax.tree.map(jnp.asarray, [(x, y), (x_test, y_test)])


def init_params(key: jax.Array) -> list[jax.Array]:
    """Initialise the weights and biases of a network with one hidden layer."""
    keys = jax.random.split(key)
    normal = jax.nn.initializers.lecun_normal()
    hidden = normal(keys[0], (64, HIDDEN_UNITS))
    output = normal(keys[1], (HIDDEN_UNITS, 10))
    return [hidden, jnp.zeros(HIDDEN_UNITS), output, jnp.zeros(10)]


def loss(params: list[jax.Array], images: Any, labels: Any) -> jax.Array:
    """Return the mean cross-entropy."""
    hidden, hidden_bias, output, output_bias = params
    logits = jax.nn.relu(images @ hidden + hidden_bias) @ output + output_bias
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def train(rate: float, steps: int, seeds: int) -> Results:
    """Train a network per seed; score the last iterate and the averages on the way."""
    (images, labels), test = load_splits()
    averages = {
        "uniform": average_iterates(),
        "polynomial": average_iterates(polynomial_weighting(GAMMA)),
        "exponential": average_iterates(DECAY),
    }
    tx = optax.named_chain(("adam", optax.adam(rate)), *averages.items())

    def create(seed: jax.Array) -> Any:
        init_key, key = jax.random.split(jax.random.key(seed))
        params = init_params(init_key)
        return params, tx.init(params), key

    def train_step(carry: Any, step: jax.Array) -> Any:
        params, opt_state, key = carry
        keys = jax.random.split(jax.random.fold_in(key, step))
        picked = jax.random.randint(keys[0], (BATCH_SIZE,), 0, len(labels))
        noise = NOISE * jax.random.normal(keys[1], (BATCH_SIZE, 64))
        grads = jax.grad(loss)(params, images[picked] + noise, labels[picked])
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, key

    @jax.jit  # the bounds are traced, so it compiles once
    def train_from_to(carry: Any, first: int, last: int) -> Any:
        every_seed = jax.vmap(train_step, in_axes=(0, None))
        return jax.lax.fori_loop(first, last, lambda n, c: every_seed(c, n), carry)

    @jax.jit
    @partial(jax.vmap, in_axes=(0, None))
    def evaluate(carry: Any, data: Any) -> dict[str, jax.Array]:
        params, opt_state, _ = carry
        readings = {"last iterate": params}
        for name in averages:  # each has its name in the chain
            readings[name] = averaged_params(opt_state[name], params)
        return {name: loss(p, *data) for name, p in readings.items()}

    carry = jax.vmap(create)(jnp.arange(seeds))
    done, curves = 0, []
    measured = np.unique(np.geomspace(1, steps, EVALUATIONS).round().astype(int))
    for step in tqdm(measured.tolist(), desc="training"):
        carry = train_from_to(carry, done, step)
        curves.append(evaluate(carry, test))
        done = step
    curves = jax.tree.map(lambda *losses: np.stack(losses), *curves)
    return Results(measured, curves, {name: curves[name][-1] for name in COLORS})


def draw(results: Results, output: Path) -> None:
    """Draw the test losses, mean over seeds, on logarithmic axes."""
    plt.style.use(Path(__file__).with_name("style.mplstyle"))
    figure, axes = plt.subplots(figsize=(7, 4.2))
    for name, color in COLORS.items():
        losses = results.curves[name].mean(axis=-1)
        axes.plot(results.steps, losses, color=f"C{color}", label=name)
    axes.set(title="Three averages of one Adam run on digits, mean over seeds")
    axes.set(xlabel="step", ylabel="test loss (cross-entropy)")
    axes.set(xscale="log", yscale="log")
    axes.legend(title=f"gamma {GAMMA:g}, decay {DECAY:g}")
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output)


def main(output: Path = OUTPUT, *, steps: int = STEPS, seeds: int = SEEDS) -> Results:
    results = train(LEARNING_RATE, steps, seeds)
    draw(results, output)
    last = results.test["last iterate"]
    print("|              | test loss       | beats the last |")
    print("| ------------ | --------------- | -------------- |")
    for name, losses in results.test.items():
        spread = f"{losses.mean():.4f} ± {losses.std(ddof=1):.4f}"
        print(f"| {name:12} | {spread} | {sum(losses < last):8} of {seeds} |")
    return results


if __name__ == "__main__":
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=OUTPUT, help=f"default {OUTPUT}")
    main(parser.parse_args().output)
