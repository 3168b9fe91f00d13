# SPDX-License-Identifier: Apache-2.0
"""NT-ASGD: averaging that starts when the validation loss stalls."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike, DTypeLike

from asgd_optax._core import averaging, checks
from asgd_optax._core.averaging import Mean
from asgd_optax._core.numerics import default_float
from asgd_optax._transforms.asgd import (
    asgd_update,
    check_step_rule,
    step_size,
    weight_at,
)


class NTASGDState(NamedTuple):
    """State of `nt_asgd`.

    Attributes:
      step: number of finished updates. Shape (), int32; stays at 2**31 - 1.
      triggered: whether averaging has started. Shape (), bool.
      since: number of finished updates since the trigger, including the triggering one;
        0 before. Shape (), int32; stays at 2**31 - 1.
      recent: the last `nonmono` validation losses, the latest last, padded with
        infinity. Shape (nonmono,), JAX's default float dtype.
      lowest: the lowest of the earlier losses, infinity if there are none. Shape (),
        dtype of `recent`.
      ax: the average, as `ASGDState.ax`; until the trigger, the current iterate.
    """

    step: jax.Array
    triggered: jax.Array
    since: jax.Array
    recent: jax.Array
    lowest: jax.Array
    ax: Mean


def nt_asgd(
    learning_rate: optax.ScalarOrSchedule,
    *,
    nonmono: int = 5,
    lambd: ArrayLike = 0.0,
    alpha: ArrayLike = 0.75,
    weight_decay: ArrayLike = 0.0,
    accumulator_dtype: DTypeLike | None = None,
    compensated: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Non-monotonically triggered ASGD (NT-ASGD; Merity, Keskar & Socher 2017).

    It runs SGD with weight decay until the validation loss stops improving, then a
    fresh `asgd(t0=0)`, in one compiled program. Let :math:`t` be the number of updates
    and :math:`k` the number of updates since the trigger (0 before it). The next update
    maps the parameters :math:`p` and the gradient :math:`g` to

    .. math::

        \eta &= \mathrm{lr} / (1 + \lambda\,\mathrm{lr}\,k)^\alpha \\
        p' &= (1 - \lambda\eta)\,p - \eta\,(g + \mathrm{wd}\,p)

    with :math:`\lambda = 0` before the trigger. Until :math:`k = 2` the average is
    :math:`p'`. Then it is the mean of the iterates since the trigger except the first,
    as with ``torch.optim.ASGD(t0=0)``.

    Pass each measured validation loss to the next update as `validation_loss=v`.
    Averaging starts if v is above the lowest of all earlier losses except the last
    `nonmono`. This is the rule of the AWD-LSTM code, which differs from the text of the
    paper. Averaging is triggered once; later losses change nothing.

    Args:
      learning_rate: lr, a number or an optax schedule: a function of :math:`t`, which
        counts all updates.
      nonmono: number of latest losses with which a new loss is not compared, a whole
        number of at least 1. It sets the size of the state, so it cannot be traced
        (name it in `static_args` of `optax.inject_hyperparams`). It acts in `init`;
        later updates follow their state.
      lambd: :math:`\lambda`, decay of the parameters and of the step size after the
        trigger.
      alpha: :math:`\alpha`, power of the step size's decay.
      weight_decay: wd, L2 penalty added to the gradient.
      accumulator_dtype: precision of the average, as for `asgd`.
      compensated: whether to keep the average as a `CompensatedMean`.

    The other numeric hyperparameters are scalars and may be traced.

    Returns:
      A transformation whose `init(params)` copies the parameters into an `NTASGDState`
      and whose `update(gradients, state, params, *, validation_loss=None, **ignored)`
      returns the step from :math:`p` to :math:`p'`, in the gradients' shapes and
      dtypes, and the new state. `validation_loss` is a real scalar, compared in JAX's
      default float dtype; `None` and NaN mean that no loss was measured. (An array that
      is NaN in most steps avoids a second compilation.) It must be the same on all
      devices. Inside `optax.MultiSteps` pass it with every minibatch of an update; it
      is used once. If `optax.apply_if_finite` drops an update, its loss is dropped too.
      `optax.tree_utils.tree_get(state, "triggered")` returns whether averaging has
      started.

    Raises:
      TypeError: As for `asgd`, or if `validation_loss` is not a real number.
      ValueError: As for `asgd`; if `nonmono` is less than 1, not whole or traced; if
        `validation_loss` is not a scalar.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> from asgd_optax import averaged_params, nt_asgd
      >>> tx = nt_asgd(0.5, nonmono=1)
      >>> params = jnp.array(8.0)
      >>> state = tx.init(params)
      >>> for loss in [3.0, 2.0, 4.0, None, None]:  # 4.0 is above 3.0
      ...     grads = jnp.array(1.0)
      ...     updates, state = tx.update(grads, state, params, validation_loss=loss)
      ...     params = optax.apply_updates(params, updates)
      ...     print(params, averaged_params(state), state.triggered)
      7.5 7.5 False
      7.0 7.0 False
      6.5 6.5 True
      6.0 6.0 True
      5.5 5.75 True

    References:
      Merity, Keskar & Socher, `Regularizing and optimizing LSTM language models
      <https://arxiv.org/abs/1708.02182>`_, ICLR 2018, with the rule of `its code
      <https://github.com/salesforce/awd-lstm-lm/blob/master/main.py>`_.
    """
    check_step_rule(learning_rate, lambd, alpha, weight_decay)
    checks.check_count("nonmono", nonmono, at_least=1, may_be_inf=False)
    checks.check_accumulator_dtype(accumulator_dtype)

    def init_fn(params: optax.Params) -> NTASGDState:
        checks.check_params(params)
        if checks.is_traced(nonmono):
            raise ValueError(
                "nonmono sets the size of the state, so it cannot be traced: pass"
                ' static_args="nonmono" to optax.inject_hyperparams'
            )
        size = int(checks.concrete(nonmono))
        no_losses = jnp.full(size, jnp.inf, jnp.result_type(float))
        return NTASGDState(
            step=jnp.zeros([], jnp.int32),
            triggered=jnp.zeros([], bool),
            since=jnp.zeros([], jnp.int32),
            recent=no_losses,
            lowest=no_losses[0],
            ax=averaging.init_mean(params, accumulator_dtype, compensated),
        )

    def update_fn(
        updates: optax.Updates,
        state: NTASGDState,
        params: optax.Params | None = None,
        *,
        validation_loss: ArrayLike | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, NTASGDState]:
        del extra_args
        checks.check_state(state, NTASGDState)
        step, since = jnp.asarray(state.step), jnp.asarray(state.since)
        triggered, recent, lowest = _after_loss(
            validation_loss,
            jnp.asarray(state.triggered),
            jnp.asarray(state.recent),
            jnp.asarray(state.lowest),
        )
        lr = learning_rate(step) if callable(learning_rate) else learning_rate
        # Before the trigger `since` is 0: the learning rate does not decay, and the
        # weight is 1.
        eta = step_size(since, lr, lambd, alpha)
        decay = default_float(weight_decay)
        decay = decay + jnp.where(triggered, default_float(lambd), 0)
        mu = weight_at(since, 0)
        steps, ax = asgd_update(updates, params, state.ax, eta, mu, decay)
        return steps, NTASGDState(
            step=optax.safe_increment(step),
            triggered=triggered,
            since=jnp.where(triggered, optax.safe_increment(since), 0),
            recent=recent,
            lowest=lowest,
            ax=ax,
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _after_loss(
    loss: ArrayLike | None,
    triggered: jax.Array,
    recent: jax.Array,
    lowest: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return `triggered`, `recent` and `lowest` after one more validation loss.

    AWD-LSTM's rule for a loss v after the losses h is
    `len(h) > nonmono and v > min(h[:-nonmono])`. `lowest` is that minimum. It is
    infinite while there are too few losses, so they need not be counted.
    """
    if loss is None:
        return triggered, recent, lowest
    checks.check_scalar("validation_loss", loss)
    if jnp.iscomplexobj(loss):
        raise TypeError(f"validation_loss must be real; got {loss!r}")
    if isinstance(loss, int):
        loss = checks.concrete(loss)  # It may be too large for JAX.
    loss = jnp.asarray(loss, dtype=recent.dtype)
    triggered = triggered | (loss > lowest)
    measured = loss == loss  # False for NaN
    lowest = jnp.where(measured, jnp.minimum(lowest, recent[0]), lowest)
    recent = jnp.where(measured, jnp.append(recent[1:], loss), recent)
    return triggered, recent, lowest
