# SPDX-License-Identifier: Apache-2.0
"""The table of transformations that the conformance battery runs over."""

from collections.abc import Callable
from typing import Any, NamedTuple

import optax

from asgd_optax import asgd


class Row(NamedTuple):
    """One transformation under test.

    `hyperparameters` are its numeric ones, at values where it is smooth in each and
    where averaging begins within a few steps; `options` are the others.
    """

    name: str
    factory: Callable[..., optax.GradientTransformationExtraArgs]
    hyperparameters: dict[str, float]
    options: dict[str, Any]

    def make(self, **changed: Any) -> optax.GradientTransformationExtraArgs:
        return self.factory(**{**self.hyperparameters, **self.options, **changed})


_ASGD = {
    "learning_rate": 0.3,
    "lambd": 0.2,
    "alpha": 0.6,
    "t0": 1.25,
    "weight_decay": 0.1,
}

ROWS = [
    Row("asgd", asgd, _ASGD, {}),
    Row("asgd-compensated", asgd, _ASGD, {"compensated": True}),
    Row("asgd-float32", asgd, _ASGD, {"accumulator_dtype": "float32"}),
]
