# SPDX-License-Identifier: Apache-2.0
"""The rules of other JAX libraries on docs/how_to/from_jax_emas.md, and our lines.

Installed libraries are compared directly; tests/live has PyTorch's and Keras's. The
rules of the others are float64 NumPy, as their projects compute them.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from asgd_optax import (
    average_iterates,
    exponential_weighting,
    running_average,
)
from studies import coming_from
from studies.coming_from import PEERS, debiased, plain
from tests.support import enable_x64

STEPS, DECAY, EVERY, SWITCH, ANNEAL = 60, 0.9, 3, 20, 30
CLOSE = {"rtol": 5e-14, "atol": 5e-14}
ITERATES = np.random.default_rng(0).standard_normal((STEPS + 1, 3))

# A rule yields the average after each of the iterates p(1), p(2), …. The first of the
# given iterates is p(0), the initial parameters.


def ema(iterates, decay=DECAY):
    """Average from p(0), after each update."""
    average = iterates[0]
    for p in iterates[1:]:
        average = decay * average + (1 - decay) * p
        yield average


def ema_every(iterates, decay=DECAY):
    """Average from p(0), after every `EVERY`-th update."""
    average = iterates[0]
    for step, p in enumerate(iterates[1:], 1):
        if step % EVERY == 0:
            average = decay * average + (1 - decay) * p
        yield average


def zero_ema(iterates, decay=DECAY):
    """Average from zeros, without debiasing."""
    yield from ema([np.zeros_like(iterates[0]), *iterates[1:]], decay)


def adam_ema(iterates, decay=DECAY):
    """Average from zeros, debiased."""
    for step, average in enumerate(zero_ema(iterates, decay), 1):
        yield average / (1 - decay**step)


def kauldron(iterates, decay=DECAY):
    """Use a smaller decay at first, which kauldron calls debiasing."""
    average = iterates[0]
    for count, p in enumerate(iterates[1:], 1):
        d = min(decay, (1 + count) / (10 + count))
        average = (1 - d) * p + d * average
        yield average


def axlearn(iterates, decay=DECAY):
    """Use axlearn's `decay_bias_correction`, whose first decay is 0."""
    average = np.zeros_like(iterates[0])
    for step, p in enumerate(iterates[1:], 1):
        d = decay * (1 - decay ** (step - 1)) / (1 - decay**step)
        average = (1 - d) * p + d * average
        yield average


def levanter_masses(step, beta=0.999):
    """Return the mass of the iterate after update step + 1."""
    if step < SWITCH:
        return 1 - beta
    return 1 - math.sqrt(min((step - SWITCH) / ANNEAL, 1))


def levanter(iterates):
    """Use levanter's `ema_decay_sqrt`: weights proportional to masses."""
    average, total = iterates[0], 0.0
    for step, p in enumerate(iterates[1:]):
        mass = levanter_masses(step)
        total += mass
        w = mass / total if total else 0.0
        average = w * p + (1 - w) * average
        yield average


def keras(iterates, momentum=DECAY):
    """Use momentum 0 at the first step, so that p(1) initialises the average."""
    average = np.zeros_like(iterates[0])
    for iteration, p in enumerate(iterates[1:]):
        m = momentum * (iteration != 0)
        average = m * average + (1 - m) * p
        yield average


def by_masses(masses):
    """Return our average with the given masses."""
    table = jnp.asarray(masses / np.cumsum(masses))
    return average_iterates(lambda n: table[n - 1])


RULES = {
    "nnx_ema_every": (
        ema_every,
        lambda: plain(DECAY, every=EVERY, include_start=True),
    ),
    "kauldron": (
        kauldron,
        lambda: average_iterates(
            exponential_weighting(DECAY, warmup=lambda n: (1 + n) / (10 + n))
        ),
    ),
    "axlearn": (axlearn, lambda: debiased(DECAY)),
    "levanter_sqrt": (
        levanter,
        lambda: by_masses(np.array([levanter_masses(t) for t in range(STEPS)])),
    ),
    "keras": (keras, lambda: plain(DECAY, start=1)),
}


@pytest.mark.parametrize("name", RULES)
def test_average_iterates_follows_the_rule(name):
    rule, ours = RULES[name]
    with enable_x64(True):
        followed, averages = coming_from.our_averages(ours(), jnp.asarray(ITERATES))
        expected = list(rule([*ITERATES[:1], *np.asarray(followed)]))
    assert averages.dtype == np.float64
    np.testing.assert_allclose(averages, expected, **CLOSE)


@pytest.mark.parametrize("debias", [False, True])
def test_running_average_follows_the_rules_that_start_from_zeros(debias):
    """`optax.ema` of updates; haiku and axlearn without debiasing."""
    rule = adam_ema if debias else zero_ema
    with enable_x64(True):
        mean = running_average(exponential_weighting(DECAY, debias=debias))
        state = mean.init(np.zeros(3))
        for p, expected in zip(ITERATES[1:], rule(ITERATES), strict=True):
            state = mean.update(state, p)
            np.testing.assert_allclose(mean.value(state), expected, **CLOSE)


def test_weight_may_come_from_a_signal_in_the_step():
    """A running average made in the step uses a traced weight."""
    tokens = np.random.default_rng(2).integers(1, 9, STEPS)

    @jax.jit
    def update(state, params, weight):
        return running_average(lambda n: weight).update(state, params)

    with enable_x64(True):
        state, seen = running_average().init(np.zeros(3)), 0
        for params, mass in zip(ITERATES[1:], tokens, strict=True):
            seen += mass
            state = update(state, params, mass / seen)
        expected = np.average(ITERATES[1:], axis=0, weights=tokens)
        np.testing.assert_allclose(state.average, expected, **CLOSE)


def installed_peers():
    """Return the names of the installed peers; tests/live has Keras's."""
    return [
        pytest.param(
            name,
            marks=() if peer.package == "optax" else pytest.mark.flax,
            id=name.replace("`", ""),
        )
        for name, peer in PEERS.items()
        if peer.package != "keras" and coming_from.installed(peer.package)
    ]


@pytest.mark.parametrize("name", installed_peers())
def test_average_iterates_equals_the_installed_library(name):
    with enable_x64(True):
        assert coming_from.difference(PEERS[name]) < 5e-14


def test_average_iterates_equals_optax_periodic_update():
    with enable_x64(True):
        iterates = jnp.asarray(ITERATES)
        tx = average_iterates(lambda n: 1.0, every=EVERY, include_start=True)
        followed, averages = coming_from.our_averages(tx, iterates)
        target, update = iterates[0], jax.jit(optax.periodic_update, static_argnums=3)
        for step, (p, average) in enumerate(zip(followed, averages, strict=True), 1):
            target = update(p, target, jnp.array(step), EVERY)
            np.testing.assert_array_equal(average, target)
