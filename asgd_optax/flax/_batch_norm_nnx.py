# SPDX-License-Identifier: Apache-2.0
"""What each BatchNorm of a Flax NNX model normalises a batch with."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from asgd_optax._core import checks

# The statistics of each BatchNorm by its path: its mean and its variance.
Statistics = dict[tuple[Any, ...], tuple[jax.Array, jax.Array]]


def nnx_batch_norms(
    model: nnx.Module, call: Callable[[Any, Any], Any]
) -> tuple[Callable[[Any], Statistics], Callable[[Statistics], None]]:
    """A function that tells a batch's statistics, and one that puts them in the model.

    Raises:
      ValueError: a model without a BatchNorm; from the first function, a BatchNorm that
        `call` does not reach, or not in training mode.
    """
    found = _batch_norms(model)
    # A copy, so that neither an error nor the calls leave a trace in the model.
    copy = nnx.clone(model)
    layers = _batch_norms(copy)
    for layer in layers.values():
        layer.use_running_average = False
        # The running statistics after a batch are then that batch's own.
        layer.momentum = 0.0

    def statistics(batch: Any) -> Statistics:
        for layer in layers.values():
            # Momentum 0 would keep a NaN. No batch has a negative variance: where
            # this one is still there afterwards, the layer has not seen the batch.
            layer.mean[...] = jnp.zeros_like(layer.mean[...])
            layer.var[...] = jnp.full_like(layer.var[...], -1)
        call(copy, batch)
        new = {path: (la.mean[...], la.var[...]) for path, la in layers.items()}
        for path, (_, var) in new.items():
            if not checks.is_traced(var) and np.any(np.asarray(var) == -1):
                raise ValueError(
                    f"the BatchNorm {'.'.join(map(str, path)) or 'given'} was not used"
                    " in training mode: pass a `call` that reaches it and does not"
                    " tell it to use its running average"
                )
        return new

    def write(new: Statistics) -> None:
        for path, (mean, var) in new.items():
            layer = found[path]
            layer.mean[...] = mean.astype(layer.mean[...].dtype)
            layer.var[...] = var.astype(layer.var[...].dtype)

    return statistics, write


def _batch_norms(model: nnx.Module) -> dict[tuple[Any, ...], nnx.BatchNorm]:
    """The BatchNorms of a model by their paths; one shared by several only once."""
    layers = {
        path: module
        for path, module in nnx.iter_modules(model)
        if isinstance(module, nnx.BatchNorm)
    }
    if not layers:
        raise ValueError(f"{type(model).__name__} has no nnx.BatchNorm to update")
    return layers
