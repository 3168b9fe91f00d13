# SPDX-License-Identifier: Apache-2.0
"""Is one pass enough? Logistic regression by averaged SGD, after Bottou.

    python -m studies.one_pass

This study repeats the experiment of Bottou (COMPSTAT 2010) on data that need no
download. It measures the distance from the exact optimum of a regularised logistic
regression after one pass and after ten passes over the training set. The optimum comes
from Newton's method in float64. The methods run in float32 and are evaluated in
float64. All methods see the examples in the same orders, and results are means over the
orders. The difference of two test errors is reported with its standard error, and the
times of a pass with quartiles (`benchmarks.harness`).
"""

import os
import platform
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from matplotlib.ticker import FixedLocator, NullLocator
from sklearn.linear_model import LogisticRegression, SGDClassifier
from tqdm import tqdm

from asgd_optax import asgd, average_iterates, averaged_params
from benchmarks import harness
from tools import command_line, report

LAMBDA = 1e-5
RATES = 2.0 ** np.arange(-14, 8)
# A run advances by tenths of a pass, and is evaluated after these.
CHECKPOINTS = (1, 2, 5, 10, 20, 50, 100)
ONE_PASS = CHECKPOINTS.index(10)
PASSES = (1, 2, 5, 10)
# Multiples of the chosen learning rate, tried in hindsight for one pass.
FACTORS = (0.125, 0.25, 0.5, 2)
# So that every batch size divides a tenth of the training set.
MULTIPLE = 1280
# Colour and style of a method's line in the picture.
LINES = {
    "`asgd`": ("C1", "-"),
    "`asgd`, its last iterate": ("C0", "-"),
    "SGD, Bottou's rate": ("C0", "--"),
    "SGD, rate to 0 in one pass": ("C0", "D"),
    "Adam + `average_iterates`": ("C1", "--"),
    "Adam": ("C2", "--"),
    "`SGDClassifier`": ("C4", "-"),
    "`SGDClassifier`, average": ("C5", "-"),
    "`SGDClassifier`, average, constant rate": ("C5", ":"),
}


class Data(NamedTuple):
    """Features (n, d), float32, with mean norm 1; labels (n,), -1 or 1."""

    x: jax.Array
    y: jax.Array


class Problem(NamedTuple):
    """A training set in random order, and a test set."""

    name: str
    description: str
    training: Data
    test: Data


def synthetic(n: int, d: int, tests: int) -> Problem:
    """Draw ill-conditioned normal features, and labels with noise."""
    rng = np.random.default_rng(2010)
    deviations = np.arange(1, d + 1, dtype=np.float32) ** -0.75
    rotation = np.linalg.qr(rng.standard_normal((d, d), np.float32))[0]
    x = rng.standard_normal((n + tests, d), np.float32) * deviations @ rotation
    logits = x @ rng.standard_normal(d, np.float32)
    logits *= 3 / np.std(logits)
    positive = logits + rng.logistic(size=n + tests) > 0
    positive ^= rng.random(n + tests) < 0.05
    description = (
        "The features are normal. Their covariance has the eigenvalues k^-1.5, k = 1 to"
        f" d, in rotated axes (condition number {d**1.5:,.0f}). The labels are logistic"
        " with logits of standard deviation 3, and 5 % of them are flipped."
    )
    return _scaled("Synthetic", description, x, positive, n)


