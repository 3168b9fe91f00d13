# SPDX-License-Identifier: Apache-2.0
"""Which weighting suits what: three averages of one trajectory, and its last iterate.

    python examples/weightings.py

Adam at a constant rate learns scikit-learn's digits, with fresh noise on the pixels
of every minibatch, while three averages look on: the chain ends in three
`average_iterates`, none of which changes the updates. So the curves differ in
nothing but the weighting. Uniform drags the start of the training along for long;
polynomial forgets it at any length of training, and follows closely; exponential
needs as many iterates as it looks back over, and then keeps their noise. The table
compares them on the test set, the figure follows them through training on the
validation set. All seeds train at once, under `jax.vmap`, and a compiled loop leads
from one evaluation to the next.
"""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from matplotlib.ticker import LogLocator
from tqdm import tqdm

from asgd_optax import (
    average_iterates,
    averaged_params,
    exponential_weighting,
    polynomial_weighting,
    uniform_weighting,
)

try:
    from examples import command_line, digits
except ModuleNotFoundError:  # run as a script, with this folder on the path
    import command_line
    import digits

BATCH_SIZE = 16
NOISE = 0.2  # standard deviation; the pixels lie in [0, 1]
HIDDEN_UNITS = 64
EVALUATIONS = 60  # along the curves, about

# Line colours of Okabe & Ito, which every kind of colour vision tells apart.
COLORS = {
    "last iterate": "0.65",
    "uniform": "#D55E00",
    "polynomial": "#0072B2",
    "exponential": "#009E73",
}


class Results(NamedTuple):
    """What a run measured; the keys of the dictionaries are those of `COLORS`.

    Attributes:
      steps: the steps after which the curves were measured. Shape (evaluations,).
      curves: losses on the validation set, each of shape (evaluations, seeds).
      test: losses on the test set after the last step, each of shape (seeds,).
    """

    steps: np.ndarray
    curves: dict[str, np.ndarray]
    test: dict[str, np.ndarray]


def init_params(key: jax.Array) -> dict[str, jax.Array]:
    """A freshly initialised network with one hidden layer."""
    keys = jax.random.split(key)
    normal = jax.nn.initializers.lecun_normal()
    return {
        "hidden": normal(keys[0], (64, HIDDEN_UNITS)),
        "hidden_bias": jnp.zeros(HIDDEN_UNITS),
        "output": normal(keys[1], (HIDDEN_UNITS, 10)),
        "output_bias": jnp.zeros(10),
    }


def loss(params: dict[str, jax.Array], data: digits.Data) -> jax.Array:
    """The network's mean cross-entropy."""
    hidden = jax.nn.relu(data.images @ params["hidden"] + params["hidden_bias"])
    logits = hidden @ params["output"] + params["output_bias"]
    return jnp.mean(
        optax.softmax_cross_entropy_with_integer_labels(logits, data.labels)
    )


def train(
    splits: tuple[digits.Data, digits.Data, digits.Data],
    rate: float,
    start: float,
    decay: float,
    gamma: float,
    steps: int,
    seeds: int,
) -> Results:
    """Trains a network per seed; scores iterate and averages on the way."""
    training, validation, test = jax.tree.map(jnp.asarray, splits)
    weightings = {
        "uniform": uniform_weighting(),
        "polynomial": polynomial_weighting(gamma),
        "exponential": exponential_weighting(decay),
    }
    tx = optax.named_chain(
        ("adam", optax.adam(rate)),
        *((name, average_iterates(w, start=start)) for name, w in weightings.items()),
    )

    def create(seed: jax.Array) -> tuple[Any, Any, jax.Array]:
        init_key, key = jax.random.split(jax.random.key(seed))
        params = init_params(init_key)
        return params, tx.init(params), key

    def train_step(carry: Any, step: jax.Array) -> Any:
        params, opt_state, key = carry
        keys = jax.random.split(jax.random.fold_in(key, step))
        picked = jax.random.randint(keys[0], (BATCH_SIZE,), 0, len(training.labels))
        images = training.images[picked]
        images += NOISE * jax.random.normal(keys[1], images.shape)
        grads = jax.grad(loss)(params, digits.Data(images, training.labels[picked]))
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, key

    @jax.jit
    def train_from_to(carry: Any, first: jax.Array, last: jax.Array) -> Any:
        # The bounds are traced: compiled once for stretches of any length.
        every_seed = jax.vmap(train_step, in_axes=(0, None))
        return jax.lax.fori_loop(first, last, lambda n, c: every_seed(c, n), carry)

    @jax.jit
    def evaluate(carry: Any, data: digits.Data) -> dict[str, jax.Array]:
        def of_one_seed(params: Any, opt_state: Any) -> dict[str, jax.Array]:
            candidates = {"last iterate": params}
            for name in weightings:  # each by the name of its link in the chain
                candidates[name] = averaged_params(opt_state[name], params)
            return {name: loss(p, data) for name, p in candidates.items()}

        return jax.vmap(of_one_seed)(*carry[:2])

    carry = jax.vmap(create)(jnp.arange(seeds))
    # Evenly spaced on the figure's logarithmic axis.
    measured = np.unique(np.geomspace(1, steps, EVALUATIONS).round().astype(int))
    curves = []
    with tqdm(total=steps, desc="training", unit="step") as bar:
        for step in measured.tolist():
            carry = train_from_to(carry, bar.n, step)
            curves.append(evaluate(carry, validation))
            bar.update(step - bar.n)
    return Results(
        measured,
        jax.tree.map(lambda *losses: np.stack(losses), *curves),
        jax.tree.map(np.asarray, evaluate(carry, test)),
    )


