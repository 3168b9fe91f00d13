# SPDX-License-Identifier: Apache-2.0
"""Averaged stochastic gradient descent, equal to `torch.optim.ASGD`."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike, DTypeLike

from asgd_optax._core import averaging, checks
from asgd_optax._core.averaging import Mean
from asgd_optax._core.numerics import (
    default_float,
    map_real_and_imaginary,
    rounded_update,
    split_count,
    wide_dtype,
)


class ASGDState(NamedTuple):
    """State of `asgd`. With constant hyperparameters it equals PyTorch's.

    `eta` and `mu` are for reading only. The next update uses these values unless the
    hyperparameters change, but computes them again from `step`.

    Attributes:
      step: number of finished updates. Shape (), int32; stays at 2**31 - 1.
      eta: step size at `step`. Shape (), JAX's default float dtype.
      mu: weight of the next iterate in the average. Shape and dtype of `eta`.
      ax: the average. Shapes of the parameters; their dtypes (float32 for 16-bit
        floats) or the `accumulator_dtype`. With `compensated=True`, a `CompensatedMean`
        of two such trees.
    """

    step: jax.Array
    eta: jax.Array
    mu: jax.Array
    ax: Mean


def asgd(
    learning_rate: optax.ScalarOrSchedule = 1e-2,
    lambd: ArrayLike = 1e-4,
    alpha: ArrayLike = 0.75,
    t0: ArrayLike = 1_000_000,
    weight_decay: ArrayLike = 0.0,
    *,
    accumulator_dtype: DTypeLike | None = None,
    compensated: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Averaged stochastic gradient descent (ASGD), as `torch.optim.ASGD`.

    This is Polyak & Juditsky's averaging in Bottou's form. After :math:`t` updates, the
    next update maps the parameters :math:`p` and the gradient :math:`g` to

    .. math::

        \eta &= \mathrm{lr} / (1 + \lambda\,\mathrm{lr}\,t)^\alpha \\
        \mu &= 1 / \max(1, t - t_0) \\
        p' &= (1 - \lambda\eta)\,p - \eta\,(g + \mathrm{wd}\,p) \\
        \bar p' &= p' \text{ if } \mu = 1 \text{ else } \bar p + \mu\,(p' - \bar p)

    With integer `t0`, after :math:`n > t_0 + 1` updates the average is the mean of
    :math:`p_{t_0+2}, \dots, p_n` (the off-by-one is PyTorch's). The averaged iterates
    are those of `optax.apply_updates`, including rounding. If a later transformation
    changes the updates, the average no longer matches your parameters. Read the average
    with `asgd_optax.averaged_params`.

    Args:
      learning_rate: lr, the step size at :math:`t = 0`, or an optax schedule: a
        function of :math:`t`.
      lambd: :math:`\lambda`, decay of the parameters and of the step size.
      alpha: :math:`\alpha`, power of the step size's decay.
      t0: number of updates after which averaging begins; `inf` for never. Need not be
        whole.
      weight_decay: wd, L2 penalty added to the gradient.
      accumulator_dtype: precision of the average, such as "float32"; complex leaves
        take the corresponding complex type (at least complex64). By default the
        dtype of the parameter, float32 for 16-bit floats. (With
        `optax.inject_hyperparams` pass a string, because it mistakes a type for a
        schedule.)
      compensated: whether to keep the average as a `CompensatedMean`, which stays
        accurate over millions of updates, at the cost of one more array of the
        parameters' size. It acts in `init`; later updates follow the kind of their
        state.

    Every numeric hyperparameter is a scalar and may be traced, so `jax.vmap` and
    `jax.grad` work over all of them.

    Returns:
      A transformation whose `init(params)` copies the parameters into an `ASGDState`
      and whose `update(gradients, state, params, **ignored)` returns the step from
      :math:`p` to :math:`p'`, in the gradients' shapes and dtypes, and the new state.
      It computes in at least float32.

    Raises:
      TypeError: If a hyperparameter is not a number, a leaf is not floating or complex
        or has fewer than 16 bits, a gradient is sparse, only one of a gradient and its
        parameter is complex, or the state is not an `ASGDState`. Leaves are named by
        their path.
      ValueError: If a concrete hyperparameter is negative, NaN or (except `t0`)
        infinite, or is not a scalar; if `t0` is an array of a floating type narrower
        than 32 bits; if `accumulator_dtype` is not floating; from `update`, if params
        are missing, or a structure or shape differs from the parameters'.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> from asgd_optax import asgd, averaged_params
      >>> loss = lambda w: jnp.sum((w - 3.0) ** 2)
      >>> tx = asgd(learning_rate=0.4, lambd=0.0, t0=10)
      >>> params = jnp.zeros(2)
      >>> state = tx.init(params)
      >>> @jax.jit
      ... def train_step(params, state, noise):
      ...     grads = jax.grad(loss)(params) + noise
      ...     updates, state = tx.update(grads, state, params)
      ...     return optax.apply_updates(params, updates), state
      >>> for noise in jax.random.normal(jax.random.key(0), (1000, 2)):
      ...     params, state = train_step(params, state, noise)
      >>> bool(jnp.all(jnp.abs(averaged_params(state, params) - 3.0) < 0.05))
      True

    References:
      Polyak & Juditsky, `Acceleration of stochastic approximation by averaging
      <https://doi.org/10.1137/0330046>`_, SIAM J. Control Optim. 30(4), 1992.

      Bottou, `Large-scale machine learning with stochastic gradient descent
      <https://leon.bottou.org/publications/pdf/compstat-2010.pdf>`_, COMPSTAT 2010.
    """
    check_step_rule(learning_rate, lambd, alpha, weight_decay)
    checks.check_hyperparameter("t0", t0, may_be_inf=True)
    checks.check_not_narrowed("t0", t0)
    checks.check_accumulator_dtype(accumulator_dtype)

    def eta_and_mu(step: jax.Array) -> tuple[jax.Array, jax.Array]:
        lr = learning_rate(step) if callable(learning_rate) else learning_rate
        return step_size(step, lr, lambd, alpha), weight_at(step, t0)

    def init_fn(params: optax.Params) -> ASGDState:
        checks.check_params(params)
        step = jnp.zeros([], jnp.int32)
        ax = averaging.init_mean(params, accumulator_dtype, compensated)
        return ASGDState(step, *eta_and_mu(step), ax)

    def update_fn(
        updates: optax.Updates,
        state: ASGDState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, ASGDState]:
        del extra_args
        checks.check_state(state, ASGDState)
        step = jnp.asarray(state.step)
        eta, mu = eta_and_mu(step)
        decay = default_float(lambd) + default_float(weight_decay)
        steps, ax = asgd_update(updates, params, state.ax, eta, mu, decay)
        step = optax.safe_increment(step)
        return steps, ASGDState(step, *eta_and_mu(step), ax)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def check_step_rule(
    learning_rate: optax.ScalarOrSchedule,
    lambd: ArrayLike,
    alpha: ArrayLike,
    weight_decay: ArrayLike,
) -> None:
    """Raise unless the hyperparameters of the step rule are valid."""
    for name, value in (
        ("lambd", lambd),
        ("alpha", alpha),
        ("weight_decay", weight_decay),
    ):
        checks.check_hyperparameter(name, value)
    if not callable(learning_rate):
        checks.check_hyperparameter("learning_rate", learning_rate)


