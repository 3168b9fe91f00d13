# SPDX-License-Identifier: Apache-2.0
"""Test loss over the decay of an EMA, under four learning-rate schedules.

    python -m studies.decay_sweep

Trains the network of `examples/first_ema.py` once per seed and schedule. Each run keeps
EMAs of several decays and three averages that need none. All seeds of a schedule train
in one scan, under `jax.vmap`. The first schedule, a constant learning rate, is the
program of the README.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import matplotlib.pyplot as plt
import numpy as np
import optax

from asgd_optax import average_iterates, averaged_params, polynomial_weighting
from examples import first_ema
from tools import command_line, report

DECAYS = 0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999, 0.9995, 0.9998, 0.9999
SEEDS, STEPS = 20, first_ema.STEPS
LAST, HALF, POLYNOMIAL = "last iterate", "uniform, second half", "polynomial, gamma 3"
# The columns of the table of schedules.
COMPARED = [LAST, "EMA 0.99", "EMA 0.999", HALF, POLYNOMIAL]

Losses = dict[str, np.ndarray]  # test losses of shape (seeds,), by name of the average


def half_life(decay: float) -> float:
    """Return the number of steps after which a weight has halved."""
    return math.log(0.5) / math.log(decay)


def schedules(steps: int) -> dict[str, Any]:
    """Return the learning rates, all with the same peak, by name."""
    rate = first_ema.RATE
    constant = optax.constant_schedule(rate)
    decay = optax.linear_schedule(rate, 0.0, steps - 4 * steps // 5)
    return {
        "constant": constant,
        "cosine to 10 %": optax.cosine_decay_schedule(rate, steps, alpha=0.1),
        "constant, last 20 % linear to 0": optax.join_schedules(
            [constant, decay], [4 * steps // 5]
        ),
        "cosine to 0": optax.cosine_decay_schedule(rate, steps),
    }


def averages(steps: int) -> dict[str, optax.GradientTransformation]:
    """Return the averages that each run keeps."""
    return {f"EMA {decay:g}": average_iterates(decay) for decay in DECAYS} | {
        "uniform": average_iterates(),
        HALF: average_iterates(start=steps // 2),
        POLYNOMIAL: average_iterates(polynomial_weighting(3)),
    }


def train(schedules: dict[str, Any], steps: int, seeds: int) -> dict[str, Losses]:
    """Train a network per schedule and seed; return the losses by schedule."""
    kept = averages(steps)

    def run(seed: jax.Array, rates: jax.Array) -> dict[str, jax.Array]:
        adam = optax.adam(lambda count: rates[count])
        tx = optax.named_chain(("adam", adam), *kept.items())

        def train_step(carry: Any, key: jax.Array) -> Any:
            params, opt_state = carry
            grads = jax.grad(first_ema.loss)(params, *first_ema.minibatch(key))
            updates, opt_state = tx.update(grads, opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), None

        w_key, b_key, data_key = jax.random.split(jax.random.key(seed), 3)
        params = first_ema.init_params(w_key, b_key)
        keys = jax.random.split(data_key, steps)
        carry = params, tx.init(params)
        (params, opt_state), _ = jax.lax.scan(train_step, carry, keys)
        readings = {LAST: params}
        for name in kept:
            readings[name] = averaged_params(opt_state[name], params)
        test = first_ema.test_set()
        return {name: first_ema.loss(p, *test) for name, p in readings.items()}

    # The learning rates are an argument, so all schedules share one compilation.
    every_seed = jax.jit(jax.vmap(run, in_axes=(0, None)))
    results = {}
    for schedule_name, schedule in schedules.items():
        rates = jax.vmap(schedule)(np.arange(steps))
        losses = every_seed(np.arange(seeds), rates)
        results[schedule_name] = {n: np.asarray(losses[n]) for n in (LAST, *kept)}
    return results


def wins(losses: Losses, name: str) -> int:
    """Count the seeds in which an average beats the last iterate."""
    return int(np.sum(losses[name] < losses[LAST]))


def average_table(losses: Losses) -> str:
    """Format the averages of one schedule."""
    lives = {f"EMA {decay:g}": f"{half_life(decay):,.1f}" for decay in DECAYS}
    rows = [
        [
            name,
            lives.get(name, ""),
            report.spread(values, 5),
            "" if name == LAST else f"{wins(losses, name)} of {len(values)}",
        ]
        for name, values in losses.items()
    ]
    return report.table(["", "half-life (steps)", "test loss", "beats the last"], rows)


def schedule_table(results: dict[str, Losses]) -> str:
    """Format the mean losses and the wins of some averages under each schedule."""
    rows = []
    for schedule, losses in results.items():
        cells = [f"{losses[LAST].mean():.5f}"]
        for name in COMPARED[1:]:
            cells.append(f"{losses[name].mean():.5f} ({wins(losses, name)})")
        rows.append([schedule, *cells])
    return report.table(["learning rate", *COMPARED], rows)


def draw(losses: Losses, output: Any) -> None:
    """Draw the losses of the EMAs over their half-lives, mean ± sd over the seeds."""
    plt.style.use(report.STYLE)
    figure, axes = plt.subplots(figsize=(7, 4.2))
    lives = np.array([half_life(decay) for decay in DECAYS])
    values = np.stack([losses[f"EMA {decay:g}"] for decay in DECAYS])
    mean, deviation = values.mean(axis=1), values.std(axis=1, ddof=1)
    axes.plot(lives, mean, "o-", color="C1")
    band = mean - deviation, mean + deviation
    axes.fill_between(lives, *band, fc="C1", alpha=0.2, lw=0)
    axes.text(lives[1], 1.2 * mean[1], "EMA", color="C1")
    for name, color in (LAST, "C0"), ("uniform", "C2"), (POLYNOMIAL, "C4"):
        level = losses[name].mean()
        axes.axhline(level, color=color)
        side = axes.get_yaxis_transform()  # x from 0 to 1, y in the units of the loss
        axes.text(
            0.99, level, name, color=color, ha="right", va="bottom", transform=side
        )
    axes.set(xscale="log", yscale="log", ylabel="test loss")
    axes.set(xlabel="half-life of the EMA (steps)")
    axes.set_ylim(top=2 * losses[LAST].mean())
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_title("Test loss by decay: mean ± standard deviation over the seeds")
    top = axes.secondary_xaxis("top")
    top.set_xticks(lives[::2], [f"{decay:g}" for decay in DECAYS[::2]])
    top.minorticks_off()
    top.set_xlabel("decay")
    figure.savefig(output)
    plt.close(figure)


PAGE = """\
# Decay of an EMA, and learning-rate schedules

