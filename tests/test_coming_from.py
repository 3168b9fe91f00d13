# SPDX-License-Identifier: Apache-2.0
"""The rules of other libraries, as docs/guides/coming_from.md has them, and ours.

Each rule in float64 NumPy, as its project computes it, beside our line for it; and the
real thing where it is installed (PyTorch's and Keras's side: tests/live).
"""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from asgd_optax import (
    average_iterates,
    averaged_params,
    exponential_weighting,
    running_average,
)
from studies import coming_from
from studies.coming_from import PEERS, debiased, plain
from tests.support import enable_x64, train_step

STEPS, DECAY, EVERY, SWITCH, ANNEAL = 60, 0.9, 3, 20, 30
CLOSE = {"rtol": 5e-14, "atol": 5e-14}
ITERATES = np.random.default_rng(0).standard_normal((STEPS + 1, 3))

# A rule yields the average after each of the iterates p(1), p(2), …; p(0), the initial
# parameters, is the first of those given.


def ema(iterates, decay=DECAY):
    """A copy of the parameters, moved after each update."""
    average = iterates[0]
    for p in iterates[1:]:
        average = decay * average + (1 - decay) * p
        yield average


def ema_every(iterates, decay=DECAY):
    """The same, moved after every so many-th update."""
    average = iterates[0]
    for step, p in enumerate(iterates[1:], 1):
        if step % EVERY == 0:
            average = decay * average + (1 - decay) * p
        yield average


def zero_ema(iterates, decay=DECAY):
    """From zeros, and left so."""
    yield from ema([np.zeros_like(iterates[0]), *iterates[1:]], decay)


def adam_ema(iterates, decay=DECAY):
    """From zeros, divided by the mass."""
    for step, average in enumerate(zero_ema(iterates, decay), 1):
        yield average / (1 - decay**step)


def incremental_update(iterates, step_size=0.005):
    """As targets in reinforcement learning are updated."""
    average = iterates[0]
    for p in iterates[1:]:
        average = step_size * p + (1 - step_size) * average
        yield average


def haiku_warmup(iterates, decay=DECAY, warmup_length=10):
    """A counter from -warmup_length on: while it is not positive, decay 0."""
    average, counter = np.zeros_like(iterates[0]), -warmup_length
    for p in iterates[1:]:
        counter += 1
        d = 0.0 if counter <= 0 else decay
        average = average * d + p * (1 - d)
        yield average


def kauldron(iterates, decay=DECAY):
    """What is called debiasing there: a smaller decay at first."""
    average = iterates[0]
    for count, p in enumerate(iterates[1:], 1):
        d = min(decay, (1 + count) / (10 + count))
        average = (1 - d) * p + d * average
        yield average


def axlearn(iterates, decay=DECAY):
    """With `decay_bias_correction`, of which the first decay is 0."""
    average = np.zeros_like(iterates[0])
    for step, p in enumerate(iterates[1:], 1):
        d = decay * (1 - decay ** (step - 1)) / (1 - decay**step)
        average = (1 - d) * p + d * average
        yield average


def levanter_masses(step, beta=0.999):
    """What the iterate after update step + 1 weighs."""
    if step < SWITCH:
        return 1 - beta
    return 1 - math.sqrt(min((step - SWITCH) / ANNEAL, 1))


def levanter(iterates):
    """Its `ema_decay_sqrt`: of masses, whose total is kept."""
    average, total = iterates[0], 0.0
    for step, p in enumerate(iterates[1:]):
        mass = levanter_masses(step)
        total += mass
        share = mass / total if total else 0.0
        average = share * p + (1 - share) * average
        yield average


def keras(iterates, momentum=DECAY):
    """Momentum 0 at the first step, which so is taken whole."""
    average = np.zeros_like(iterates[0])
    for iteration, p in enumerate(iterates[1:]):
        m = momentum * (iteration != 0)
        average = m * average + (1 - m) * p
        yield average


def by_masses(masses):
    """Ours, from what each iterate weighs."""
    table = jnp.asarray(masses / np.cumsum(masses))
    return average_iterates(lambda n: table[n - 1])


