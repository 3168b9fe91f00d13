# SPDX-License-Identifier: Apache-2.0
"""Your first EMA: a small network, noisy samples of a sine, and Adam.

    python -m examples.first_ema

This is the program of the README with a log and a figure. The learning rate is
constant, so the parameters keep moving with the noise of the minibatches. The network
with their exponential moving average (EMA) settles near the sine.
"""

from argparse import ArgumentParser
from collections import namedtuple
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from tqdm import tqdm

from asgd_optax import average_iterates, averaged_params

RATE, DECAY, STEPS, BATCH_SIZE = 1e-2, 0.999, 3000, 32
NOISE, HIDDEN_UNITS = 0.5, 64  # noise: standard deviation of the targets
EVALUATE_EVERY, OUTPUT = 25, Path("out/first_ema.png")
COLORS = {"last iterate": "C0", "EMA": "C1"}

# Test losses after `steps` and the final fitted curves over [-1, 1], by name.
Results = namedtuple("Results", ["steps", "losses", "curves"])


def init_params(w_key: jax.Array, b_key: jax.Array) -> dict[str, jax.Array]:
    return {
        "w1": 3 * jax.random.normal(w_key, (1, HIDDEN_UNITS)),
        "b1": jax.random.normal(b_key, (HIDDEN_UNITS,)),
        "w2": jnp.zeros((HIDDEN_UNITS, 1)),
    }


def model(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ params["w1"] + params["b1"]) @ params["w2"]


def loss(params: dict[str, jax.Array], x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.mean((model(params, x) - y) ** 2)


def minibatch(key: jax.Array) -> tuple[jax.Array, jax.Array]:
    x_key, noise_key = jax.random.split(key)
    x = jax.random.uniform(x_key, (BATCH_SIZE, 1), minval=-1, maxval=1)
    return x, jnp.sin(3 * x) + NOISE * jax.random.normal(noise_key, x.shape)


def test_set() -> tuple[jax.Array, jax.Array]:
    """Return the sine itself, without noise."""
    x = jnp.linspace(-1, 1, 200)[:, None]
    return x, jnp.sin(3 * x)


def train(steps: int, seed: int) -> Results:
    """Train one network; measure the last iterate and the EMA on the way."""
    tx = optax.chain(optax.adam(RATE), average_iterates(DECAY))
    x_test, y_test = test_set()

    @jax.jit
    def train_step(params: Any, opt_state: Any, key: jax.Array) -> Any:
        grads = jax.grad(loss)(params, *minibatch(key))
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    @jax.jit
    def evaluate(params: Any, opt_state: Any) -> dict[str, jax.Array]:
        ema_params = averaged_params(opt_state, params)
        pairs = zip(COLORS, (params, ema_params), strict=True)
        return {name: loss(p, x_test, y_test) for name, p in pairs}

    w_key, b_key, data_key = jax.random.split(jax.random.key(seed), 3)
    params = init_params(w_key, b_key)
    opt_state, measured, losses = tx.init(params), [], []
    keys = jax.random.split(data_key, steps)
    for step, key in enumerate(tqdm(keys, desc="training"), 1):
        params, opt_state = train_step(params, opt_state, key)
        if step % EVALUATE_EVERY == 0 or step == steps:
            measured.append(step)
            losses.append(evaluate(params, opt_state))
    both = zip(COLORS, (params, averaged_params(opt_state, params)), strict=True)
    curves = {name: np.asarray(model(p, x_test)) for name, p in both}
    by_name = {name: np.array([row[name] for row in losses]) for name in COLORS}
    return Results(np.array(measured), by_name, curves)


def draw(results: Results, output: Path) -> None:
    """Draw the test losses over the steps, and the fitted curves over the sine."""
    plt.style.use(Path(__file__).with_name("style.mplstyle"))
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3.4))
    x, sine = test_set()
    points = map(np.ravel, minibatch(jax.random.key(1)))
    right.plot(*points, ".", color="0.7", label="a minibatch")
    right.plot(x, sine, color="k", linestyle="--", label="sin 3x")
    for name, color in COLORS.items():
        left.plot(results.steps, results.losses[name], color=color, label=name)
        right.plot(x, results.curves[name], color=color, label=name)
    left.set(xlabel="step", ylabel="test loss", yscale="log")
    left.set_title("Test loss during training")
    right.set(xlabel="x", ylabel="y", title="Fitted curves at the end")
    for axes in (left, right):
        axes.legend()
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output)
    plt.close(figure)


def main(output: Path = OUTPUT, *, steps: int = STEPS, seed: int = 0) -> Results:
    results = train(steps, seed)
    draw(results, output)
    for name, losses in results.losses.items():
        print(f"{name + ':':13} {losses[-1]:.5f}")
    return results


if __name__ == "__main__":
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=OUTPUT, help=f"default {OUTPUT}")
    main(parser.parse_args().output)