The network of `examples/first_ema.py`, Adam with a peak learning rate of {rate:g}, \
{steps:,} steps of {batch} noisy samples of a sine, {seeds} seeds. The test loss is \
the mean squared error from the sine itself. *Beats the last*: the number of seeds in \
which the average has a lower test loss than the last iterate. An EMA is \
`average_iterates(decay)`; its half-life is log 0.5 / log decay.

Constant learning rate, mean ± standard deviation over the seeds:

{averages}

![Test loss by half-life of the EMA](decay_sweep.png)

Under other schedules, means over the seeds; in brackets the number of seeds in which \
the average beats the last iterate:

{schedules}
"""


def main(argv: Sequence[str] | None = None) -> dict[str, Losses]:
    """Train, write the tables and the picture, and return the losses."""
    parser = command_line.report_parser("Test loss over the decay of an EMA.")
    options = parser.parse_args(argv)
    steps, seeds = (200, 2) if options.quick else (STEPS, SEEDS)
    results = train(schedules(steps), steps, seeds)
    page = PAGE.format(
        rate=first_ema.RATE,
        steps=steps,
        batch=first_ema.BATCH_SIZE,
        seeds=seeds,
        averages=average_table(results["constant"]),
        schedules=schedule_table(results),
    )
    report.write("studies.decay_sweep", page, options.output)
    draw(results["constant"], options.output / "decay_sweep.png")
    return results


if __name__ == "__main__":
    main()