def vowels(length: int | None) -> Problem:
    """Ask whether a letter of Python's help is a vowel, given the 8 symbols before."""
    text = re.sub("[^a-z]+", " ", " ".join(topics.values()).lower())[:length]
    codes = np.maximum(np.frombuffer(text.encode(), np.uint8).astype(int) - 96, 0)
    # Split first, because windows overlap.
    parts = np.split(codes, [len(codes) * 5 // 6])
    windows = [np.lib.stride_tricks.sliding_window_view(part, 9) for part in parts]
    training, test = (window[window[:, -1] > 0] for window in windows)
    n = len(training) // MULTIPLE * MULTIPLE
    training = np.random.default_rng(2010).permutation(training)[:n]
    symbols = np.concatenate([training, test])
    x = np.eye(27, dtype=np.float32)[symbols[:, :-1]].reshape(len(symbols), -1)
    vowel = np.isin(symbols[:, -1], [ord(letter) - 96 for letter in "aeiou"])
    description = (
        f"The text is CPython {platform.python_version()}'s `pydoc_data.topics` in 27"
        " symbols, a to z and space. The model predicts whether a letter is a vowel,"
        " from the 8 symbols before it, one-hot. The test set is the last sixth of the"
        " text."
    )
    return _scaled("Text", description, x, vowel, n)


def _scaled(
    name: str, description: str, x: np.ndarray, positive: np.ndarray, n: int
) -> Problem:
    """Scale the features; the first n examples are the training set."""
    # As scikit-learn's guide to SGD recommends.
    x /= np.mean(np.linalg.norm(x[:n], axis=1))
    y = np.where(positive, np.float32(1), np.float32(-1))
    training = Data(jnp.asarray(x[:n]), jnp.asarray(y[:n]))
    return Problem(
        name, description, training, Data(jnp.asarray(x[n:]), jnp.asarray(y[n:]))
    )


Solutions = dict[str, list[np.ndarray]]  # by name, one per checkpoint


class Method(NamedTuple):
    """A method of descent with optax.

    Attributes:
      optimizer: takes the learning rate, d, and the number of updates per pass.
      reads: the solutions of one run: names, and functions of state and parameters.
        The learning rate is chosen for the first.
      batch: examples per update.
      passes: the number of passes it is made for.
    """

    optimizer: Callable[[Any, int, int], optax.GradientTransformation]
    reads: tuple[tuple[str, Callable[[Any, jax.Array], jax.Array]], ...]
    batch: int = 1
    passes: int = 10


def penalised(*transformations: optax.GradientTransformation) -> Any:
    """Chain transformations that get the gradient of the whole objective."""
    return optax.chain(optax.add_decayed_weights(LAMBDA), *transformations)


def bottou_asgd(rate: Any, d: int, steps: int) -> optax.GradientTransformation:
    # `lambd` is also the penalty.
    return asgd(rate, lambd=LAMBDA, alpha=0.75, t0=min(d, steps))


def bottou_sgd(rate: Any, d: int, steps: int) -> optax.GradientTransformation:
    return penalised(optax.sgd(lambda t: rate / (1 + LAMBDA * rate * t)))


def linear_sgd(rate: Any, d: int, steps: int) -> optax.GradientTransformation:
    return penalised(optax.sgd(lambda t: rate * (1 - t / steps)))


def adam(rate: Any, d: int, steps: int) -> optax.GradientTransformation:
    return penalised(optax.adam(rate))


def averaged_adam(rate: Any, d: int, steps: int) -> optax.GradientTransformation:
    return penalised(optax.adam(rate), average_iterates(start=min(d, steps)))


def last_iterate(state: Any, params: jax.Array) -> jax.Array:
    return params


METHODS = (
    Method(
        bottou_asgd,
        (("`asgd`", averaged_params), ("`asgd`, its last iterate", last_iterate)),
    ),
    Method(bottou_sgd, (("SGD, Bottou's rate", last_iterate),)),
    Method(linear_sgd, (("SGD, rate to 0 in one pass", last_iterate),), passes=1),
    Method(averaged_adam, (("Adam + `average_iterates`", averaged_params),)),
    Method(adam, (("Adam", last_iterate),)),
    Method(bottou_asgd, (("`asgd`, batch 32", averaged_params),), 32),
    Method(bottou_sgd, (("SGD, Bottou's rate, batch 32", last_iterate),), 32),
    Method(
        averaged_adam, (("Adam + `average_iterates`, batch 32", averaged_params),), 32
    ),
)
CLASSIFIERS: dict[str, dict[str, Any]] = {
    "`SGDClassifier`": {},
    "`SGDClassifier`, average": {"average": True},
    # scikit-learn's guide: with averaging the rate "can be larger and even constant".
    "`SGDClassifier`, average, constant rate": {
        "average": True,
        "learning_rate": "constant",
    },
}


def begin(optimizer: Any, data: Data, rate: Any, batch: int) -> tuple[Any, Any]:
    """Return the initial parameters and state."""
    n, d = data.x.shape
    return jnp.zeros(d), optimizer(rate, d, n // batch).init(jnp.zeros(d))


@partial(jax.jit, static_argnums=0)
def advance(optimizer: Any, data: Data, rate: Any, carry: Any, batches: Any) -> Any:
    """Return parameters and state after an update for each row of `batches`."""
    n, d = data.x.shape
    tx = optimizer(rate, d, n // batches.shape[1])

    def loss(params: jax.Array, rows: jax.Array) -> jax.Array:
        return jnp.mean(jax.nn.softplus(-data.y[rows] * (data.x[rows] @ params)))

    def step(carry: Any, rows: jax.Array) -> tuple[Any, None]:
        params, state = carry
        updates, state = tx.update(jax.grad(loss)(params, rows), state, params)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, carry, batches)[0]


def run(method: Method, data: Data, rate: float, order: np.ndarray) -> Solutions:
    """Return the solutions at the checkpoints; a row of `order` is a tenth pass."""
    carry = begin(method.optimizer, data, rate, method.batch)
    solutions: Solutions = {name: [] for name, _ in method.reads}
    for tenth, rows in enumerate(order[: 10 * method.passes], 1):
        batches = rows.reshape(-1, method.batch)
        carry = advance(method.optimizer, data, rate, carry, batches)
        if tenth in CHECKPOINTS:
            for name, read in method.reads:
                solutions[name].append(np.asarray(read(carry[1], carry[0])))
    return solutions


def classifier(name: str, rate: float | None, shuffle: bool) -> SGDClassifier:
    options = CLASSIFIERS[name] | ({} if rate is None else {"eta0": rate})
    return SGDClassifier(
        loss="log_loss",
        alpha=LAMBDA,
        fit_intercept=False,
        shuffle=shuffle,
        random_state=0,
        **options,
    )


def run_classifier(
    name: str, data: Data, rate: float | None, order: np.ndarray
) -> Solutions:
    """Run scikit-learn, as `run` does for optax."""
    x, y = map(np.asarray, data)
    fit = classifier(name, rate, shuffle=False)
    solutions = []
    for tenth, rows in enumerate(order, 1):
        fit.partial_fit(x[rows], y[rows], classes=[-1, 1])
        if tenth in CHECKPOINTS:
            solutions.append(fit.coef_[0].copy())
    return {name: solutions}


def evaluate(data: Data, weights: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return objective, and error in %, of each row of `weights`, in float64."""
    weights = np.asarray(weights, np.float64)
    losses, errors = np.zeros(len(weights)), np.zeros(len(weights))
    x, y = map(np.asarray, data)
    for start in range(0, len(y), 10_000):
        rows = slice(start, start + 10_000)
        margins = y[rows, None] * (x[rows].astype(np.float64) @ weights.T)
        losses += np.sum(np.logaddexp(0, -margins), axis=0)
        errors += np.sum(margins <= 0, axis=0)
    penalties = LAMBDA / 2 * np.sum(weights**2, axis=1)
    return losses / len(y) + penalties, 100 * errors / len(y)


def optimum(data: Data) -> tuple[np.ndarray, float]:
    """Return the minimiser, and the norm of the objective's gradient there."""
    x, y = np.asarray(data.x, np.float64), np.asarray(data.y, np.float64)
    newton = LogisticRegression(
        C=1 / (len(y) * LAMBDA),
        fit_intercept=False,
        solver="newton-cholesky",
        tol=1e-8,
    )
    weights = newton.fit(x, y).coef_[0]
    slopes = -y / (1 + np.exp(y * (x @ weights)))
    return weights, float(np.linalg.norm(slopes @ x / len(y) + LAMBDA * weights))


def choose_rates(data: Data) -> dict[str, float | None]:
    """Choose learning rates by one pass over a tenth of the data; None: the default."""
    n = len(data.y) // 10
    subset = Data(data.x[:n], data.y[:n])
    order = np.arange(n, dtype=np.int32)
    rates: dict[str, float | None] = {}

    def best(solutions: Any) -> float:
        return float(RATES[np.nanargmin(evaluate(subset, solutions)[0])])

    def one_pass(method: Method, rate: jax.Array) -> jax.Array:
        carry = begin(method.optimizer, subset, rate, method.batch)
        batches = order.reshape(-1, method.batch)
        params, state = advance(method.optimizer, subset, rate, carry, batches)
        return method.reads[0][1](state, params)

    for method in tqdm(METHODS, desc="rates"):
        solutions = jax.vmap(partial(one_pass, method))(jnp.float32(RATES))
        rates |= dict.fromkeys([name for name, _ in method.reads], best(solutions))
    rates |= dict.fromkeys(CLASSIFIERS)
    name = "`SGDClassifier`, average, constant rate"
    constant = [
        run_classifier(name, subset, rate, order[None])[name][-1] for rate in RATES
    ]
    return rates | {name: best(constant)}


class Row(NamedTuple):
    """The results of a method.

    Attributes:
      rate: the learning rate; None for the default.
      costs: training objectives minus the optimum's, means over orders. Shape
        (checkpoints,).
      errors: test errors in %, like `costs`.
      hindsight: the lowest cost after one pass of the first order, over learning rates.
    """

    rate: float | None
    costs: np.ndarray
    errors: np.ndarray
    hindsight: float


class Study(NamedTuple):
    """A problem's rows by name, and its optimum.

    Attributes:
      cost: the optimum's objective.
      slope: the norm of the objective's gradient there.
      error: the optimum's test error in %.
      difference: `asgd`'s test error minus the optimum's after one pass of the first
        order, in percentage points, and its standard error.
    """

    problem: Problem
    rows: dict[str, Row]
    cost: float
    slope: float
    error: float
    difference: tuple[float, float]


def permutations(n: int, seed: int) -> np.ndarray:
    """Return ten passes in different orders, by tenths. Shape (100, n // 10)."""
    rng = np.random.default_rng(seed)
    passes = [rng.permutation(n).astype(np.int32) for _ in range(10)]
    return np.concatenate(passes).reshape(100, -1)


def run_all(
    data: Data, rates: Mapping[str, float | None], orders: int
) -> dict[str, list[np.ndarray]]:
    """Run every method: all orders, then one pass at other learning rates."""
    passes = [permutations(len(data.y), seed) for seed in range(orders)]
    runs = {method.reads[0][0]: partial(run, method, data) for method in METHODS}
    runs |= {name: partial(run_classifier, name, data) for name in CLASSIFIERS}
    jobs = [(f, rates[name], order) for name, f in runs.items() for order in passes]
    jobs += [
        (f, rate * factor, passes[0][:10])
        for name, f in runs.items()
        if (rate := rates[name]) is not None
        for factor in FACTORS
    ]
    found: dict[str, list[np.ndarray]] = {name: [] for name in rates}
    # A run keeps one core busy.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = pool.map(lambda job: job[0](*job[1:]), jobs)
        for solutions in tqdm(results, desc="runs", total=len(jobs), unit="run"):
            for name, points in solutions.items():
                found[name].append(np.array(points))
    return found


def study(problem: Problem, orders: int) -> Study:
    """Find the optimum, and how near to it every method comes."""
    training, test = problem.training, problem.test
    exact, slope = optimum(training)
    (cost,), _ = evaluate(training, exact[None])
    _, (error,) = evaluate(test, exact[None])
    rates = choose_rates(training)
    found = run_all(training, rates, orders)
    rows = {}
    for name, solutions in found.items():
        flat = np.concatenate(solutions[:orders])
        costs, errors = evaluate(training, flat)[0] - cost, evaluate(test, flat)[1]
        tried = [points[ONE_PASS] for points in (solutions[0], *solutions[orders:])]
        rows[name] = Row(
            rates[name],
            costs.reshape(orders, -1).mean(axis=0),
            errors.reshape(orders, -1).mean(axis=0),
            np.nanmin(evaluate(training, tried)[0]) - cost,
        )
    x, y = map(np.asarray, test)
    wrong, exact_wrong = (
        y * (x @ w) <= 0 for w in (found["`asgd`"][0][ONE_PASS], exact)
    )
    points = 100.0 * wrong - 100.0 * exact_wrong
    difference = np.mean(points), np.std(points) / np.sqrt(len(points))
    return Study(problem, rows, cost, slope, error, difference)


def quality_table(result: Study) -> str:
    """Format excess costs and test errors of every method and the optimum."""
    at = [CHECKPOINTS.index(10 * passes) for passes in PASSES]
    lines = []
    for name, row in result.rows.items():
        lines.append(
            [
                name,
                "default" if row.rate is None else f"{row.rate:.3g}",
                *(f"{row.costs[k]:.1e}" if k < len(row.costs) else "" for k in at),
                "" if row.rate is None else f"{row.hindsight:.1e}",
                f"{row.errors[ONE_PASS]:.2f}",
                f"{row.errors[-1]:.2f}" if at[-1] < len(row.errors) else "",
            ]
        )
    lines.append(["exact optimum", "", *["0"] * 5, *[f"{result.error:.2f}"] * 2])
    costs = [f"cost {passes}" for passes in PASSES]
    header = ["", "learning rate", *costs, "best 1", "error 1", "error 10"]
    return report.table(header, lines)


def verdict(result: Study) -> str:
    """Summarise the table in words."""
    rows, points = result.rows, "{:+.2f} ± {:.2f} points".format(*result.difference)

    def lower(what: str, costs: Mapping[str, float]) -> str:
        names = [name for name in costs if costs[name] < costs["`asgd`"]]
        names.sort(key=lambda name: costs[name])
        return f"- {what}: {'; '.join(names) or 'none'}."

    last = {
        n: row.costs[-1] for n, row in rows.items() if len(row.costs) > ONE_PASS + 1
    }
    sentence = (
        f"After one pass of the first order `asgd`'s test error is {points} from the"
        " optimum's (± the standard error of the difference). Methods with a lower cost"
        " than `asgd`, lowest first:"
    )
    hindsight = {name: row.hindsight for name, row in rows.items()}
    lists = [
        lower("one pass", {n: row.costs[ONE_PASS] for n, row in rows.items()}),
        lower("one pass, best learning rates", hindsight),
        lower("ten passes", last),
    ]
    return "\n".join([textwrap.fill(sentence, 88), "", *lists])


def passes_to_time(data: Data) -> dict[str, harness.Contestant]:
    """Time one pass over the training set, by batch size."""
    order = permutations(len(data.y), 0)[:10]
    x, y = map(np.asarray, data)
    setups: dict[str, Callable[[], Any]] = {}
    for name, optimizer, sizes in (
        ("`asgd`", bottou_asgd, (1, 8, 32, 128)),
        ("SGD, Bottou's rate", bottou_sgd, (1, 32)),
        ("Adam + `average_iterates`", averaged_adam, (1, 32)),
    ):
        for size in sizes:
            method = Method(optimizer, (("", last_iterate),), size)
            setups[f"{name}, batch {size}"] = partial(
                partial, run, method, data, RATES[0], order
            )
    for name in ("`SGDClassifier`", "`SGDClassifier`, average"):
        fit = classifier(name, None, shuffle=True)
        setups[f"{name}, batch 1"] = partial(
            partial, fit.partial_fit, x, y, classes=[-1, 1]
        )
    return {name: harness.Contestant(f, calls=1) for name, f in setups.items()}


def time_table(times: Mapping[str, harness.Time]) -> str:
    lines = [
        [name, f"{time.median:.3f}", f"{time.low:.3f} to {time.high:.3f}"]
        for name, time in times.items()
    ]
    return report.table(["", "seconds per pass", "quartiles"], lines)


INTRODUCTION = """\
# Is one pass enough?

Logistic regression in float32: the mean loss + λ/2 |w|², λ = {LAMBDA:g}, from w = 0.
*Cost* is the objective on the training set minus that of the exact optimum, and *error*
the test error in %. The number after each is that of the passes. Both are means over
{orders} orders of the examples, the same for all methods. The batch size is 1 unless
stated otherwise.

- `asgd`: Bottou's learning rate g0 (1 + λ g0 t)^-0.75, averaging after the first d
  updates, `lambd` = λ. The last iterate of the same run is SGD at the same learning
  rate.
- SGD: Bottou's g0 (1 + λ g0 t)^-1, or a learning rate that falls from g0 to 0 in one
  pass.
- Adam: a constant learning rate; `average_iterates` begins after the first d updates.
- `SGDClassifier`: its default learning rate; with averaging, also a constant one.

*Learning rate* is g0, or the constant learning rate: the power of 2 from {low:.1e} to
{high:g} with the lowest objective on a tenth of the training set after one pass over
that tenth. *Best 1* is the lowest cost in hindsight: after one pass of the first order,
at this learning rate, an eighth, a quarter, a half and twice it."""


def section(result: Study) -> str:
    """Format the report of a problem."""
    training, test = result.problem.training, result.problem.test
    n, d = training.x.shape
    # The objective exceeds its minimum by at most |gradient|^2 / (2 lambda).
    bound = result.slope**2 / (2 * LAMBDA)
    description = (
        f"{n:,} training and {len(test.y):,} test examples, d = {d}."
        f" {result.problem.description} {np.mean(test.y > 0):.1%} of the test set are"
        f" positive. The optimum's objective is {result.cost:.6f}, within {bound:.0e}"
        f" of the minimum, because its gradient has norm {result.slope:.0e}."
    )
    parts = [textwrap.fill(description, 88), quality_table(result), verdict(result)]
    return "\n\n".join([f"## {result.problem.name}", *parts])


def draw(results: Sequence[Study], output: Path) -> None:
    """Draw the cost by passes, a panel for each problem."""
    plt.style.use(report.STYLE)
    figure, panels = plt.subplots(1, 2, figsize=(10, 5))
    passes = np.array(CHECKPOINTS) / 10
    for axes, result in zip(panels, results, strict=True):
        for name, (colour, style) in LINES.items():
            costs = result.rows[name].costs
            # A learning rate that falls to 0 in one pass is shown only there.
            shown = slice(0 if len(costs) == len(passes) else ONE_PASS, len(costs))
            label = name.replace("`", "")
            axes.plot(passes[shown], costs[shown], style, color=colour, label=label)
        n, d = result.problem.training.x.shape
        axes.set(
            title=f"{result.problem.name}: n = {n:,}, d = {d}",
            xlabel="passes over the training set",
            ylabel="excess training cost (nats)",
            xscale="log",
            yscale="log",
        )
        axes.xaxis.set_major_locator(FixedLocator(passes.tolist()))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter("{x:g}")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
    figure.savefig(output)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> None:
    """Study both problems, time a pass, and save the report and the picture."""
    parser = command_line.report_parser("One pass of averaged SGD, and ten.")
    options = parser.parse_args(argv)
    jax.config.update("jax_platforms", "cpu")  # as scikit-learn
    quick = options.quick
    orders, repetitions = (2, 2) if quick else (3, 5)
    first = synthetic(*((1280, 20, 1000) if quick else (195 * MULTIPLE, 500, 50_000)))
    results = [study(first, orders)]
    times = harness.measure(passes_to_time(first.training), repetitions)
    results.append(study(vowels(10_000 if quick else None), orders))
    low, high = RATES[[0, -1]]
    n, d = first.training.x.shape
    text = [
        INTRODUCTION.format(LAMBDA=LAMBDA, orders=orders, low=low, high=high),
        *map(section, results),
        f"## Time of a pass\n\nSynthetic, n = {n:,}, d = {d}; one run at a time. The"
        " order is drawn beforehand;\n`SGDClassifier` shuffles within its time.",
        time_table(times),
    ]
    report.write("studies.one_pass", "\n\n".join(text), options.output)
    draw(results, options.output / "one_pass.png")


if __name__ == "__main__":
    main()
