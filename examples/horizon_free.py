# SPDX-License-Identifier: Apache-2.0
"""A learning rate without a horizon, averaged, against a cosine for every horizon.

    python -m examples.horizon_free

Linear regression in one pass. The learning rate t^-0.4 does not know when the run ends,
so one run is read at every horizon. A cosine to zero needs a run for each. The average
of the one run keeps up with the cosines; its last iterate does not.
"""

from argparse import ArgumentParser
from collections import namedtuple
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

from asgd_optax import average_iterates, averaged_params, polynomial_weighting

D = 1000  # parameters
A, B = 1.5, 2.5  # exponents of the variances and of the source
VARIANCES = np.arange(1, D + 1) ** -A
TRUE = np.sqrt(np.arange(1, D + 1) ** -B / VARIANCES)
GAMMA = 1 - A / B  # exponent of the learning rate
PEAK = 0.7 / VARIANCES.sum()
FIRST, LAST = 8, 15  # horizons 2^8, 2^9, ..., 2^15
SEEDS = 8
OUTPUT = Path("out/horizon_free.png")
NAMES = "t^-0.4, last iterate", "t^-0.4, averaged", "cosine, a run per horizon"

# Excess risks, shape (horizons, seeds), by name.
Results = namedtuple("Results", ["horizons", "risks"])


def horizon_free(step: Any) -> Any:
    return PEAK * (step + 1) ** -GAMMA


def cosine(horizon: int) -> optax.Schedule:
    """Return a cosine to zero. Its best peak depends on the horizon, too."""
    return optax.cosine_decay_schedule(3.3 * PEAK * horizon**-GAMMA, horizon)


def excess_risk(w: jax.Array) -> jax.Array:
    """Return the expected squared error of a prediction, less the noise."""
    return jnp.sum(VARIANCES * (w - TRUE) ** 2)


def train(schedule: Any, horizons: Sequence[int], seeds: int) -> list[Any]:
    """Train once per seed; return the risks of iterate and average by horizon."""
    tx = optax.chain(optax.sgd(schedule), average_iterates(polynomial_weighting(3)))

    def train_step(step: jax.Array, carry: Any) -> Any:
        w, opt_state, key = carry
        normal = jax.random.normal(jax.random.fold_in(key, step), (D + 1,))
        x, noise = jnp.sqrt(VARIANCES) * normal[1:], normal[0]
        grads = (x @ w - (x @ TRUE + noise)) * x
        updates, opt_state = tx.update(grads, opt_state, w)
        return optax.apply_updates(w, updates), opt_state, key

    @jax.jit  # the bounds are traced, so it compiles once
    def train_from_to(carry: Any, first: int, last: int) -> Any:
        every_seed = jax.vmap(train_step, in_axes=(None, 0))
        return jax.lax.fori_loop(first, last, every_seed, carry)

    @jax.vmap
    def read(w: jax.Array, opt_state: Any, _: jax.Array) -> Any:
        return excess_risk(w), excess_risk(averaged_params(opt_state, w))

    w = jnp.zeros((seeds, D))
    carry = w, jax.vmap(tx.init)(w), jax.random.split(jax.random.key(0), seeds)
    done, risks = 0, []
    for horizon in horizons:
        carry, done = train_from_to(carry, done, horizon), horizon
        risks.append(read(*carry))  # reading changes nothing: the run goes on
    return risks


def draw(results: Results, output: Path) -> None:
    """Draw the excess risks over the horizons, mean over seeds."""
    plt.style.use(Path(__file__).with_name("style.mplstyle"))
    figure, axes = plt.subplots(figsize=(7, 4.2))
    horizons, risks = results
    for (name, values), style in zip(risks.items(), ["C0", "C1", "C2o"], strict=True):
        axes.plot(horizons, values.mean(axis=1), style, label=name)
    slope = -(B - 1) / max(A, B)  # from theory
    line = 0.04 * (horizons / horizons[0]) ** slope
    axes.plot(horizons, line, "k--", lw=1, label=f"slope {slope:g}")
    axes.set(xlabel="horizon (steps)", ylabel="excess risk", xscale="log", yscale="log")
    axes.set_title("One run without a horizon, and a cosine for each horizon")
    axes.legend()
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output)
    plt.close(figure)


def main(output: Path = OUTPUT, *, last: int = LAST, seeds: int = SEEDS) -> Results:
    horizons = [2**n for n in range(FIRST, last + 1)]
    iterate, average = np.array(train(horizon_free, horizons, seeds)).swapaxes(0, 1)
    cosines = [train(cosine(horizon), [horizon], seeds)[0][0] for horizon in horizons]
    risks = dict(zip(NAMES, (iterate, average, np.array(cosines)), strict=True))
    results = Results(np.array(horizons), risks)
    draw(results, output)
    print("| horizon |", " | ".join(NAMES), "|\n| ---: | ---: | ---: | ---: |")
    for horizon, *three in zip(horizons, *risks.values(), strict=True):
        print(f"| {horizon:7,} |", *(f"{risk.mean():.5f} |" for risk in three))
    return results


if __name__ == "__main__":
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=OUTPUT, help=f"default {OUTPUT}")
    main(parser.parse_args().output)
