# SPDX-License-Identifier: Apache-2.0
"""Keras's `use_ema` in training, compared with ours."""

import os

os.environ["KERAS_BACKEND"] = "jax"

import jax
import jax.numpy as jnp
import keras
import numpy as np
import optax
import pytest

from asgd_optax import average_iterates, averaged_params, exponential_weighting
from studies import coming_from
from tests.support import enable_x64

# Keras 3.15 raises this warning when a variable becomes a NumPy array.
pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation:DeprecationWarning"
)

# Keras keeps the learning rate in float32, which represents this one exactly.
STEPS, MOMENTUM, RATE = 60, 0.9, 0.125
CLOSE = {"rtol": 5e-14, "atol": 5e-14}
# `optax.MultiSteps` keeps sums in float32, which are exact for these numbers.
NUMBERS = np.random.default_rng(0).integers(-4, 5, (STEPS, 3)) / 2


@pytest.fixture(autouse=True)
def in_float64():
    before = keras.config.floatx()
    with enable_x64(True):
        keras.config.set_floatx("float64")
        yield
    keras.config.set_floatx(before)


def ours(start=1):
    return average_iterates(exponential_weighting(MOMENTUM, debias=False), start=start)


def keras_sgd(**options):
    """Return a variable of three zeros, an SGD that averages it, and the average."""
    variable = keras.Variable(np.zeros(3))
    sgd = keras.optimizers.SGD(RATE, use_ema=True, ema_momentum=MOMENTUM, **options)
    sgd.build([variable])
    (average,) = (v for v in sgd.variables if "average" in v.path)
    return variable, sgd, average


def test_use_ema_equals_ours():
    (name,) = (n for n, peer in coming_from.PEERS.items() if peer.package == "keras")
    assert coming_from.difference(coming_from.PEERS[name]) < 5e-14


def test_use_ema_stalls_in_bfloat16():
    peer = coming_from.PEERS["Keras `use_ema`"]
    theirs, mine, true = coming_from.last_averages(
        peer, 0.999, coming_from.JUMP, "bfloat16"
    )
    assert theirs == 1.0
    assert abs(mine - true) < 1e-5
    assert abs(true - 1.9503) < 1e-4


@pytest.mark.parametrize("frequency", [1, 7])
def test_ema_overwrite_frequency_equals_replacing_params(frequency):
    variable, sgd, average = keras_sgd(ema_overwrite_frequency=frequency)
    tx = optax.chain(optax.sgd(RATE), ours())
    params = jnp.zeros(3)
    state = tx.init(params)
    for step, target in enumerate(NUMBERS, 1):
        sgd.apply([variable.value - target], [variable])
        updates, state = tx.update(params - target, state, params)
        params = optax.apply_updates(params, updates)
        if step % frequency == 0:
            params = averaged_params(state, params)
        np.testing.assert_allclose(params, variable.numpy(), **CLOSE)
        np.testing.assert_allclose(averaged_params(state), average.numpy(), **CLOSE)


@pytest.mark.parametrize("k", [2, 5])
def test_accumulated_gradients_average_each_iterate_k_times(k):
    variable, sgd, average = keras_sgd(gradient_accumulation_steps=k)
    accumulated = optax.MultiSteps(optax.sgd(RATE / k), k, use_grad_mean=False)
    tx = optax.chain(accumulated.gradient_transformation(), ours(start=k))
    params = jnp.zeros(3)
    state = tx.init(params)
    for gradient in NUMBERS:
        sgd.apply([jnp.asarray(gradient)], [variable])
        updates, state = tx.update(jnp.asarray(gradient), state, params)
        params = optax.apply_updates(params, updates)
        np.testing.assert_allclose(params, variable.numpy(), **CLOSE)
        np.testing.assert_allclose(averaged_params(state), average.numpy(), **CLOSE)


class Recorder(keras.callbacks.Callback):
    """Record the weights that `evaluate` uses, and those of training after it."""

    def __init__(self):
        super().__init__()
        self.evaluated, self.trained = [], []

    def on_test_begin(self, logs=None):
        self.evaluated.append(self.model.get_weights()[0])

    def on_epoch_end(self, epoch, logs=None):
        self.trained.append(self.model.get_weights()[0])


def test_swap_ema_weights_evaluates_and_ends_with_averaged_params():
    rng = np.random.default_rng(1)
    x, y = (rng.integers(-4, 5, (20, n)) / 2 for n in (3, 1))
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1, use_bias=False)])
    params = jnp.asarray(model.get_weights()[0])
    model.compile(
        keras.optimizers.SGD(RATE, use_ema=True, ema_momentum=MOMENTUM),
        # Keras's own "mse" is computed in float32.
        loss=lambda y, predicted: ((predicted - y) ** 2).mean(),
    )
    recorder = Recorder()
    options = {"batch_size": 5, "epochs": 4, "shuffle": False, "verbose": 0}
    # The averages are in the model before the recorder runs.
    callbacks = [keras.callbacks.SwapEMAWeights(), recorder]
    model.fit(x, y, validation_data=(x, y), callbacks=callbacks, **options)

    tx = optax.chain(optax.sgd(RATE), ours())
    state = tx.init(params)
    loss = lambda w, x, y: jnp.mean((x @ w - y) ** 2)  # noqa: E731
    for epoch in range(4):
        for x_, y_ in zip(np.split(x, 4), np.split(y, 4), strict=True):
            updates, state = tx.update(jax.grad(loss)(params, x_, y_), state, params)
            params = optax.apply_updates(params, updates)
        average = averaged_params(state, params)
        np.testing.assert_allclose(recorder.evaluated[epoch], average, **CLOSE)
        np.testing.assert_allclose(recorder.trained[epoch], params, **CLOSE)
    np.testing.assert_allclose(model.get_weights()[0], average, **CLOSE)
