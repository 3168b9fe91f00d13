# SPDX-License-Identifier: Apache-2.0
"""The table of transformations that the conformance battery runs over."""

from collections.abc import Callable
from typing import Any, NamedTuple

import optax

from asgd_optax import (
    asgd,
    average_iterates,
    end_on_average,
    exponential_weighting,
    nt_asgd,
    polynomial_weighting,
    power_weighting,
    running_random_scaling,
    track_iterates,
    uniform_weighting,
    with_own_params,
)


def track(start=0):
    """Return the transformation that tracks random scaling."""
    return track_iterates(running_random_scaling(start=start))


class Row(NamedTuple):
    """One transformation under test.

    Attributes:
      name: id of its tests.
      factory: makes the transformation from hyperparameters and options.
      hyperparameters: its numeric arguments, at values where it is differentiable in
        each and where averaging begins within a few steps.
      options: its other arguments.
      arrays: number of arrays in its state for each parameter.
      complex: whether parameters may be complex.
      narrow_arrays: number of these arrays that have the dtype of the parameter.
    """

    name: str
    factory: Callable[..., optax.GradientTransformationExtraArgs]
    hyperparameters: dict[str, float]
    options: dict[str, Any]
    arrays: int = 1
    complex: bool = True
    narrow_arrays: int = 0

    def make(self, **changed: Any) -> optax.GradientTransformationExtraArgs:
        return self.factory(**{**self.hyperparameters, **self.options, **changed})


# `optax.inject_hyperparams` reads these signatures: arguments must be named.


def _uniform(learning_rate, every=1, compensated=False, accumulator_dtype=None):
    average = average_iterates(
        uniform_weighting(),
        start=1,
        every=every,
        compensated=compensated,
        accumulator_dtype=accumulator_dtype,
    )
    return optax.chain(optax.sgd(learning_rate), average)


def _polynomial(learning_rate, gamma):
    average = average_iterates(polynomial_weighting(gamma), start=1)
    return optax.chain(optax.sgd(learning_rate), average)


def _exponential(learning_rate, decay):
    average = average_iterates(exponential_weighting(decay), start=1)
    return optax.chain(optax.sgd(learning_rate), average)


def _power(learning_rate, gamma):
    average = average_iterates(power_weighting(gamma), start=1)
    return optax.chain(optax.sgd(learning_rate), average)


def _plain_ema(learning_rate, decay, every=1):
    """Return SGD with the EMA that many write by hand: it starts from the params."""
    weighting = exponential_weighting(decay, debias=False)
    average = average_iterates(weighting, every=every, include_start=True)
    return optax.chain(optax.sgd(learning_rate), average)


def _nt_asgd(learning_rate, lambd, alpha, weight_decay):
    """Return `nt_asgd` with rising losses, so that the third update triggers it."""
    tx = nt_asgd(
        learning_rate, nonmono=1, lambd=lambd, alpha=alpha, weight_decay=weight_decay
    )

    def update(updates, state, params=None, **extra):
        return tx.update(updates, state, params, validation_loss=state.step, **extra)

    return optax.GradientTransformationExtraArgs(tx.init, update)


def _own_params(learning_rate):
    """Return SGD with an average, for a caller that passes no params."""
    tx = with_own_params(optax.chain(optax.sgd(learning_rate), average_iterates()))

    def update(updates, state, params=None, **extra):
        return tx.update(updates, state, **extra)

    return optax.GradientTransformationExtraArgs(tx.init, update)


def _end_on_average(learning_rate):
    tx = optax.chain(optax.sgd(learning_rate), average_iterates())
    return end_on_average(tx, steps=3)


def _random_scaling(learning_rate):
    return optax.chain(optax.sgd(learning_rate), track(start=1))


_SGD = {"learning_rate": 0.3}
_NT_ASGD = {**_SGD, "lambd": 0.2, "alpha": 0.6, "weight_decay": 0.1}
_ASGD = {**_NT_ASGD, "t0": 1.25}

ROWS = [
    Row("asgd", asgd, _ASGD, {}),
    Row("asgd-compensated", asgd, _ASGD, {"compensated": True}, arrays=2),
    Row("nt_asgd", _nt_asgd, _NT_ASGD, {}),
    Row("uniform", _uniform, _SGD, {}),
    Row("uniform-every", _uniform, _SGD, {"every": 2}),
    Row(
        "uniform-compensated",
        _uniform,
        _SGD,
        {"compensated": True, "accumulator_dtype": "float32"},
        arrays=2,
    ),
    Row("polynomial", _polynomial, {**_SGD, "gamma": 1.5}, {}),
    Row("exponential", _exponential, {**_SGD, "decay": 0.4}, {}),
    Row("power", _power, {**_SGD, "gamma": 1.5}, {}),
    Row("plain-ema", _plain_ema, {**_SGD, "decay": 0.4}, {"every": 2}),
    Row("random-scaling", _random_scaling, _SGD, {}, arrays=5, complex=False),
    # The copy of the parameters has their dtype, so it takes 4 bytes less in bfloat16.
    Row("own-params", _own_params, _SGD, {}, arrays=2, narrow_arrays=1),
    Row("end-on-average", _end_on_average, _SGD, {}),
]
