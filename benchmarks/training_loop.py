# SPDX-License-Identifier: Apache-2.0
"""Cost of a whole training step: forward, backward, update and average.

    python -m benchmarks.training_loop

The network of examples/digits.py (64-64-10, relu, cross-entropy) learns in float32 from
the same initial weights and the same minibatches of 32, which are drawn beforehand.

JAX runs in two forms: one `jax.lax.scan` over a block of batches, and a Python loop
that calls a jitted step with donated state for each batch. Both get NumPy arrays, as
from a data loader, and wait only for the last result of a block.

Torch runs its usual loop on tensors made beforehand. A short trial chooses between its
default number of threads and one. Its compiled row follows PyTorch's recipe "Compiling
the optimizer with torch.compile", with an eager network; `--quick` leaves it out, and
so does a machine without a C++ compiler.

Before anything is timed, every row of torch must reach the weights and averages of its
counterpart in JAX. Repetitions of all rows are timed in a random order, so a machine
that slows down slows all of them alike. Medians and quartiles are reported.
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from matplotlib.patches import Patch

from asgd_optax import asgd, average_iterates, averaged_params
from benchmarks import by_hand, harness
from examples import digits
from tools import command_line, report

with command_line.needs("bench"):
    import torch
    from torch.nn.functional import cross_entropy
    from torch.optim.swa_utils import AveragedModel

RATE = 0.1
TOLERANCE = 1e-3  # largest difference in an array, over its largest element
TRIAL = 20  # steps, to choose torch's threads
BASE = "optax.sgd"
HAND, OURS = ", by hand", ", average_iterates"
TORCH_BASE = "torch SGD"
TORCH_ASGD = "torch ASGD"

torch_sgd = partial(torch.optim.SGD, lr=RATE)
torch_asgd = partial(torch.optim.ASGD, lr=RATE, lambd=0.0, t0=0)

Batches = Sequence[digits.Data]
Params = dict[str, np.ndarray]
OptimizerOf = Callable[[Any], torch.optim.Optimizer]  # takes the parameters


class Sizes(NamedTuple):
    """Steps per block, blocks per repetition in each form, and repetitions."""

    steps: int
    scan_calls: int
    loop_calls: int
    torch_calls: int
    repetitions: int


FULL = Sizes(steps=500, scan_calls=30, loop_calls=10, torch_calls=1, repetitions=15)
QUICK = Sizes(steps=10, scan_calls=1, loop_calls=1, torch_calls=1, repetitions=2)


class Recipe(NamedTuple):
    """A training in JAX: params -> carry, and (carry, batch) -> carry.

    The first two parts of the carry are the parameters and the optimizer's state.
    """

    init: Callable[[Params], Any]
    step: Callable[[Any, digits.Data], Any]


class Row(NamedTuple):
    """Microseconds per step; torch has no scan."""

    scan: harness.Time | None
    loop: harness.Time


class TorchTraining(NamedTuple):
    """A training in torch.

    Attributes:
      counterpart: the recipe in JAX that does the same work.
      run: continues training on all the batches.
      results: the weights, and their averages (empty if it keeps none).
    """

    counterpart: str
    run: Callable[[], None]
    results: Callable[[], tuple[Params, Params]]


def draw_batches(steps: int) -> list[digits.Data]:
    """Draw minibatches of the digits, with 32-bit labels (torch makes them 64-bit)."""
    training, _, _ = digits.load_splits()
    stream = digits.minibatches(training, size=32, noise=0.2, seed=0)
    return [
        batch._replace(labels=batch.labels.astype(np.int32))
        for batch in islice(stream, steps)
    ]


def draw_params() -> Params:
    """Draw weights for relu (He et al.), with biases of zero."""
    rng = np.random.default_rng(0)
    params = {}
    for name, rows, columns in (
        ("1", 64, digits.HIDDEN_UNITS),
        ("2", digits.HIDDEN_UNITS, 10),
    ):
        weights = rng.normal(0, np.sqrt(2 / rows), (rows, columns))
        params[f"w{name}"] = weights.astype(np.float32)
        params[f"b{name}"] = np.zeros(columns, np.float32)
    return params


def loss(params: Params, batch: digits.Data) -> jax.Array:
    hidden = jax.nn.relu(batch.images @ params["w1"] + params["b1"])
    logits = hidden @ params["w2"] + params["b2"]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
    return jnp.mean(losses)


def train_with(tx: optax.GradientTransformation) -> Recipe:
    """Return the usual training step."""

    def init(params: Params) -> Any:
        # Copy, because the steps donate their carry.
        params = jax.tree.map(jnp.array, params)
        return params, tx.init(params)

    def step(carry: Any, batch: digits.Data) -> Any:
        params, state = carry
        grads = jax.grad(loss)(params, batch)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return Recipe(init, step)


def with_average(recipe: Recipe, average: by_hand.ByHand) -> Recipe:
    """Add a hand-written average of the parameters."""

    def init(params: Params) -> Any:
        return *recipe.init(params), average.init(params)

    def step(carry: Any, batch: digits.Data) -> Any:
        *carry, state = carry
        carry = recipe.step(carry, batch)
        return *carry, average.update(state, carry[0])

    return Recipe(init, step)


def train_by_hand(optimizer: by_hand.Optimizer) -> Recipe:
    """Return the training step of a hand-written optimizer."""

    def init(params: Params) -> Any:
        params = jax.tree.map(jnp.array, params)
        return params, optimizer.init(params)

    def step(carry: Any, batch: digits.Data) -> Any:
        params, state = carry
        return optimizer.step(params, state, jax.grad(loss)(params, batch))

    return Recipe(init, step)


def recipes() -> dict[str, Recipe]:
    """Return the rows of JAX; each of ours comes after the same written by hand."""
    sgd = optax.sgd(RATE)
    rows = {BASE: train_with(sgd), "optax.adam": train_with(optax.adam(1e-3))}
    for name, rule in by_hand.RULES.items():
        average = average_iterates(rule.weighting)
        rows[name + HAND] = with_average(train_with(sgd), by_hand.average(rule))
        rows[name + OURS] = train_with(optax.chain(sgd, average))
    rows["asgd" + HAND] = train_by_hand(by_hand.asgd(RATE, lambd=0.0, t0=0))
    rows["asgd"] = train_with(asgd(RATE, lambd=0.0, t0=0))
    return rows


def scanned(recipe: Recipe, batches: Batches) -> Callable[[Any], Any]:
    """Return a function that trains on all the batches in one call."""

    def body(carry: Any, batch: digits.Data) -> Any:
        return recipe.step(carry, batch), None

    def advance(carry: Any, batches: digits.Data) -> Any:
        return jax.lax.scan(body, carry, batches)[0]

    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *batches)
    compiled = jax.jit(advance, donate_argnums=0)
    return lambda carry: compiled(carry, stacked)


def looped(recipe: Recipe, batches: Batches) -> Callable[[Any], Any]:
    """Return a function that trains on all the batches, one call per batch."""
    compiled = jax.jit(recipe.step, donate_argnums=0)

    def advance(carry: Any) -> Any:
        for batch in batches:
            carry = compiled(carry, batch)
        return carry

    return advance


def jax_contestant(
    init: Callable[[], Any], advance: Callable[[Any], Any], calls: int
) -> harness.Contestant:
    """Return a contestant that trains from the start in every repetition."""

    def setup() -> Callable[[], None]:
        carry = init()

        def run() -> None:
            nonlocal carry
            carry = jax.block_until_ready(advance(carry))

        return run

    return harness.Contestant(setup, calls)


def torch_training(
    counterpart: str,
    optimizer_of: OptimizerOf,
    params: Params,
    batches: Batches,
    *,
    averaged: bool = False,
    compiled: bool = False,
) -> TorchTraining:
    """Return the usual loop of torch, with the same network and initial weights."""
    tensors = [
        (torch.from_numpy(images), torch.from_numpy(labels).long())
        for images, labels in batches
    ]
    model = torch.nn.Sequential(
        torch.nn.Linear(*params["w1"].shape),
        torch.nn.ReLU(),
        torch.nn.Linear(*params["w2"].shape),
    )
    weights = dict(zip(("w1", "b1", "w2", "b2"), model.parameters(), strict=True))
    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(torch.from_numpy(params[name].T))
    optimizer = optimizer_of(model.parameters())
    average = AveragedModel(model) if averaged else None

    step = optimizer.step
    if compiled:
        step = torch.compile(lambda: optimizer.step())

    def run() -> None:
        for images, labels in tensors:
            optimizer.zero_grad()
            cross_entropy(model(images), labels).backward()
            step()
            if average is not None:
                average.update_parameters(model)

    def results() -> tuple[Params, Params]:
        if average is not None:
            averages = dict(zip(weights, average.parameters(), strict=True))
        else:
            states = {name: optimizer.state[w] for name, w in weights.items()}
            averages = {name: s["ax"] for name, s in states.items() if "ax" in s}
        return as_params(weights), as_params(averages)

    return TorchTraining(counterpart, run, results)


def as_params(tensors: dict[str, torch.Tensor]) -> Params:
    """Convert tensors to the layout of JAX."""
    return {name: tensor.detach().numpy().T for name, tensor in tensors.items()}


def torch_contestant(training: TorchTraining, calls: int) -> harness.Contestant:
    """Return a contestant that continues training: new weights would recompile."""
    return harness.Contestant(lambda: training.run, calls)


def torch_trainings(
    params: Params, batches: Batches, *, compiled: bool
) -> dict[str, TorchTraining]:
    def make(
        counterpart: str, optimizer_of: OptimizerOf, **options: bool
    ) -> TorchTraining:
        return torch_training(counterpart, optimizer_of, params, batches, **options)

    averaged = f"uniform{OURS}"
    trainings = {
        TORCH_BASE: make(BASE, torch_sgd),
        f"{TORCH_BASE} + AveragedModel": make(averaged, torch_sgd, averaged=True),
        TORCH_ASGD: make("asgd", torch_asgd),
        f"{TORCH_ASGD}, foreach": make("asgd", partial(torch_asgd, foreach=True)),
    }
    if compiled:
        # Capturable, so that the step's count is a tensor.
        form = partial(torch_asgd, foreach=True, capturable=True)
        trainings[f"{TORCH_ASGD}, compiled step"] = make("asgd", form, compiled=True)
    return trainings


def check_same_work(
    trainings: dict[str, TorchTraining], carries: dict[str, Any]
) -> float:
    """Train a block in torch and return the largest difference from JAX.

    Raises:
      RuntimeError: If they reach different weights or averages.
    """
    largest = 0.0
    for name, training in trainings.items():
        training.run()
        weights, averages = training.results()
        params, state, *_ = carries[training.counterpart]
        pairs = {"weights": (weights, params)}
        if averages:
            pairs["averages"] = (averages, averaged_params(state, params))
        for kind, (found, expected) in pairs.items():
            for leaf, wanted in expected.items():
                difference = np.abs(found[leaf] - wanted).max() / np.abs(wanted).max()
                if not difference <= TOLERANCE:
                    raise RuntimeError(
                        f"{name} is not the same work as {training.counterpart}:"
                        f" their {kind} {leaf} differ by {difference:.1e}"
                    )
                largest = max(largest, float(difference))
    return largest


def choose_threads(params: Params, batches: Batches) -> str:
    """Set torch's faster number of threads, and describe the trial."""
    training = torch_training("asgd", torch_asgd, params, batches)
    seconds = harness.choose_torch_threads(training.run)
    tried = ", ".join(
        f"{1e6 * time / len(batches):,.0f} µs with {n}" for n, time in seconds.items()
    )
    best = torch.get_num_threads()
    return f"{best} (a step of {TORCH_ASGD} in a short trial: {tried})"


