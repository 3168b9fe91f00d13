# SPDX-License-Identifier: Apache-2.0
"""The table of transformations that the conformance battery runs over."""

from collections.abc import Callable
from typing import Any, NamedTuple

import optax

from asgd_optax import (
    asgd,
    average_iterates,
    exponential_weighting,
    nt_asgd,
    polynomial_weighting,
    power_weighting,
    running_random_scaling,
    track_random_scaling,
    uniform_weighting,
)


class Row(NamedTuple):
    """One transformation under test.

    `hyperparameters` are its numeric ones, at values where it is smooth in each and
    where averaging begins within a few steps; `options` are the others. `arrays` is
    how many arrays of a parameter's shape its state has for each; `complex`, whether
    parameters may be complex.
    """

    name: str
    factory: Callable[..., optax.GradientTransformationExtraArgs]
    hyperparameters: dict[str, float]
    options: dict[str, Any]
    arrays: int = 1
    complex: bool = True

    def make(self, **changed: Any) -> optax.GradientTransformationExtraArgs:
        return self.factory(**{**self.hyperparameters, **self.options, **changed})


_ASGD = {
    "learning_rate": 0.3,
    "lambd": 0.2,
    "alpha": 0.6,
    "t0": 1.25,
    "weight_decay": 0.1,
}


def _uniform(
    learning_rate, start=1, every=1, compensated=False, accumulator_dtype=None
):
    average = average_iterates(
        uniform_weighting(),
        start=start,
        every=every,
        compensated=compensated,
        accumulator_dtype=accumulator_dtype,
    )
    return optax.chain(optax.sgd(learning_rate), average)


def _polynomial(learning_rate, gamma, start=1):
    return optax.chain(
        optax.sgd(learning_rate),
        average_iterates(polynomial_weighting(gamma), start=start),
    )


def _exponential(learning_rate, decay, start=1):
    return optax.chain(
        optax.sgd(learning_rate),
        average_iterates(exponential_weighting(decay), start=start),
    )


def _power(learning_rate, gamma, start=1):
    return optax.chain(
        optax.sgd(learning_rate), average_iterates(power_weighting(gamma), start=start)
    )


def _plain_ema(learning_rate, decay, start=0, every=1):
    """As many keep by hand: from the parameters, every so many steps."""
    weighting = exponential_weighting(decay, debias=False)
    average = average_iterates(weighting, start=start, every=every, include_start=True)
    return optax.chain(optax.sgd(learning_rate), average)


def _nt_asgd(learning_rate, lambd, alpha, weight_decay, compensated=False):
    """Given losses that rise from the first on, it triggers at the third update."""
    tx = nt_asgd(
        learning_rate,
        nonmono=1,
        lambd=lambd,
        alpha=alpha,
        weight_decay=weight_decay,
        compensated=compensated,
    )

    def update(updates, state, params=None, **extra):
        return tx.update(updates, state, params, validation_loss=state.step, **extra)

    return optax.GradientTransformationExtraArgs(tx.init, update)


def _random_scaling(learning_rate, start=1):
    return optax.chain(optax.sgd(learning_rate), track_random_scaling(start=start))


def _running_random_scaling(learning_rate, start=1):
    """Fed the iterates, in a chain: what takes a stream passes the same battery."""
    scaling = running_random_scaling(start=start)

    def update(updates, state, params=None, **extra):
        return updates, scaling.update(state, optax.apply_updates(params, updates))

    feed = optax.GradientTransformationExtraArgs(scaling.init, update)
    return optax.chain(optax.sgd(learning_rate), feed)


_NT_ASGD = {name: v for name, v in _ASGD.items() if name != "t0"}

ROWS = [
    Row("asgd", asgd, _ASGD, {}),
    Row("asgd-compensated", asgd, _ASGD, {"compensated": True}, arrays=2),
    Row("nt_asgd", _nt_asgd, _NT_ASGD, {}),
    Row("uniform", _uniform, {"learning_rate": 0.3}, {}),
    Row("uniform-every", _uniform, {"learning_rate": 0.3}, {"every": 2}),
    Row(
        "uniform-compensated",
        _uniform,
        {"learning_rate": 0.3},
        {"compensated": True, "accumulator_dtype": "float32"},
        arrays=2,
    ),
    Row("polynomial", _polynomial, {"learning_rate": 0.3, "gamma": 1.5}, {}),
    Row("exponential", _exponential, {"learning_rate": 0.3, "decay": 0.4}, {}),
    Row("power", _power, {"learning_rate": 0.3, "gamma": 1.5}, {}),
    Row("plain-ema", _plain_ema, {"learning_rate": 0.3, "decay": 0.4}, {"every": 2}),
    Row(
        "random-scaling",
        _random_scaling,
        {"learning_rate": 0.3},
        {},
        arrays=5,
        complex=False,
    ),
    Row(
        "running-random-scaling",
        _running_random_scaling,
        {"learning_rate": 0.3},
        {},
        arrays=5,
        complex=False,
    ),
]
