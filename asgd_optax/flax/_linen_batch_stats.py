# SPDX-License-Identifier: Apache-2.0
"""Batch statistics of the BatchNorms in a Flax Linen module."""

import functools
import itertools
import operator
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import core, linen

_passes = itertools.count()


def linen_batch_stats(
    module: linen.Module, variables: Mapping[str, Any], call: Callable[[Any, Any], Any]
) -> tuple[Callable[[Any], Any], Callable[[Any], Mapping[str, Any]]]:
    """Return a function that computes statistics, and one that makes new variables.

    Raises:
      ValueError: From the first function, if `call` reaches no BatchNorm.
    """
    paths: set[tuple[str, ...]] = set()
    inside = False

    def intercept(next_call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        nonlocal inside
        layer = context.module
        is_call = context.method_name == "__call__"
        if inside or not (is_call and isinstance(layer, linen.BatchNorm)):
            return next_call(*args, **kwargs)
        # Without earlier statistics and with momentum 0, the new statistics are those
        # of the batch. The layer itself is bound, and so its fields are frozen.
        free = layer.copy(momentum=0.0, use_running_average=False, name=None)
        inputs = {k: v for k, v in kwargs.items() if k != "use_running_average"}
        params = {k: v for k, v in layer.variables.items() if k != "batch_stats"}
        inside = True
        try:
            result, new = free.apply(params, *args[:1], **inputs, mutable="batch_stats")
        finally:
            inside = False
        for name, value in new["batch_stats"].items():
            layer.put_variable("batch_stats", name, value)
        paths.add(layer.path)
        return result

    # A `linen.jit` in the module caches its traces by the module, the arguments and the
    # mutable collections, so it would ignore this interceptor or use an earlier one.
    # Flax cannot clear that cache, but a mutable collection with a new name misses it.
    unseen = f"asgd_optax.flax pass {next(_passes)}"
    mutable = {*variables, "batch_stats", unseen} - {"params"}
    run = linen.apply(call, module, mutable=sorted(mutable))

    def statistics(batch: Any) -> Any:
        with linen.intercept_methods(intercept):
            _, changed = run(variables, batch)
        if not paths:
            raise ValueError(
                f"{type(module).__name__} has no linen.BatchNorm to update, or `call`"
                " does not reach it"
            )
        return {path: _mean_and_var(changed["batch_stats"], path) for path in paths}

    def replaced(averages: Any) -> Mapping[str, Any]:
        # `unfreeze` copies the dictionaries.
        stats = core.unfreeze(variables.get("batch_stats", {}))
        for path, average in averages.items():
            layer = stats
            for key in path:
                layer = layer.setdefault(key, {})
            for name, value in average.items():
                layer[name] = value.astype(jnp.result_type(layer.get(name, value)))
        new = {**variables, "batch_stats": stats}
        return core.freeze(new) if isinstance(variables, core.FrozenDict) else new

    return statistics, replaced


def _mean_and_var(stats: Any, path: tuple[str, ...]) -> dict[str, jax.Array]:
    layer = functools.reduce(operator.getitem, path, stats)
    return {name: layer[name] for name in ("mean", "var")}