def asgd_update(
    updates: optax.Updates,
    params: optax.Params,
    ax: Mean,
    eta: jax.Array,
    mu: jax.Array,
    decay: jax.Array,
) -> tuple[optax.Updates, Mean]:
    """Compute the steps to p' = p - eta (g + decay p), and average p' with weight mu.

    Args:
      updates: the gradients g.
      params: the parameters p.
      ax: the average so far.
      eta: the step size, a floating scalar.
      mu: the weight of p' in the average, a floating scalar.
      decay: lambd + weight_decay, a floating scalar. One sum avoids the cancellation in
        (1 - lambd eta) p - eta (g + wd p) - p.

    Returns:
      The steps p' - p, in the dtypes of `updates`, and the new average.
    """
    checks.check_update(updates, params, {"state.ax": averaging.mean_value(ax)})

    minus_eta = -eta

    def step_of(g: Any, p: Any) -> jax.Array:
        return _step(minus_eta, decay, jnp.asarray(g), jnp.asarray(p))

    steps = jax.tree.map(step_of, updates, params)
    iterates = optax.apply_updates(params, steps)
    return steps, averaging.update_mean(ax, iterates, mu)


@jax.jit
def _step(
    minus_eta: jax.Array, decay: jax.Array, g: jax.Array, p: jax.Array
) -> jax.Array:
    """Return -eta (g + decay p) in the dtype of g."""

    def f(g: jax.Array, p: jax.Array) -> jax.Array:
        return minus_eta.astype(g.dtype) * (g + decay.astype(g.dtype) * p)

    wide = wide_dtype(g, p)
    step = map_real_and_imaginary(f, g.astype(wide), p.astype(wide))
    return rounded_update(step, g.dtype)


def step_size(
    step: jax.Array, lr: ArrayLike, lambd: ArrayLike, alpha: ArrayLike
) -> jax.Array:
    """Return lr / (1 + lambd lr t)^alpha."""
    lr, lambd, alpha = default_float(lr), default_float(lambd), default_float(alpha)
    return lr / (1 + lambd * lr * step.astype(lr.dtype)) ** alpha


def weight_at(step: jax.Array, t0: ArrayLike) -> jax.Array:
    """Return 1 / max(1, t - t0)."""
    whole, fraction = split_count(t0)
    since = (step - whole).astype(fraction.dtype) - fraction
    return jnp.reciprocal(jnp.maximum(1, since))