def table(results: Results) -> str:
    """The test losses, mean ± standard deviation over the seeds."""
    lines = [
        "|              | test loss       |",
        "| ------------ | --------------- |",
    ]
    for name in COLORS:
        cell = command_line.spread(results.test[name], 4)
        lines.append(f"| {name:12} | {cell:15} |")
    return "\n".join(lines)


def draw(results: Results, options: argparse.Namespace) -> None:
    """Draws the validation losses, mean over the seeds, on logarithmic axes."""
    labels = {
        "last iterate": "last iterate",
        "uniform": "uniform",
        "polynomial": f"polynomial, gamma {options.gamma:g}",
        "exponential": f"exponential, decay {options.decay:g}",
    }
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for name, color in COLORS.items():
        losses = results.curves[name].mean(axis=-1)
        axes.plot(results.steps, losses, color=color, linewidth=1.8, label=labels[name])
    if 0 < options.start < options.steps:
        axes.axvline(options.start, color="0.4", linestyle="--", linewidth=1)
    seeds = f"mean of {options.seeds} seeds" if options.seeds > 1 else "one seed"
    axes.set(
        title=f"Averages of the same iterates of Adam on digits, {seeds}",
        xlabel="step",
        ylabel="validation loss (cross-entropy)",
        xscale="log",
        xlim=(1, max(2, options.steps)),
    )
    axes.xaxis.set_major_formatter("{x:g}")
    # A logarithmic axis has no ticks where every seed has diverged to NaN.
    if all(np.isfinite(curve).any() for curve in results.curves.values()):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower left", frameon=False)
    figure.savefig(options.output, dpi=120)
    plt.close(figure)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    number, count = command_line.number, command_line.count
    parser = command_line.Parser(
        "Train with Adam; compare the weightings of averaged iterates."
    )
    parser.add_argument(
        "--rate",
        type=command_line.positive,
        default=0.01,
        help="Adam's learning rate (default: %(default)s)",
    )
    parser.add_argument(
        "--start",
        type=command_line.start,
        default=0,
        help="steps before averaging begins, inf for never (default: %(default)s)",
    )
    parser.add_argument(
        "--decay",
        type=number(float, lambda d: 0 <= d < 1, "at least 0 and less than 1"),
        default=0.99,
        help="of the exponential weighting (default: %(default)s)",
    )
    parser.add_argument(
        "--gamma",
        type=number(float, lambda g: 0 <= g < math.inf, "0 or more, and finite"),
        default=3.0,
        help="of the polynomial weighting (default: %(default)s)",
    )
    parser.add_argument(
        "--steps",
        type=count,
        default=4000,
        help="minibatches to train on (default: %(default)s)",
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
        default=Path("out/weightings.png"),
        help="where to save the figure (default: %(default)s)",
    )
    options = parser.parse_args(argv)
    command_line.check_output(parser, options.output)
    return options


def main(argv: Sequence[str] | None = None) -> Results:
    """Trains, saves the figure, prints the table and returns what was measured."""
    options = _parse(argv)
    settings = {name: v for name, v in vars(options).items() if name != "output"}
    results = train(digits.load_splits(), **settings)
    draw(results, options)
    print(table(results))
    print(command_line.describe(vars(options)))
    return results


if __name__ == "__main__":
    main()
