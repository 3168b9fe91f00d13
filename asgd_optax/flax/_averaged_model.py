# SPDX-License-Identifier: Apache-2.0
"""Copies of Flax NNX models with averaged parameters."""

from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from asgd_optax._accessors.averaged_params import averaged_params
from asgd_optax._core import averaging

_M = TypeVar("_M", bound=nnx.Module)


def averaged_model(model: _M, optimizer: Any, *, wrt: Any = None) -> _M:
    """Return a copy of `model` with the averaged parameters.

    All its arrays are copies, including BatchNorm's statistics and the state of `Rngs`.
    You can donate, change or delete either model without affecting the other. An
    average in host memory is copied to the device. Before averaging begins, the
    parameters are those after the latest update (at first, those with which the
    optimizer was created).

    BatchNorm's running statistics do not fit the averaged parameters: recompute them
    with `update_batch_stats`.

    Args:
      model: an `nnx.Module`.
      optimizer: the `nnx.Optimizer` that trains it, or an optimizer state in which
        `averaged_params` finds an average.
      wrt: a filter for the variables that are optimized. By default the optimizer's
        own, or `nnx.Param` for an optimizer state.

    Returns:
      A module of the type of `model`, with arrays of the same shapes and dtypes.
      Parameters that are not averaged are copies of those of `model`.

    Raises:
      TypeError: If `model` is not an `nnx.Module`.
      ValueError: As for `averaged_params`.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> from flax import nnx
      >>> from asgd_optax import average_iterates
      >>> from asgd_optax.flax import averaged_model
      >>> model = nnx.Linear(1, 1, use_bias=False, rngs=nnx.Rngs(0))
      >>> model.kernel[...] = jnp.full((1, 1), 8.0)
      >>> tx = optax.chain(optax.sgd(0.5), average_iterates())
      >>> optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
      >>> for _ in range(2):  # iterates 4 and 2
      ...     _ = optimizer.update(model, nnx.state(model, nnx.Param))
      >>> print(averaged_model(model, optimizer)(jnp.ones(1)), model(jnp.ones(1)))
      [3.] [2.]
    """
    if not isinstance(model, nnx.Module):
        raise TypeError(f"model must be an nnx.Module; got a {type(model).__name__}")
    if isinstance(optimizer, nnx.Optimizer):
        wrt = optimizer.wrt if wrt is None else wrt
        optimizer = optimizer.opt_state
    wrt = nnx.Param if wrt is None else wrt
    graph, params, *others = nnx.split(model, wrt, ...)
    try:
        average = averaged_params(optimizer, params)
    except ValueError as error:
        error.add_note(
            f"params are the variables of the model that match {wrt} (`wrt`)"
        )
        raise
    return nnx.merge(graph, *jax.tree.map(_copied, (average, *others)))


def _copied(x: Any) -> Any:
    """Copy JAX and NumPy arrays; return anything else unchanged."""
    if isinstance(x, jax.Array):
        return jnp.copy(averaging.in_device_memory(x))
    return x.copy() if isinstance(x, np.ndarray) else x
