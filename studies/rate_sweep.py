# SPDX-License-Identifier: Apache-2.0
"""A sweep over learning rates, starts of the averaging and seeds in one graph.

    python -m studies.rate_sweep

Trains the network of examples/digits.py at many constant learning rates from several
seeds. The learning rate and `t0` are traced arrays, so the whole sweep is one jitted
call. Minibatches and the noise on their pixels are drawn in the graph, once per seed,
so all learning rates see the same data. The parameters do not depend on `t0`, so one
run keeps an average for each `t0`: `jax.vmap` over the update batches only `mu` and
`ax`.

The figure shows the test accuracy, as means over the seeds. The first table lists the
learning rates that come near the best accuracy. The second table compares the time of
the sweep, with one `t0`, with that of the same runs one after another. Only a few of
these runs are timed, in a random order with the sweep, and their mean is multiplied.
"""

import itertools
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from matplotlib.ticker import LogLocator

from asgd_optax import ASGDState, asgd, averaged_params
from benchmarks import harness
from examples.digits import HIDDEN_UNITS, MAX_GRADIENT_NORM, Data, load_splits
from tools import command_line, report

with command_line.needs("bench"):
    import torch

RATES = (0.01, 5.0)  # the lowest and the highest
STARTS = np.arange(8) / 8  # of the averaging, as fractions of the steps
HALF = 4  # index of 1/2 in STARTS
BATCH_SIZE = 32
NOISE = 0.2  # standard deviation, on pixels in [0, 1]
NEAR = 0.01  # of the best accuracy
FAILED = 0.5  # accuracy; chance is 0.1
SWEEP = "JAX, one call"

# Which fields of the state of `optimizer` have an axis for `t0`. Made from a dict,
# because the fields are typed as arrays.
AXES: dict[str, Any] = {"step": None, "eta": None, "mu": 0, "ax": 0}
BATCHED_BY_T0 = (None, ASGDState(**AXES))


class Sizes(NamedTuple):
    """Sizes of the sweep; `samples` of the runs are timed one by one."""

    rates: int = 64
    seeds: int = 8
    steps: int = 1600
    samples: int = 4
    repetitions: int = 3

    @property
    def runs(self) -> int:
        return self.rates * self.seeds


class Accuracy(NamedTuple):
    """Test accuracy of the last iterate, (...), and of the averages, (..., t0s)."""

    last: Any
    average: Any


def optimizer(rate: Any, t0: Any) -> optax.GradientTransformation:
    """Return the chain of examples/digits.py."""
    clip = optax.clip_by_global_norm(MAX_GRADIENT_NORM)
    return optax.chain(clip, asgd(rate, lambd=0.0, t0=t0))


def init_params(key: jax.Array) -> dict[str, jax.Array]:
    """Draw weights with the names and shapes of `torch_model`."""
    keys = jax.random.split(key)
    weights = jax.nn.initializers.lecun_normal(in_axis=-1, out_axis=-2)
    return {
        "0.weight": weights(keys[0], (HIDDEN_UNITS, 64)),
        "0.bias": jnp.zeros(HIDDEN_UNITS),
        "2.weight": weights(keys[1], (10, HIDDEN_UNITS)),
        "2.bias": jnp.zeros(10),
    }


def logits_of(params: dict[str, jax.Array], images: jax.Array) -> jax.Array:
    hidden = jax.nn.relu(images @ params["0.weight"].T + params["0.bias"])
    return hidden @ params["2.weight"].T + params["2.bias"]


def loss(params: dict[str, jax.Array], batch: Data) -> jax.Array:
    logits = logits_of(params, batch.images)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
    return jnp.mean(losses)


def draw_batch(data: Data, key: jax.Array) -> Data:
    """Draw a minibatch with replacement, with noise on the pixels."""
    keys = jax.random.split(key)
    picked = jax.random.randint(keys[0], (BATCH_SIZE,), 0, len(data.labels))
    images = data.images[picked]
    errors = jax.random.normal(keys[1], images.shape)
    return Data(images + NOISE * errors, data.labels[picked])