RULES = [
    ("nnx_ema", ema, lambda: plain(DECAY)),
    (
        "nnx_ema_every",
        ema_every,
        lambda: plain(DECAY, every=EVERY, include_start=True),
    ),
    ("optax_ema", adam_ema, lambda: debiased(DECAY)),
    (
        "incremental_update",
        incremental_update,
        lambda: average_iterates(lambda n: 5e-3),
    ),
    (
        "kauldron",
        kauldron,
        lambda: average_iterates(
            exponential_weighting(DECAY, warmup=lambda n: (1 + n) / (10 + n))
        ),
    ),
    ("kauldron_plain", ema, lambda: plain(DECAY)),
    ("axlearn", axlearn, lambda: debiased(DECAY)),
    ("levanter", functools.partial(ema, decay=0.999), lambda: plain(0.999)),
    (
        "levanter_sqrt",
        levanter,
        lambda: by_masses(np.array([levanter_masses(t) for t in range(STEPS)])),
    ),
    # Past its end the table's last weight stays: here 0.
    (
        "levanter_sqrt_short",
        levanter,
        lambda: by_masses(np.array([levanter_masses(t) for t in range(SWITCH + 31)])),
    ),
    ("haiku", adam_ema, lambda: debiased(DECAY)),
    ("haiku_warmup", haiku_warmup, lambda: plain(DECAY, start=10)),
    ("keras", keras, lambda: plain(DECAY, start=1)),
]


@pytest.mark.parametrize(
    ("rule", "ours"), [r[1:] for r in RULES], ids=[r[0] for r in RULES]
)
def test_rule(rule, ours):
    with enable_x64(True):
        iterates = jnp.asarray(ITERATES)
        followed, averages = coming_from.our_averages(ours(), iterates)
        expected = list(rule([*ITERATES[:1], *np.asarray(followed)]))
    assert averages.dtype == np.float64
    np.testing.assert_allclose(averages, expected, **CLOSE)


@pytest.mark.parametrize("bias", [True, False])
def test_rule_from_zeros_or_of_updates(bias):
    """`optax.ema` of what it is given; haiku, axlearn where they leave the bias."""
    rule = zero_ema if bias else adam_ema
    with enable_x64(True):
        mean = running_average(exponential_weighting(DECAY, debias=not bias))
        state = mean.init(np.zeros(3))
        for p, expected in zip(ITERATES[1:], rule(ITERATES), strict=True):
            state = mean.update(state, p)
            np.testing.assert_allclose(mean.value(state), expected, **CLOSE)


def keras_training(gradient, p, momentum, overwrite):
    """SGD at rate 0.1, and what `ema_overwrite_frequency` does: params, average."""
    average = np.zeros_like(p)
    for iteration in itertools.count():
        p = p - 0.1 * gradient(p, iteration)
        m = momentum * (iteration != 0)
        average = m * average + (1 - m) * p
        if (iteration + 1) % overwrite == 0:
            p = average
        yield p, average


def test_rule_of_keras_overwriting():
    """The params replaced between the updates: ours averages what it is given."""
    noise = np.random.default_rng(1).standard_normal((STEPS, 3))
    gradient = lambda p, step: p + noise[step]  # noqa: E731
    with enable_x64(True):
        tx = optax.chain(optax.sgd(0.1), plain(DECAY, start=1))
        params = jnp.ones(3)
        state = tx.init(params)
        theirs = keras_training(gradient, np.ones(3), DECAY, overwrite=7)
        for step, (p, average) in zip(range(STEPS), theirs, strict=False):
            updates, state = tx.update(gradient(params, step), state, params)
            params = optax.apply_updates(params, updates)
            if (step + 1) % 7 == 0:
                params = averaged_params(state, params)
            np.testing.assert_allclose(params, p, **CLOSE)
            np.testing.assert_allclose(averaged_params(state), average, **CLOSE)