def measure(
    params: Params, batches: Batches, trainings: dict[str, TorchTraining], sizes: Sizes
) -> tuple[dict[str, Row], float]:
    """Return the rows, and the largest difference between torch and JAX."""
    contestants, carries = {}, {}
    for name, recipe in recipes().items():
        init = partial(recipe.init, params)
        scan, loop = scanned(recipe, batches), looped(recipe, batches)
        carries[name] = scan(init())
        contestants[f"scan {name}"] = jax_contestant(init, scan, sizes.scan_calls)
        contestants[f"loop {name}"] = jax_contestant(init, loop, sizes.loop_calls)
    for name, training in trainings.items():
        contestants[f"loop {name}"] = torch_contestant(training, sizes.torch_calls)
    largest = check_same_work(trainings, carries)
    times = {
        name: harness.Time(*(1e6 * seconds / sizes.steps for seconds in time))
        for name, time in harness.measure(contestants, sizes.repetitions).items()
    }
    rows = {
        name: Row(times.get(f"scan {name}"), times[f"loop {name}"])
        for name in [*carries, *trainings]
    }
    return rows, largest


def format_rows(rows: dict[str, Row]) -> str:
    """Format the table: ratios to SGD, to the same by hand, and to torch's ASGD."""

    def spread(time: harness.Time | None) -> str:
        if time is None:
            return ""
        return f"{time.median:.1f} ({time.low:.1f} to {time.high:.1f})"

    def ratio(over: harness.Time | None, under: harness.Time | None) -> str:
        if over is None or under is None:
            return ""
        return f"{over.median / under.median:.2f}"

    lines = []
    peer = rows[TORCH_ASGD].loop
    for name, row in rows.items():
        base = rows[BASE if row.scan else TORCH_BASE]
        same = rows.get(name.removesuffix(OURS) + HAND)
        lines.append(
            [
                name,
                spread(row.scan),
                spread(row.loop),
                ratio(row.scan, base.scan),
                ratio(row.loop, base.loop),
                ratio(row.scan, same and same.scan),
                ratio(row.loop, same and same.loop),
                ratio(peer, row.scan),
                ratio(peer, row.loop),
            ]
        )
    header = [
        "",
        "scan (µs)",
        "loop (µs)",
        "scan / SGD",
        "loop / SGD",
        "scan / by hand",
        "loop / by hand",
        f"{TORCH_ASGD} / scan",
        f"{TORCH_ASGD} / loop",
    ]
    return report.table(header, lines)