def run(
    steps: int, training: Data, test: Data, seed: Any, rate: Any, t0s: Any
) -> Accuracy:
    """Train one network; its averages begin at each of `t0s`, of shape (t0s,)."""

    def update(t0: Any, grads: Any, state: Any, params: Any) -> Any:
        return optimizer(rate, t0).update(grads, state, params)

    update_all = jax.vmap(
        update, in_axes=(0, None, BATCHED_BY_T0, None), out_axes=(None, BATCHED_BY_T0)
    )

    def train_step(carry: Any, key: jax.Array) -> Any:
        params, state = carry
        grads = jax.grad(loss)(params, draw_batch(training, key))
        updates, state = update_all(t0s, grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    def accuracy(params: Any) -> jax.Array:
        predicted = jnp.argmax(logits_of(params, test.images), axis=-1)
        return jnp.mean(predicted == test.labels)

    first, key = jax.random.split(jax.random.key(seed))
    params = init_params(first)
    state = jax.vmap(lambda t0: optimizer(rate, t0).init(params), 0, BATCHED_BY_T0)(t0s)
    keys = jax.random.split(key, steps)
    (params, state), _ = jax.lax.scan(train_step, (params, state), keys)
    return Accuracy(accuracy(params), jax.vmap(accuracy)(averaged_params(state)))


def sweep(
    steps: int, training: Data, test: Data, seeds: Any, rates: Any, t0s: Any
) -> Accuracy:
    """Return all accuracies, of shapes (seeds, rates) and (seeds, rates, t0s)."""

    def all_rates(seed: jax.Array) -> Accuracy:
        return jax.vmap(lambda rate: run(steps, training, test, seed, rate, t0s))(rates)

    # The networks of one seed fit into the cache; those of all seeds do not.
    return jax.lax.map(all_rates, seeds)


def compiled(function: Callable[..., Any], *like: Any) -> tuple[Any, float]:
    """Compile `function` for such arguments; return it with the compile time."""
    began = time.perf_counter()
    program = jax.jit(function).lower(*like).compile()
    seconds = time.perf_counter() - began
    return lambda *args: jax.block_until_ready(program(*args)), seconds


def torch_model(seed: Any) -> torch.nn.Module:
    """Return the network, with the initial weights of the JAX run of this seed."""
    model = torch.nn.Sequential(
        torch.nn.Linear(64, HIDDEN_UNITS),
        torch.nn.ReLU(),
        torch.nn.Linear(HIDDEN_UNITS, 10),
    )
    first, _ = jax.random.split(jax.random.key(seed))
    weights = {k: torch.tensor(np.array(v)) for k, v in init_params(first).items()}
    model.load_state_dict(weights)
    return model


def torch_run(
    steps: int, training: Data, test: Data, seed: Any, rate: Any, foreach: bool
) -> Accuracy:
    """Train as `run`, with one average that begins at half of the steps."""
    model, generator = torch_model(seed), torch.Generator().manual_seed(int(seed))
    optimizer = torch.optim.ASGD(
        model.parameters(), float(rate), lambd=0.0, t0=steps / 2, foreach=foreach
    )
    images, labels = map(torch.from_numpy, training)
    for _ in range(steps):
        picked = torch.randint(len(labels), (BATCH_SIZE,), generator=generator)
        errors = torch.randn(BATCH_SIZE, 64, generator=generator)
        logits = model(images[picked] + NOISE * errors)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(logits, labels[picked]).backward()
        torch.nn.utils.clip_grad_norm_(
            model.parameters(), MAX_GRADIENT_NORM, foreach=foreach
        )
        optimizer.step()

    def accuracy(params: dict[str, torch.Tensor]) -> float:
        logits = torch.func.functional_call(
            model, params, torch.from_numpy(test.images)
        )
        correct = logits.argmax(dim=-1) == torch.from_numpy(test.labels)
        return correct.float().mean().item()

    params = dict(model.named_parameters())
    averages = {name: optimizer.state[p]["ax"] for name, p in params.items()}
    return Accuracy(accuracy(params), accuracy(averages))


def in_turn(run_one: Callable[..., Any], samples: Any) -> harness.Contestant:
    """Time the sampled runs, one per call."""

    def setup() -> Callable[[], Any]:
        runs = itertools.cycle(samples)
        return lambda: run_one(*next(runs))

    return harness.Contestant(setup, len(samples))


def measure_times(
    sweep_half: Any, run_half: Any, torch_half: Any, samples: Any, sizes: Sizes
) -> dict[str, harness.Time]:
    """Return the seconds of all runs; those in turn are extrapolated from samples."""
    contestants = {
        SWEEP: harness.Contestant(lambda: sweep_half, 1),
        "JAX, in turn": in_turn(run_half, samples),
        "torch, in turn": in_turn(partial(torch_half, foreach=False), samples),
        "torch, in turn, foreach": in_turn(partial(torch_half, foreach=True), samples),
    }
    times = harness.measure(contestants, sizes.repetitions)
    return {
        name: seconds
        if name == SWEEP
        else harness.Time(*(sizes.runs * np.array(seconds)))
        for name, seconds in times.items()
    }


def time_table(times: dict[str, harness.Time], sizes: Sizes) -> str:
    sweep_time = times[SWEEP].median
    rows = []
    for name, seconds in times.items():
        whole = name == SWEEP
        timed = "all" if whole else f"{sizes.samples} of {sizes.runs}"
        quartiles = f"{seconds.low:.3g} to {seconds.high:.3g}"
        ratio = f"{seconds.median / sweep_time:.1f}"
        rows.append([name, timed, f"{seconds.median:.3g}", quartiles, ratio])
    header = [f"{sizes.runs} runs", "runs timed", "time (s)", "quartiles", "ratio"]
    return report.table(header, rows)


def near_best(rates: np.ndarray, mean: np.ndarray, best: float) -> list[str]:
    """Format two cells: the range and the number of learning rates near the best."""
    near = rates[mean >= best - NEAR]
    if not near.size:
        return ["none", "0"]
    low, high = near[0], near[-1]
    return [f"{low:.2g} to {high:.2g} ({high / low:.1f}-fold)", f"{near.size}"]


def range_table(rates: np.ndarray, last: np.ndarray, average: np.ndarray) -> str:
    """Format where mean accuracies, (rates,) and (rates, t0s), are near the best."""
    best = max(last.max(), average.max())
    widest = int(np.argmax(np.sum(average >= best - NEAR, axis=0)))
    means = {
        "last iterate": last,
        "average, from half of the steps": average[:, HALF],
        f"average, from {STARTS[widest]:g} of them, the widest": average[:, widest],
    }
    rows = [
        [
            name,
            f"{100 * mean.max():.2f}",
            f"{rates[mean.argmax()]:.2g}",
            *near_best(rates, mean, best),
            *near_best(rates, mean, mean.max()),
        ]
        for name, mean in means.items()
    ]
    near_all, near_own = "near the best of all", "near its own best"
    count = "learning rates"
    header = ["", "best (%)", "at learning rate", near_all, count, near_own, count]
    return report.table(header, rows)


def draw(rates: np.ndarray, results: Accuracy, output: Path) -> None:
    """Draw the last iterate's accuracies as a strip, the averages' as a map."""
    plt.style.use(report.STYLE)
    figure, (strip, heat) = plt.subplots(
        2,
        sharex=True,
        figsize=(7.5, 4.6),
        gridspec_kw={"height_ratios": (1, len(STARTS))},
    )
    best = max(np.mean(scores, axis=0).max() for scores in results)
    half_cell = np.sqrt(rates[1] / rates[0])
    edges = np.append(rates / half_cell, rates[-1] * half_cell)
    for axes, accuracies in (
        (strip, results.last[..., None]),
        (heat, results.average),
    ):
        mean, worst = accuracies.mean(axis=0).T, accuracies.min(axis=0).T
        mesh = axes.pcolormesh(
            edges,
            np.arange(len(mean) + 1) - 0.5,
            100 * mean,
            cmap=plt.get_cmap("viridis").with_extremes(under="0.85"),
            vmin=100 * best - 6,
            vmax=100 * best,
        )
        for name, marked, marker in (
            (f"within {100 * NEAR:g} point of the best", mean >= best - NEAR, "o"),
            (f"a seed below {100 * FAILED:g} %", worst < FAILED, "x"),
        ):
            y, x = np.nonzero(marked)
            axes.scatter(rates[x], y, s=7, c="k", marker=marker, lw=0.8, label=name)
        axes.grid(visible=False)
    strip.set_yticks([0], ["last iterate"])
    heat.set_yticks(range(len(STARTS)), [f"{start:g}" for start in STARTS])
    heat.set(
        xscale="log",
        xlabel="learning rate",
        ylabel="averaging begins at (fraction of the steps)",
    )
    heat.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    heat.xaxis.set_major_formatter("{x:g}")
    heat.xaxis.set_minor_formatter("")
    figure.colorbar(
        mesh, ax=(strip, heat), extend="min", label="test accuracy (%), mean over seeds"
    )
    handles, labels = heat.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=2)
    figure.savefig(output)
    plt.close(figure)


