# SPDX-License-Identifier: Apache-2.0
"""The rules of PyTorch libraries on docs/how_to/from_torch_emas.md, and our lines.

Every rule is avg <- avg + w(t) (p(t) - avg) from avg = p(0), the parameters when the
average is made. Here it is the function w of the update t: 1 copies the parameters, 0
leaves the average as it is. tests/live runs the libraries themselves.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import asgd_optax
from asgd_optax import averaged_params, combine_averages
from tests.support import enable_x64

STEPS = 60
TOLERANCE = 5e-14


class Row(NamedTuple):
    """A line of the page, and the rule that it replaces.

    They agree from the update `since` on.
    """

    line: str
    rule: Callable[..., float]
    arguments: dict[str, Any]
    since: int = 1

    def ours(self) -> optax.GradientTransformation:
        """Evaluate the line."""
        return eval(
            self.line,
            {"jnp": jnp, "optax": optax, **vars(asgd_optax), **self.arguments},
        )

    def weights(self, steps: int = STEPS) -> list[float]:
        """Return w(1), …, w(steps)."""
        return [self.rule(t, **self.arguments) for t in range(1, steps + 1)]


def torch_averaged_model(t, s, k, d=None):
    """`update_parameters` after updates s, s + k, …; an EMA if d is given."""
    n, between = divmod(t - s, k)
    if t < s or between:
        return 0
    return 1 if n == 0 else 1 / (n + 1) if d is None else 1 - d


def ema_pytorch(t, d, u, k, g, p, m):
    """`EMA.update` after each update."""
    if (t - 1) % k:
        return 0
    age = t - 1 - u
    return 1 if age <= 0 else 1 - min(max(1 - (1 + age / g) ** -p, m), d)


def ema_pytorch_power(t, gamma, k):
    """`KarrasEMA.update` after each update, as in a `PostHocEMA`."""
    if (t - 1) % k:
        return 0
    return 1 if t == 1 else 1 - (1 - 1 / (t + 1)) ** (gamma + 1)


def timm(t, d, u=None, g=None, p=None):
    """`ModelEmaV3.update` after each update, with `step` if u is given."""
    if u is None:
        return 1 - d
    age = t - u - 1
    if age <= 0:
        return 1
    return 1 - (d if g is None else min(1 - (1 + age / g) ** -p, d))


def diffusers(t, d, u, g=None, p=None):
    """`EMAModel.step` after each update, with `use_ema_warmup` if g is given."""
    age = t - u - 1
    if age <= 0:
        return 1
    return 1 - min((1 + age) / (10 + age) if g is None else 1 - (1 + age / g) ** -p, d)


def lightning(t, d, s, k):
    """`EMAWeightAveraging`, which counts steps from 0."""
    if t - 1 < s or (t - 1) % k:
        return 0
    return 1 if t - 1 < s + k else 1 - d


def lightning_epochs(t, d, e, E):  # noqa: N803
    """The same with a starting epoch: after each step, and once more after epochs."""
    if t == 1:
        return 1
    return 1 - d**2 if t % E == 0 and t // E > e else 1 - d


def lightning_each_epoch(t, d, e, E):  # noqa: N803
    """The same with `update_every_n_steps=0`: after each epoch from e."""
    if t % E or t // E <= e:
        return 0
    return 1 if t // E == e + 1 else 1 - d


def torchtitan(t, k, d=None, h=None, s=0):
    """`EMAOptimizersContainer.step(t)` after each update."""
    firing, between = divmod(t - s, k)
    if t < s or between:
        return 0
    return 1 - (2 ** (-1 / (h * max(firing, 1))) if d is None else d)


def edm2_power(t, width):
    """`PowerFunctionEMA.update` after each update, at a constant batch size."""
    roots = np.roots([1, 7, 16 - width**-2, 12 - width**-2])
    return 1 - (1 - 1 / t) ** (roots.real.max() + 1)


def edm2_traditional(t, halflife, batch, ramp):
    """`TraditionalEMA.update` after each update, halflife in images."""
    return 1 - 0.5 ** (batch / min(halflife, ramp * t * batch))


def trl(t, k, u, rho, gam, kappa):
    """The EMA of `BEMACallback`, after each update."""
    if t < u or (t - u) % k:
        return 0
    return 1 if t == u else (rho + gam * t) ** -kappa


def icefall(t, k):
    """`update_averaged_model`, called at every `average_period`."""
    return 0 if t % k else k / t


PLAIN = "average_iterates(exponential_weighting(d, debias=False)"
WARM = "average_iterates(exponential_weighting(d, warmup=lambda n: "
ROWS = {
    "torch, each step": Row(
        "average_iterates()", torch_averaged_model, {"s": 1, "k": 1}
    ),
    "torch": Row(
        "average_iterates(start=s, every=k, include_start=True)",
        torch_averaged_model,
        {"s": 7, "k": 3},
        since=7,
    ),
    "torch EMA, each step": Row(
        PLAIN + ", start=1, include_start=True)",
        torch_averaged_model,
        {"d": 0.95, "s": 1, "k": 1},
    ),
    "torch EMA": Row(
        PLAIN + ", start=s, every=k, include_start=True)",
        torch_averaged_model,
        {"d": 0.95, "s": 7, "k": 3},
        since=7,
    ),
    "ema-pytorch": Row(
        WARM + "jnp.maximum(m, 1 - (1 + ((n - 1) * k - u % k) / g) ** -p)),"
        " start=1 + u // k * k, every=k, include_start=True)",
        ema_pytorch,
        {"d": 0.9, "u": 11, "k": 4, "g": 1.5, "p": 0.7, "m": 0.6},
        since=9,
    ),
    "ema-pytorch, each step": Row(
        WARM + "1 - (1 + (n - 1) / g) ** -p), start=u + 1, include_start=True)",
        ema_pytorch,
        {"d": 0.9, "u": 5, "k": 1, "g": 1.5, "p": 0.7, "m": 0.0},
    ),
    "ema-pytorch, power": Row(
        "average_iterates(lambda n: power_weighting(gamma)((n - 1) * k + 2),"
        " start=1, every=k, include_start=True)",
        ema_pytorch_power,
        {"gamma": 6.94, "k": 3},
    ),
    "ema-pytorch, power, each step": Row(
        "average_iterates(lambda n: power_weighting(gamma)(n + 1),"
        " start=1, include_start=True)",
        ema_pytorch_power,
        {"gamma": 6.94, "k": 1},
    ),
    "timm": Row(PLAIN + ", include_start=True)", timm, {"d": 0.95}),
    "timm, step": Row(
        PLAIN + ", start=u + 1, include_start=True)", timm, {"d": 0.95, "u": 5}
    ),
    "timm, warmup": Row(
        WARM + "1 - (1 + (n - 1) / g) ** -p), start=u + 1, include_start=True)",
        timm,
        {"d": 0.9, "u": 5, "g": 1.5, "p": 0.7},
    ),
    "diffusers": Row(
        WARM + "n / (n + 9)), start=u + 1, include_start=True)",
        diffusers,
        {"d": 0.8, "u": 5},
    ),
    "diffusers, warmup": Row(
        WARM + "1 - (1 + (n - 1) / g) ** -p), start=u + 1, include_start=True)",
        diffusers,
        {"d": 0.9, "u": 5, "g": 1.5, "p": 0.7},
    ),
    "Lightning": Row(
        PLAIN + ", start=1 + (s + k - 1) // k * k, every=k, include_start=True)",
        lightning,
        {"d": 0.95, "s": 7, "k": 3},
        since=10,
    ),
    "Lightning, epochs": Row(
        "average_iterates(lambda n: jnp.where((n % E == 0) & (n // E > e),"
        " 1 - d**2, 1 - d), start=1, include_start=True)",
        lightning_epochs,
        {"d": 0.95, "e": 2, "E": 6},
    ),
    "Lightning, each epoch": Row(
        PLAIN + ", start=(e + 1) * E, every=E, include_start=True)",
        lightning_each_epoch,
        {"d": 0.95, "e": 2, "E": 6},
        since=18,
    ),
    "torchtitan": Row(
        PLAIN + ", every=k, include_start=True)", torchtitan, {"d": 0.95, "k": 3}
    ),
    "torchtitan, start": Row(
        "average_iterates(lambda n: jnp.where((n > s) & ((n - 1 - s) % k == 0),"
        " 1 - d, 0), include_start=True)",
        torchtitan,
        {"d": 0.95, "k": 3, "s": 7},
    ),
    "torchtitan, half-life": Row(
        "average_iterates(lambda n: 1 - 2 ** (-1 / (h * (n - 1))),"
        " every=k, include_start=True)",
        torchtitan,
        {"h": 0.05, "k": 3},
    ),
    "TRL": Row(
        "average_iterates(lambda n: (rho + gam * (u + (n - 1) * k)) ** -kappa,"
        " start=u, every=k, include_start=True)",
        trl,
        {"k": 3, "u": 7, "rho": 4, "gam": 1.5, "kappa": 0.6},
        since=7,
    ),
    "TRL, each step": Row(
        "average_iterates(lambda n: (9 + n) ** -0.5, include_start=True)",
        lambda t: trl(t, 1, 0, 10, 1.0, 0.5),
        {},
    ),
    "icefall": Row("average_iterates(every=k)", icefall, {"k": 4}, since=4),
    "EDM2": Row(
        "average_iterates(power_weighting(gamma_from_width(width)))",
        edm2_power,
        {"width": 0.1},
    ),
    "EDM2, traditional": Row(
        WARM.replace("(d,", "(2 ** (-batch / halflife),")
        + "2 ** (-1 / (ramp * (n - 1)))), include_start=True)",
        edm2_traditional,
        {"halflife": 2000.0, "batch": 500, "ramp": 0.09},
    ),
}

SWALR = {  # from lr to swa_lr in A steps of the scheduler
    "cos": "optax.cosine_decay_schedule(lr, A, alpha=swa_lr / lr)",
    "linear": "optax.linear_schedule(lr, swa_lr, A)",
}


def random_walk(steps=STEPS):
    """Return p(0), …, p(steps), of three numbers each."""
    rng = np.random.default_rng(0)
    return 1 + np.cumsum(rng.standard_normal((steps + 1, 3)), axis=0)


def rule_averages(weights, iterates):
    """Return the average after each update, by the weights of a rule."""
    average, averages = iterates[0], []
    for w, p in zip(weights, iterates[1:], strict=True):
        average = average + w * (p - average)
        averages.append(average)
    return np.stack(averages)


def our_averages(tx, iterates):
    """Return our average after each update, for updates that lead to the iterates."""

    @jax.jit
    def scan(iterates):
        def step(state, pair):
            before, after = pair
            _, state = tx.update(after - before, state, before)
            return state, averaged_params(state)

        return jax.lax.scan(step, tx.init(iterates[0]), (iterates[:-1], iterates[1:]))

    return np.asarray(scan(jnp.asarray(iterates))[1])


def largest_difference(actual, expected, since=1):
    """Return max |actual - expected| / max |expected| from an update on."""
    difference = np.abs(actual - expected)[since - 1 :]
    return difference.max() / np.abs(expected).max()


@pytest.mark.parametrize("name", ROWS)
def test_line_of_the_page_follows_the_rule(name):
    row, iterates = ROWS[name], random_walk()
    with enable_x64(True):
        actual = our_averages(row.ours(), iterates)
    expected = rule_averages(row.weights(), iterates)
    assert actual.dtype == np.float64
    assert largest_difference(actual, expected, row.since) <= TOLERANCE
    # `since` is not too late, and the average is not just the iterate.
    if row.since > 1:
        assert largest_difference(actual, expected, row.since - 1) > 1e-3
    assert largest_difference(actual, iterates[1:]) > 1e-2


def test_difference_of_two_means_is_the_mean_between_checkpoints():
    """icefall's `average_checkpoints_with_averaged_model`."""
    row, iterates, (start, end) = ROWS["icefall"], random_walk(), (24, 56)
    averages = rule_averages(row.weights(), iterates)
    weights = [-start / (end - start), end / (end - start)]
    actual = combine_averages([averages[start - 1], averages[end - 1]], weights)
    k = row.arguments["k"]
    expected = iterates[start + k : end + 1 : k].mean(axis=0)
    np.testing.assert_allclose(actual, expected, rtol=TOLERANCE)


def test_page_shows_the_tested_lines():
    pages = Path(__file__).parents[1] / "docs" / "how_to"
    names = ("from_pytorch.md", "from_torch_emas.md")
    page = without_spaces("".join((pages / name).read_text() for name in names))
    lines = {row.line for row in ROWS.values()} | set(SWALR.values())
    assert not {line for line in lines if without_spaces(line) not in page}


def without_spaces(text):
    return "".join(text.split())
