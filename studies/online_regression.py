# SPDX-License-Identifier: Apache-2.0
"""Regressions on a stream with confidence intervals: one pass of SGD in chunks.

Each observation is one step of a `lax.scan` over its chunk. Only the parameters and the
state pass from chunk to chunk, so memory does not grow with the stream. The learning
rates are those of `docs/how_to/confidence_intervals.md`.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from asgd_optax import confidence_interval, running_random_scaling

DECAY = 0.505  # exponent of the learning rate

# Regressors (m, d) and responses (m,).
Chunk = tuple[np.ndarray, np.ndarray]


class Loss(NamedTuple):
    """A convex function of a prediction and a response.

    Attributes:
      slope: its derivative with respect to the prediction.
      curvature: a bound of the second derivative, in the mean over the responses.
    """

    slope: Callable[[jax.Array, jax.Array], jax.Array]
    curvature: float


LOSSES = {
    "least squares": Loss(lambda p, y: p - y, 1.0),
    "logistic": Loss(lambda p, y: jax.nn.sigmoid(p) - y, 1 / 4),
    # Half the absolute error; with noise N(0, 1) its curvature is 0.40.
    "median": Loss(lambda p, y: jnp.where(y <= p, 0.5, -0.5), 1 / 2),
}


class Learner(NamedTuple):
    """A learner on a stream: its initial carry, step and answer."""

    init: Callable[[], Any]
    observe: Callable[[Any, jax.Array, jax.Array], Any]
    # From the carry: the estimate, and the lower and upper ends of its intervals.
    answer: Callable[[Any], tuple[Any, Any, Any]]


def one_rate(loss: Loss, d: int, start: int) -> Learner:
    """Return SGD with random scaling of its iterates."""

    def rate(step: jax.Array) -> jax.Array:
        return jnp.minimum(1 / d, 0.5 * (1.0 + step) ** -DECAY)

    sgd, scaling = optax.sgd(rate), running_random_scaling(start=start)

    def init() -> Any:
        w = jnp.zeros(d)
        return w, sgd.init(w), scaling.init(w)

    def observe(carry: Any, x: jax.Array, y: jax.Array) -> Any:
        w, state, scaled = carry
        updates, state = sgd.update(loss.slope(x @ w, y) * x, state, w)
        w = optax.apply_updates(w, updates)
        return w, state, scaling.update(scaled, w)

    def answer(carry: Any) -> tuple[Any, Any, Any]:
        scaled = carry[-1]
        return scaling.value(scaled), *confidence_interval(scaled)

    return Learner(init, observe, answer)


def two_rates(loss: Loss, d: int, start: int) -> Learner:
    """Return two runs on the same observations, extrapolated to a rate of zero."""
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
        return scaling.value(carry[-1]), *confidence_interval(carry[-1])

    return Learner(init, observe, answer)


def learn(
    learner: Learner, chunks: Iterable[Chunk]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the learner's answer to a stream, with one chunk at a time in memory.

    Args:
      learner: with as many coefficients as there are regressors.
      chunks: of any lengths; each new length is compiled.
    """

    @partial(jax.jit, donate_argnums=0)
    def advance(carry: Any, chunk: Chunk) -> Any:
        def body(carry: Any, observation: Any) -> Any:
            return learner.observe(carry, *observation), None

        return jax.lax.scan(body, carry, chunk)[0]

    # Copied, because initial arrays may be shared, and none may be donated twice.
    carry = jax.tree.map(jnp.copy, learner.init())
    for chunk in chunks:
        # Wait, or the next chunks pile up in memory.
        carry = jax.block_until_ready(advance(carry, chunk))
    estimate, lower, upper = map(np.asarray, learner.answer(carry))
    return estimate, lower, upper