TEXT = """\
# A sweep of the learning rate in one graph

{runs} runs of {steps:,} steps: {rates} constant learning rates from {low:g} to \
{high:g}, {seeds} seeds each. They train the network of `examples/digits.py` \
(64-{hidden}-10) in float32, on {batch} images per step with noise of {noise} on their \
pixels. Gradients are clipped to norm {clip:g}. Each run keeps {starts} averages, \
which begin at 0 to {latest:g} of the steps. The whole sweep is one jitted call: it \
takes {all_seconds:.1f} s (timed once) after {all_compile:.1f} s of compilation.

Test accuracy, mean over the seeds. *near*: the lowest and the highest learning rate \
within {near:g} point of the best accuracy of the table, or of the row. The next \
column has the number of such learning rates out of {rates}. In {lost} of the {runs} \
runs the last iterate is below {failed:g} %.

{ranges}

![Test accuracy by learning rate and start of the averaging](rate_sweep.png)

Time of the {runs} runs with one average each, from half of the steps on: medians of \
{repetitions}, in random order, without compilation. *JAX, one call*: the learning \
rates by `vmap`, the seeds by `lax.map`; compiled in {half_compile:.1f} s. *In turn*: \
one run after another. In JAX each run is one jitted call (compiled in \
{run_compile:.1f} s). In torch it is eager `torch.optim.ASGD`, with the faster of 1 \
and {cores} threads ({threads}). Times in turn are extrapolated: {samples} whole runs \
were timed and their mean multiplied by {runs}.

{table}

Mean test accuracy (%) of the {samples} timed runs, one seed each, at learning rates \
from {samples_low:.2g} to {samples_high:.2g}: {ours[0]:.1f} in JAX and \
{theirs[0]:.1f} in torch; of their averages {ours[1]:.1f} and {theirs[1]:.1f}. \
Initial weights are the same; minibatches and noise are each library's own.
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Sweep, time, and write the tables and the picture."""
    parser = command_line.report_parser("A sweep of the learning rate in one graph.")
    options = parser.parse_args(argv)
    jax.config.update("jax_platforms", "cpu")  # as torch
    sizes = Sizes()
    if options.quick:
        sizes = Sizes(rates=8, seeds=2, steps=40, samples=2, repetitions=2)
    training, _, test = load_splits()
    rates = np.geomspace(*RATES, sizes.rates, dtype=np.float32)
    seeds = np.arange(sizes.seeds)
    t0s = (sizes.steps * STARTS).astype(np.float32)
    half = t0s[[HALF]]

    data = jax.tree.map(jnp.asarray, (training, test))
    sweep_part = partial(sweep, sizes.steps, *data)
    run_part = partial(run, sizes.steps, *data)
    sweep_all, all_compile = compiled(sweep_part, seeds, rates, t0s)
    sweep_half, half_compile = compiled(sweep_part, seeds, rates, half)
    run_half, run_compile = compiled(run_part, seeds[0], rates[0], half)
    torch_half = partial(torch_run, sizes.steps, training, test)

    began = time.perf_counter()
    results = Accuracy(*map(np.asarray, sweep_all(seeds, rates, t0s)))
    all_seconds = time.perf_counter() - began

    # One per seed, at learning rates from the middle of the range.
    ends = sizes.rates // 4, 3 * sizes.rates // 4
    picked = np.linspace(*ends, sizes.samples).astype(int)
    samples = list(zip(seeds, rates[picked], strict=False))
    which = np.arange(sizes.samples), picked
    cores = torch.get_num_threads()
    trial = partial(torch_run, 100, training, test, *samples[0], foreach=False)
    harness.choose_torch_threads(trial)
    ours = results.last[which], results.average[*which, HALF]
    theirs = [torch_half(seed, rate, foreach=False) for seed, rate in samples]

    times = measure_times(
        partial(sweep_half, seeds, rates, half),
        lambda seed, rate: run_half(seed, rate, half),
        torch_half,
        samples,
        sizes,
    )
    text = TEXT.format(
        **sizes._asdict(),
        runs=sizes.runs,
        low=RATES[0],
        high=RATES[1],
        hidden=HIDDEN_UNITS,
        batch=BATCH_SIZE,
        noise=NOISE,
        clip=MAX_GRADIENT_NORM,
        starts=len(STARTS),
        latest=STARTS[-1],
        all_seconds=all_seconds,
        all_compile=all_compile,
        half_compile=half_compile,
        run_compile=run_compile,
        threads=torch.get_num_threads(),
        cores=cores,
        near=100 * NEAR,
        failed=100 * FAILED,
        lost=np.sum(results.last < FAILED),
        ranges=range_table(rates, results.last.mean(0), results.average.mean(0)),
        table=time_table(times, sizes),
        samples_low=rates[picked[0]],
        samples_high=rates[picked[-1]],
        ours=100 * np.mean(ours, axis=1),
        theirs=100 * np.mean(theirs, axis=0),
    )
    report.write("studies.rate_sweep", text, options.output)
    draw(rates, results, options.output / "rate_sweep.png")


if __name__ == "__main__":
    main()