def keras_accumulating(gradients, p, momentum, k):
    """SGD on the means of k gradients; the average moves at every call: p, average."""
    average, held = np.zeros_like(p), np.zeros_like(p)
    for call, g in enumerate(gradients):
        held = held + g
        if (call + 1) % k == 0:
            p, held = p - held / k, np.zeros_like(p)
        m = momentum * (call // k != 0)
        average = m * average + (1 - m) * p
        yield p, average


@pytest.mark.parametrize("k", [1, 2, 5])
def test_rule_of_keras_accumulating_gradients(k):
    """It counts an iterate k times: so does ours where it stands behind."""
    # Sums of a few are exact in float32, in which `optax.MultiSteps` keeps them.
    gradients = np.random.default_rng(1).integers(-4, 5, (STEPS, 3)) / 2
    with enable_x64(True):
        accumulated = optax.MultiSteps(optax.sgd(1 / k), k, use_grad_mean=False)
        tx = optax.chain(accumulated.gradient_transformation(), plain(DECAY, start=k))
        params, step = jnp.zeros(3), jax.jit(functools.partial(train_step, tx))
        state = tx.init(params)
        theirs = keras_accumulating(gradients, np.zeros(3), DECAY, k)
        for g, (p, average) in zip(gradients, theirs, strict=True):
            params, state = step(params, state, g)
            np.testing.assert_allclose(params, p, **CLOSE)
            np.testing.assert_allclose(averaged_params(state), average, **CLOSE)


def test_weights_from_a_signal_known_as_it_comes():
    """A running average made in the step, around a weight that is traced."""
    tokens = np.random.default_rng(2).integers(1, 9, STEPS)

    @jax.jit
    def take(state, params, weight):
        return running_average(lambda n: weight).update(state, params)

    with enable_x64(True):
        state, seen = running_average().init(np.zeros(3)), 0
        for params, mass in zip(ITERATES[1:], tokens, strict=True):
            seen += mass
            state = take(state, params, mass / seen)
        expected = np.average(ITERATES[1:], axis=0, weights=tokens)
        np.testing.assert_allclose(state.average, expected, **CLOSE)


def live():
    """The peers that are installed, by name: Keras's is tested in tests/live."""
    return [
        pytest.param(
            name,
            marks=() if peer.package == "optax" else pytest.mark.flax,
            id=name.replace("`", ""),
        )
        for name, peer in PEERS.items()
        if peer.package != "keras" and coming_from.installed(peer.package)
    ]


@pytest.mark.parametrize("name", live())
def test_live(name):
    with enable_x64(True):
        assert coming_from.difference(PEERS[name]) < 5e-14


def test_live_optax_ema_of_updates():
    """A momentum: what leaves it is our running average of the updates."""
    with enable_x64(True):
        theirs = optax.ema(DECAY)
        mean = running_average(exponential_weighting(DECAY))
        updates = jnp.asarray(ITERATES)
        state, ours = theirs.init(updates[0]), mean.init(updates[0])
        for g in updates[1:]:
            momentum, state = theirs.update(g, state)
            ours = mean.update(ours, g)
            np.testing.assert_allclose(mean.value(ours), momentum, **CLOSE)


def test_live_optax_periodic_update():
    """A target network, taken over whole every so often."""
    with enable_x64(True):
        iterates = jnp.asarray(ITERATES)
        tx = average_iterates(lambda n: 1.0, every=EVERY, include_start=True)
        followed, averages = coming_from.our_averages(tx, iterates)
        target = iterates[0]
        for step, (p, average) in enumerate(zip(followed, averages, strict=True), 1):
            target = optax.periodic_update(p, target, jnp.array(step), EVERY)
            np.testing.assert_array_equal(average, target)


if coming_from.installed("flax.nnx.training.ema"):

    @pytest.mark.flax
    def test_live_nnx_ema_of_a_whole_state():
        """Statistics are averaged as the parameters are; a key is the latest, here."""
        from flax import nnx

        class Model(nnx.Module):
            def __init__(self):
                self.w = nnx.Param(jnp.asarray(ITERATES[0]))
                self.mean = nnx.BatchStat(jnp.asarray(ITERATES[1]))

        with enable_x64(True):
            model = Model()
            theirs = nnx.EMA(model, DECAY)
            ours = running_average(exponential_weighting(DECAY, debias=False))
            state = ours.init(nnx.state(model))
            for w, mean in itertools.pairwise(ITERATES):
                model.w[...], model.mean[...] = jnp.asarray(w), jnp.asarray(mean)
                theirs.update(model)
                state = ours.update(state, nnx.state(model))
                for pair in zip(
                    *map(jax.tree.leaves, (ours.value(state), theirs.params)),
                    strict=True,
                ):
                    np.testing.assert_allclose(*pair, **CLOSE)
            model.dropout = nnx.Dropout(0.5, rngs=nnx.Rngs(0))
            state = ours.update(ours.init(nnx.state(model)), nnx.state(model))
            merged = nnx.merge(nnx.graphdef(model), ours.value(state))
            assert merged.dropout.rngs.key.get_value() == (
                model.dropout.rngs.key.get_value()
            )
