# SPDX-License-Identifier: Apache-2.0
"""Batch statistics of the BatchNorms in a Flax NNX model."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from asgd_optax._core import checks


def nnx_batch_stats(
    model: nnx.Module, call: Callable[[Any, Any], Any]
) -> tuple[Callable[[Any], Any], Callable[[Any], None]]:
    """Return a function that computes statistics, and one that writes them to `model`.

    Raises:
      ValueError: If the model has no BatchNorm; from the first function, if `call` does
        not reach a BatchNorm or does not run it in training mode.
    """
    found = _batch_norms(model)
    # The calls, and errors in them, must not change the model.
    copy = nnx.clone(model)
    layers = _batch_norms(copy)
    for layer in layers.values():
        layer.use_running_average = False
        # The running statistics after a batch are then those of the batch.
        layer.momentum = 0.0

    def statistics(batch: Any) -> Any:
        for layer in layers.values():
            # With momentum 0 a NaN would remain. A variance that is still negative
            # after the call shows that the layer has not seen the batch.
            layer.mean[...] = jnp.zeros_like(layer.mean[...])
            layer.var[...] = jnp.full_like(layer.var[...], -1)
        call(copy, batch)
        new = {
            path: (layer.mean[...], layer.var[...]) for path, layer in layers.items()
        }
        for path, (_, var) in new.items():
            if not checks.is_traced(var) and np.any(np.asarray(var) == -1):
                raise ValueError(
                    f"the BatchNorm {'.'.join(map(str, path)) or 'given'} was not used"
                    " in training mode: pass a `call` that reaches it and does not set"
                    " `use_running_average`"
                )
        return new

    def write(mean_and_var: Any) -> None:
        for path, (mean, var) in mean_and_var.items():
            layer = found[path]
            layer.mean[...] = mean.astype(layer.mean[...].dtype)
            layer.var[...] = var.astype(layer.var[...].dtype)

    return statistics, write


def _batch_norms(model: nnx.Module) -> dict[tuple[Any, ...], nnx.BatchNorm]:
    """Return the BatchNorms of a model by their paths, a shared one only once."""
    layers = {
        path: module
        for path, module in nnx.iter_modules(model)
        if isinstance(module, nnx.BatchNorm)
    }
    if not layers:
        raise ValueError(f"{type(model).__name__} has no nnx.BatchNorm to update")
    return layers
