# SPDX-License-Identifier: Apache-2.0
"""Averaged weights in Flax: a model of them, and its BatchNorm's statistics.

Not imported by `asgd_optax`, which does without Flax.
"""

import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar, overload

import jax
import jax.numpy as jnp
import numpy as np
from flax import core, linen, nnx

from asgd_optax import _averaging, _checks
from asgd_optax._accessor import averaged_params

# The statistics of each BatchNorm by its path: its mean and its variance.
_Statistics = dict[tuple[Any, ...], tuple[jax.Array, jax.Array]]

_M = TypeVar("_M", bound=nnx.Module)

_update_mean = jax.jit(_averaging.update_mean)
_passes = itertools.count()


def averaged_model(model: _M, optimizer: Any, *, wrt: Any = None) -> _M:
    """A new model with the averaged parameters; `model` stays as it is, to train on.

    Everything in it is a copy, also what the two would have in common (BatchNorm's
    statistics, the state of `Rngs`): either may be donated, changed or deleted without
    the other. Before averaging has begun its parameters are those of `model`.

    Batch normalisation's running statistics are those of the iterates: see
    `update_batch_stats`.

    Args:
      model: an `nnx.Module`.
      optimizer: the `nnx.Optimizer` that trains it, or an optimizer's state with an
        average in it, wherever `averaged_params` finds it.
      wrt: a filter for the variables that are optimized. By default the optimizer's
        own; `nnx.Param` for a bare state.

    Returns:
      A module of the type of `model`, its arrays in the shapes and dtypes they have
      there. A parameter that nothing averages is a copy of that of `model`.

    Raises:
      TypeError: a `model` that is no `nnx.Module`.
      ValueError: what `averaged_params` refuses.

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
    state, own = optimizer, nnx.Param
    if isinstance(optimizer, nnx.Optimizer):
        state, own = optimizer.opt_state, optimizer.wrt
    graph, optimized, rest = nnx.split(model, own if wrt is None else wrt, ...)
    average = averaged_params(state, optimized)
    return nnx.merge(graph, *jax.tree.map(jnp.copy, (average, rest)))


@overload
def update_batch_stats(
    model: nnx.Module,
    batches: Iterable[Any],
    variables: None = None,
    *,
    call: Callable[[Any, Any], Any] | None = None,
    size: Callable[[Any], float] | None = None,
) -> None: ...


@overload
def update_batch_stats(
    model: linen.Module,
    batches: Iterable[Any],
    variables: Mapping[str, Any],
    *,
    call: Callable[[Any, Any], Any] | None = None,
    size: Callable[[Any], float] | None = None,
) -> Mapping[str, Any]: ...


def update_batch_stats(
    model: Any,
    batches: Iterable[Any],
    variables: Mapping[str, Any] | None = None,
    *,
    call: Callable[[Any, Any], Any] | None = None,
    size: Callable[[Any], float] | None = None,
) -> Mapping[str, Any] | None:
    """Estimates the statistics of BatchNorm anew, over a data set.

    Averaged weights make other activations than the iterates that the running
    statistics followed. Here each BatchNorm gets the means over `batches`,

        mean = sum_b n_b mean_b / sum_b n_b,    var = sum_b n_b var_b / sum_b n_b

    with n_b the size of the batch b, and mean_b and var_b what the layer normalises
    it with. Neither its momentum nor its statistics from before play a part.

    What `torch.optim.swa_utils.update_bn` does, with three differences: torch weighs
    all batches alike; its var_b is the unbiased one, n / (n - 1) times Flax's for n
    numbers a channel; it turns dropout on. Here BatchNorm alone is made to use the
    batch's statistics, and all else runs in the mode in which it is found.

    A model of Flax NNX is updated in place: the `BatchStat`s of its BatchNorms, all
    at once when the last batch has been seen. An error leaves the model as it was. The
    modes and momenta, the counts of its `Rngs` and its other variables never change.

    Args:
      model: an `nnx.Module` or a `linen.Module`, with a BatchNorm somewhere.
      batches: any iterable, gone through once. Not jitted: for speed jit `call`.
      variables: Linen only: the variables of `model`, not changed. A missing
        "batch_stats" collection is made.
      call: `call(model, batch)` runs the model on a batch; its result is ignored. By
        default `model(batch)`, or `model(batch[0])` of a tuple or list. NNX hands it
        a copy of the model with all BatchNorms in training mode, and it must not
        tell one to use its running average; with Linen the model is bound, and a
        mode told to a BatchNorm is overruled. May be an `nnx.jit` or a `linen.jit`.
      size: `size(batch)` is the weight n_b, positive. By default the length of the
        first array's leading axis.

    Returns:
      None with NNX. With Linen the variables with a new "batch_stats" collection,
      shapes and dtypes as before; what is no BatchNorm's is in it unchanged, as is a
      BatchNorm that `call` does not reach.

    Raises:
      ValueError: no batches; a size that is not positive, or that no array tells; a
        model without a BatchNorm; with NNX, a BatchNorm that `call` does not reach,
        or not in training mode.
      TypeError: a model that is neither; `variables` with NNX, or none with Linen.

    A BatchNorm that a model uses several times in one call keeps its last use.

    Examples:
      >>> import jax.numpy as jnp
      >>> from flax import linen, nnx
      >>> from asgd_optax.flax import update_batch_stats
      >>> batches = [jnp.array([[0.0], [0.0], [3.0]]), jnp.array([[5.0]])]
      >>> model = nnx.BatchNorm(1, rngs=nnx.Rngs(0))
      >>> update_batch_stats(model, batches)
      >>> print(model.mean[...], model.var[...])
      [2.] [1.5]
      >>> module = linen.BatchNorm(use_running_average=True)
      >>> variables = {"params": {"scale": jnp.ones(1), "bias": jnp.zeros(1)}}
      >>> variables = update_batch_stats(module, batches, variables)
      >>> print(variables["batch_stats"]["mean"], variables["batch_stats"]["var"])
      [2.] [1.5]
    """
    call, size = call or _call, size or _size
    if isinstance(model, linen.Module):
        if not isinstance(variables, Mapping):
            raise TypeError(
                "a Linen module needs its variables, a mapping of collections:"
                " update_batch_stats(module, batches, variables)"
            )
        return _update_linen(model, batches, variables, call, size)
    if not isinstance(model, nnx.Module):
        raise TypeError(f"model must be an nnx.Module or a linen.Module, not {model!r}")
    if variables is not None:
        raise TypeError("an nnx.Module keeps its variables itself: pass none")
    _update_nnx(model, batches, call, size)
    return None


def _call(model: Any, batch: Any) -> Any:
    return model(batch[0] if isinstance(batch, tuple | list) else batch)


def _size(batch: Any) -> float:
    for leaf in jax.tree.leaves(batch):
        if np.ndim(leaf):
            return np.shape(leaf)[0]
    raise ValueError("a batch without an array: pass `size` to say how much it weighs")


def _average(
    batches: Iterable[Any],
    statistics: Callable[[Any], _Statistics],
    size: Callable[[Any], float],
) -> _Statistics:
    """The mean over the batches of what `statistics` tells, weighted by size."""
    mean, total = None, 0.0
    for batch in batches:
        weight = float(size(batch))
        if not weight > 0:
            raise ValueError(f"the size of a batch must be positive, not {weight:g}")
        total += weight
        new = statistics(batch)
        if mean is None:
            mean = _averaging.init_mean(new, None, compensated=False)
        else:
            share = jnp.asarray(weight / total, dtype=jnp.result_type(float))
            mean = _update_mean(mean, new, share)
    if mean is None:
        raise ValueError("no batches: an iterator that is exhausted already?")
    return mean


def _update_nnx(
    model: nnx.Module,
    batches: Iterable[Any],
    call: Callable[[Any, Any], Any],
    size: Callable[[Any], float],
) -> None:
    found = _batch_norms(model)
    # A copy, so that neither an error nor the calls leave a trace in the model.
    copy = nnx.clone(model)
    layers = _batch_norms(copy)
    for layer in layers.values():
        layer.use_running_average = False
        # The running statistics after a batch are then that batch's own.
        layer.momentum = 0.0

    def statistics(batch: Any) -> _Statistics:
        for layer in layers.values():
            # Momentum 0 would keep a NaN. No batch has a negative variance: where
            # this one is still there afterwards, the layer has not seen the batch.
            layer.mean[...] = jnp.zeros_like(layer.mean[...])
            layer.var[...] = jnp.full_like(layer.var[...], -1)
        call(copy, batch)
        new = {path: (la.mean[...], la.var[...]) for path, la in layers.items()}
        for path, (_, var) in new.items():
            if not _checks.is_traced(var) and np.any(np.asarray(var) == -1):
                raise ValueError(
                    f"the BatchNorm {'.'.join(map(str, path)) or 'given'} was not used"
                    " in training mode: pass a `call` that reaches it and does not"
                    " tell it to use its running average"
                )
        return new

    for path, (mean, var) in _average(batches, statistics, size).items():
        layer = found[path]
        layer.mean[...] = mean.astype(layer.mean[...].dtype)
        layer.var[...] = var.astype(layer.var[...].dtype)


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


def _update_linen(
    module: linen.Module,
    batches: Iterable[Any],
    variables: Mapping[str, Any],
    call: Callable[[Any, Any], Any],
    size: Callable[[Any], float],
) -> Mapping[str, Any]:
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

    # `linen.jit` would go on using what it traced without the interceptor, or under
    # an earlier one: the name of a collection that nobody has makes it trace anew.
    unique = f"asgd_optax.flax pass {next(_passes)}"
    mutable = {*variables, "batch_stats", unique} - {"params"}
    run = linen.apply(call, module, mutable=sorted(mutable))

    def statistics(batch: Any) -> _Statistics:
        with linen.intercept_methods(intercept):
            _, changed = run(variables, batch)
        if not paths:
            raise ValueError(
                f"{type(module).__name__} has no linen.BatchNorm to update, or `call`"
                " does not reach it"
            )
        return {path: _pair(changed["batch_stats"], path) for path in sorted(paths)}

    average = _average(batches, statistics, size)
    stats = core.unfreeze(variables.get("batch_stats", {}))  # a copy of all the dicts
    for path, pair in average.items():
        layer = stats
        for key in path:
            layer = layer.setdefault(key, {})
        for name, value in zip(("mean", "var"), pair, strict=True):
            layer[name] = value.astype(jnp.result_type(layer.get(name, value)))
    new = {**variables, "batch_stats": stats}
    return core.freeze(new) if isinstance(variables, core.FrozenDict) else new


def _pair(stats: Any, path: tuple[str, ...]) -> tuple[jax.Array, jax.Array]:
    for key in path:
        stats = stats[key]
    return stats["mean"], stats["var"]