def format_page(
    rows: dict[str, Row], sizes: Sizes, threads: str, largest: float
) -> str:
    peers = {n: row.loop for n, row in rows.items() if n.startswith(TORCH_ASGD)}
    fastest = min(peers, key=lambda name: peers[name].median)
    scan, loop = (peers[fastest].median / time.median for time in rows["asgd"] if time)
    return f"""\
# Cost of a training step

Microseconds per step (forward, backward, update and average) of a 64-64-10 network on
minibatches of 32 in float32, on the CPU. Medians (and quartiles) over
{sizes.repetitions} repetitions of blocks of {sizes.steps} steps. *scan*: a block is one
`jax.lax.scan`; *loop*: a Python loop that calls a jitted step for each batch.

{format_rows(rows)}

- *by hand*: the same rule as a `tree_map` after `apply_updates` (`by_hand.py`); the EMA
  has decay {by_hand.DECAY}. The rows of averages use `{BASE}` too.
- *SGD* is `{BASE}` for the rows of JAX and `{TORCH_BASE}` for those of torch.
  *{TORCH_ASGD}* is `torch.optim.ASGD` with its defaults, the row of that name.
- Compared with torch's fastest form of ASGD, *{fastest}*, `asgd` is {scan:.1f} times
  as fast in the scan and {loop:.1f} times in the loop.
- Threads of torch: {threads}.
- The work is the same: after {sizes.steps} steps, weights and averages of torch and JAX
  differ by at most {largest:.0e} of the largest element in the array.
"""


