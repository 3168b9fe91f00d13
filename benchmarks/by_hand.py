# SPDX-License-Identifier: Apache-2.0
"""Hand-written versions of this library's averages in JAX, for comparison."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from asgd_optax import (
    exponential_weighting,
    polynomial_weighting,
    power_weighting,
    uniform_weighting,
)

DECAY = 0.999
GAMMA = 6.94  # of the power-function average with relative width 0.1
ORDER = 3.0  # of the polynomial


class Rule(NamedTuple):
    """A rule: average <- average + w(n) * (iterate - average) for n = 1, 2, ...

    Attributes:
      weighting: w from this library.
      by_hand: w by its formula, or a number if it is the same for every n.
    """

    weighting: Callable[[jax.Array], ArrayLike]
    by_hand: Callable[[jax.Array], ArrayLike] | float


RULES = {
    "uniform": Rule(uniform_weighting(), lambda n: 1 / n),
    "EMA": Rule(exponential_weighting(DECAY, debias=False), 1 - DECAY),
    "debiased EMA": Rule(
        exponential_weighting(DECAY), lambda n: (1 - DECAY) / (1 - DECAY**n)
    ),
    "power": Rule(power_weighting(GAMMA), lambda n: 1 - (1 - 1 / n) ** (GAMMA + 1)),
    "polynomial": Rule(
        polynomial_weighting(ORDER), lambda n: (ORDER + 1) / (n + ORDER)
    ),
}


class ByHand(NamedTuple):
    """A hand-written average, updated after the optimizer in the same jit.

    Attributes:
      init: takes params; returns the state, whose first part is the average.
      update: takes the state and the new params; returns the new state.
    """

    init: Callable[[Any], Any]
    update: Callable[[Any, Any], Any]


def average(rule: Rule, *, every: int = 1, compensated: bool = False) -> ByHand:
    """Average with a `tree_map` after `apply_updates`.

    Args:
      rule: the weights of the average.
      every: average only every `every`-th iterate.
      compensated: whether to keep the rounding errors (Kahan summation).
    """
    constant = None if callable(rule.by_hand) else rule.by_hand
    # A constant weight at every step needs no counter.
    counts = constant is None or every > 1

    def init(params: Any) -> Any:
        mean = jax.tree.map(_copied, params)
        residual = jax.tree.map(jnp.zeros_like, mean) if compensated else None
        return mean, residual, jnp.zeros([], jnp.int32) if counts else None

    def update(state: Any, params: Any) -> Any:
        mean, residual, step = state
        if counts:
            step = step + 1
        weight: Any = constant
        if callable(rule.by_hand):
            weight = rule.by_hand((step // every).astype(jnp.result_type(float)))

        def averaged() -> Any:
            if not compensated:
                return jax.tree.map(
                    lambda m, p: m + weight * (p - m), mean, params
                ), None
            change = jax.tree.map(
                lambda m, r, p: weight * (p - m) - r, mean, residual, params
            )
            total = jax.tree.map(jnp.add, mean, change)
            rest = jax.tree.map(lambda t, m, c: (t - m) - c, total, mean, change)
            return total, rest

        if every == 1:
            return *averaged(), step
        # With cond, a step that does not average costs nothing.
        kept = jax.lax.cond(step % every == 0, averaged, lambda: (mean, residual))
        return *kept, step

    return ByHand(init, update)


class Optimizer(NamedTuple):
    """A hand-written optimizer.

    Attributes:
      init: takes params; returns the state.
      step: takes params, state and gradients; returns new params and state.
    """

    init: Callable[[Any], Any]
    step: Callable[[Any, Any, Any], tuple[Any, Any]]


def asgd(
    rate: float, lambd: float = 1e-4, alpha: float = 0.75, t0: float = 1e6
) -> Optimizer:
    """Implement `torch.optim.ASGD` from its formulas."""

    def init(params: Any) -> Any:
        return jax.tree.map(_copied, params), jnp.zeros([], jnp.int32)

    def step(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        mean, count = state
        steps = count.astype(jnp.result_type(float))
        eta = rate / (1 + lambd * rate * steps) ** alpha
        mu = 1 / jnp.maximum(1, steps - t0)
        params = jax.tree.map(
            lambda p, g: p * (1 - lambd * eta) - eta * g, params, grads
        )
        mean = jax.tree.map(
            lambda m, p: jnp.where(mu == 1, p, m + mu * (p - m)), mean, params
        )
        return params, (mean, count + 1)

    return Optimizer(init, step)


def _copied(param: Any) -> jax.Array:
    """Copy a parameter, to float32 if it is narrower."""
    return jnp.array(param, jnp.promote_types(jnp.result_type(param), jnp.float32))
