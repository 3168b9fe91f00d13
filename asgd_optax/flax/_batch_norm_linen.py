# SPDX-License-Identifier: Apache-2.0
"""What each BatchNorm of a Flax Linen module normalises a batch with."""

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import core, linen

from asgd_optax.flax._batch_norm_nnx import Statistics

_passes = itertools.count()


def linen_batch_norms(
    module: linen.Module,
    variables: Mapping[str, Any],
    call: Callable[[Any, Any], Any],
) -> tuple[Callable[[Any], Statistics], Callable[[Statistics], Mapping[str, Any]]]:
    """A function that tells a batch's statistics, and one that puts them in variables.

    Raises:
      ValueError: from the first function, where `call` reaches no BatchNorm.
    """
    paths: set[tuple[str, ...]] = set()
    inside = False

    def intercept(
        next_call: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        context: linen.module.InterceptorContext,
    ) -> Any:
        nonlocal inside
        layer = context.module
        own = isinstance(layer, linen.BatchNorm) and context.method_name == "__call__"
        if not own or inside:
            return next_call(*args, **kwargs)
        # Without statistics from before and with momentum 0 the new ones are those of
        # the batch. The layer itself cannot be told: it is bound, and so is frozen.
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

    # A `linen.jit` in the module keeps what it traced, by the module, its arguments and
    # the collections that are mutable: it would go on without this interceptor, or
    # with an earlier one. Flax has no way to tell it to forget, so each pass may also
    # change a collection that does not exist, which nobody asked for before.
    unseen = f"asgd_optax.flax pass {next(_passes)}"
    mutable = {*variables, "batch_stats", unseen} - {"params"}
    run = linen.apply(call, module, mutable=sorted(mutable))

    def statistics(batch: Any) -> Statistics:
        with linen.intercept_methods(intercept):
            _, changed = run(variables, batch)
        if not paths:
            raise ValueError(
                f"{type(module).__name__} has no linen.BatchNorm to update, or `call`"
                " does not reach it"
            )
        return {path: _pair(changed["batch_stats"], path) for path in sorted(paths)}

    def finish(average: Statistics) -> Mapping[str, Any]:
        # `unfreeze` copies all the dictionaries.
        stats = core.unfreeze(variables.get("batch_stats", {}))
        for path, pair in average.items():
            layer = stats
            for key in path:
                layer = layer.setdefault(key, {})
            for name, value in zip(("mean", "var"), pair, strict=True):
                layer[name] = value.astype(jnp.result_type(layer.get(name, value)))
        new = {**variables, "batch_stats": stats}
        return core.freeze(new) if isinstance(variables, core.FrozenDict) else new

    return statistics, finish


def _pair(stats: Any, path: tuple[str, ...]) -> tuple[jax.Array, jax.Array]:
    for key in path:
        stats = stats[key]
    return stats["mean"], stats["var"]