def draw(rows: dict[str, Row], output: Path) -> None:
    """Draw a bar for every time, with its quartiles."""
    plt.style.use(report.STYLE)
    figure, axes = plt.subplots(figsize=(7, 0.36 * len(rows) + 0.6))

    def bar(y: float, height: float, color: str, alpha: float, time: Any) -> None:
        drawn = axes.barh(
            y,
            time.median,
            height,
            color=color,
            alpha=alpha,
            xerr=([time.median - time.low], [time.high - time.median]),
            error_kw={"ecolor": "0.4", "elinewidth": 1},
        )
        axes.bar_label(drawn, fmt="{:.0f}", padding=3, fontsize=8)

    for y, (name, row) in enumerate(rows.items()):
        if row.scan:
            ours = name == "asgd" or name.endswith(OURS)
            color = "C1" if ours else "C2"
            bar(y - 0.2, 0.38, color, 1.0, row.scan)
            bar(y + 0.2, 0.38, color, 0.5, row.loop)
        else:
            bar(y, 0.7, "C3", 0.5, row.loop)
    axes.set_yticks(range(len(rows)), rows)
    axes.invert_yaxis()
    axes.set(
        title="One whole training step on the CPU",
        xlabel="time per step (µs): median and quartiles",
    )
    axes.grid(visible=False, axis="y")
    axes.set_axisbelow(True)
    axes.margins(x=0.1)
    sources = {"this library": "C1", "optax, or by hand": "C2", "torch": "C3"}
    handles = [Patch(color=color, label=label) for label, color in sources.items()]
    handles.append(Patch(color="0.3", label="all steps in one scan"))
    handles.append(Patch(color="0.3", alpha=0.5, label="one call per step"))
    axes.legend(handles=handles, loc="upper right")
    figure.savefig(output)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> None:
    """Check, time, and write the table and the picture."""
    parser = command_line.report_parser("Cost of a training step, in JAX and torch.")
    options = parser.parse_args(argv)
    jax.config.update("jax_platforms", "cpu")  # as torch's tensors
    sizes = QUICK if options.quick else FULL
    params, batches = draw_params(), draw_batches(sizes.steps)
    threads = choose_threads(params, batches[:TRIAL])
    compiled = harness.has_compiler() and not options.quick
    trainings = torch_trainings(params, batches, compiled=compiled)
    rows, largest = measure(params, batches, trainings, sizes)
    page = format_page(rows, sizes, threads, largest)
    report.write("benchmarks.training_loop", page, options.output)
    draw(rows, options.output / "training_loop.png")


if __name__ == "__main__":
    main()
