# SPDX-License-Identifier: Apache-2.0
"""Regressions on a stream, with intervals: SGD in one pass, chunk after chunk.

Each observation is a step of a `lax.scan` over the chunk; what goes from chunk to chunk
are the parameters and the state, so that memory does not grow with the stream. The
rates are those of `docs/guides/confidence_intervals.md`.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from asgd_optax import (
    averaged_params,
    confidence_interval,
    running_random_scaling,
    track_random_scaling,
)

DECAY = 0.505  # the rate's exponent

# Regressors (m, d) and responses (m,).
Chunk = tuple[np.ndarray, np.ndarray]


class Loss(NamedTuple):
    """A convex function of a prediction and a response.

    Attributes:
      slope: its derivative by the prediction.
      curvature: a bound of the second derivative, in the mean over the responses.
    """

    slope: Callable[[jax.Array, jax.Array], jax.Array]
    curvature: float


LOSSES = {
    "least squares": Loss(lambda p, y: p - y, 1.0),
    "logistic": Loss(lambda p, y: jax.nn.sigmoid(p) - y, 1 / 4),
    # Half the absolute error; under noise N(0, 1) its curvature is 0.40.
    "median": Loss(lambda p, y: jnp.where(y <= p, 0.5, -0.5), 1 / 2),
}


class Learner(NamedTuple):
    """What a stream is fed to: a carry, a step, and what they come to."""

    init: Callable[[], Any]
    observe: Callable[[Any, jax.Array, jax.Array], Any]
    # Of a carry: the estimate, and the lower and upper ends of its intervals.
    answer: Callable[[Any], tuple[Any, Any, Any]]


def one_rate(loss: Loss, d: int, start: int) -> Learner:
    """SGD with `track_random_scaling` behind it."""

    def rate(step: jax.Array) -> jax.Array:
        return jnp.minimum(1 / d, 0.5 * (1.0 + step) ** -DECAY)

    tx = optax.chain(optax.sgd(rate), track_random_scaling(start=start))

    def init() -> Any:
        w = jnp.zeros(d)
        return w, tx.init(w)

    def observe(carry: Any, x: jax.Array, y: jax.Array) -> Any:
        w, state = carry
        updates, state = tx.update(loss.slope(x @ w, y) * x, state, w)
        return optax.apply_updates(w, updates), state

    def answer(carry: Any) -> tuple[Any, Any, Any]:
        w, state = carry
        return averaged_params(state, w), *confidence_interval(state)

    return Learner(init, observe, answer)


def two_rates(loss: Loss, d: int, start: int) -> Learner:
    """Two runs on the same observations, extrapolated to a rate of zero."""
    factors = jnp.array([1.0, 2.0]) / loss.curvature
    scaling = running_random_scaling(start=start)

    def sgd(factor: jax.Array) -> optax.GradientTransformation:
        def rate(step: jax.Array) -> jax.Array:
            return factor * jnp.minimum(1 / (2 * d), (1.0 + step) ** -DECAY)

        return optax.sgd(rate)

    def descend(factor: Any, w: Any, state: Any, x: Any, y: Any) -> Any:
        grads = loss.slope(x @ w, y) * x
        updates, state = sgd(factor).update(grads, state, w)
        return optax.apply_updates(w, updates), state

    def init() -> Any:
        w = jnp.zeros((2, d))
        states = jax.vmap(lambda factor, w: sgd(factor).init(w))(factors, w)
        return (w, states), scaling.init(jnp.zeros(d))

    def observe(carry: Any, x: jax.Array, y: jax.Array) -> Any:
        (w, states), scaled = carry
        both = jax.vmap(descend, (0, 0, 0, None, None))
        w, states = both(factors, w, states, x, y)
        return (w, states), scaling.update(scaled, 2 * w[0] - w[1])

    def answer(carry: Any) -> tuple[Any, Any, Any]:
        return scaling.value(carry[1]), *scaling.interval(carry[1])

    return Learner(init, observe, answer)


def learn(
    learner: Learner, chunks: Iterable[Chunk]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The learner's answer to a stream; a chunk at a time is in memory.

    Args:
      learner: of as many coefficients as there are regressors.
      chunks: of any lengths; each new length is compiled for.
    """

    @partial(jax.jit, donate_argnums=0)
    def advance(carry: Any, chunk: Chunk) -> Any:
        def body(carry: Any, observation: Any) -> Any:
            return learner.observe(carry, *observation), None

        return jax.lax.scan(body, carry, chunk)[0]

    # A copy: among initial arrays some may be one, and none is donated twice.
    carry = jax.tree.map(jnp.copy, learner.init())
    for chunk in chunks:
        # Waited for, or the chunks to come would pile up in memory.
        carry = jax.block_until_ready(advance(carry, chunk))
    estimate, lower, upper = map(np.asarray, learner.answer(carry))
    return estimate, lower, upper
