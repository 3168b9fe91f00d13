# SPDX-License-Identifier: Apache-2.0
"""Averaged weights in Flax: a model of them, and its BatchNorm's statistics.

Not imported by `asgd_optax`, which does without Flax.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar, overload

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx

from asgd_optax._accessors.averaged_params import averaged_params
from asgd_optax._core import averaging
from asgd_optax.flax._batch_norm_linen import linen_batch_norms
from asgd_optax.flax._batch_norm_nnx import Statistics, nnx_batch_norms

_M = TypeVar("_M", bound=nnx.Module)

_update_mean = jax.jit(averaging.update_mean)


def averaged_model(model: _M, optimizer: Any, *, wrt: Any = None) -> _M:
    """A new model with the averaged parameters; `model` stays as it is, to train on.

    Every array in it is a copy, also those that the two would have in common
    (BatchNorm's statistics, the state of `Rngs`): either may be donated, changed or
    deleted without the other. An average that lies in host memory is brought to the
    device. Before averaging has begun the parameters are those of `model`.

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
    if isinstance(optimizer, nnx.Optimizer):
        wrt = optimizer.wrt if wrt is None else wrt
        optimizer = optimizer.opt_state
    wrt = nnx.Param if wrt is None else wrt
    graph, params, *others = nnx.split(model, wrt, ...)
    try:
        average = averaged_params(optimizer, params)
    except ValueError as error:
        error.add_note(f"params are the variables of the model that are {wrt} (`wrt`)")
        raise
    return nnx.merge(graph, *jax.tree.map(_copied, (average, *others)))


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
    r"""Estimates the statistics of BatchNorm anew, over a data set.

    Averaged weights make other activations than the iterates that the running
    statistics followed. Here each BatchNorm gets the means over `batches`,

    .. math::

        \mathrm{mean} = \frac{\sum_b n_b\,\mathrm{mean}_b}{\sum_b n_b}, \quad
        \mathrm{var} = \frac{\sum_b n_b\,\mathrm{var}_b}{\sum_b n_b}

    with n_b the size of the batch b, and mean_b and var_b what the layer normalises
    it with. Neither its momentum nor its statistics from before play a part.

    What `torch.optim.swa_utils.update_bn` does, with three differences: torch weighs
    all batches alike; its var_b is the unbiased one, n / (n - 1) times Flax's for n
    numbers a channel; it turns dropout on. Here BatchNorm alone is made to use the
    batch's statistics, and all else runs in the mode in which it is found.

    A model of Flax NNX is updated in place: the `BatchStat` of its BatchNorms, all
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
        statistics, finish = linen_batch_norms(model, variables, call)
        return finish(_average(batches, statistics, size))
    if not isinstance(model, nnx.Module):
        raise TypeError(f"model must be an nnx.Module or a linen.Module, not {model!r}")
    if variables is not None:
        raise TypeError("an nnx.Module keeps its variables itself: pass none")
    statistics, write = nnx_batch_norms(model, call)
    write(_average(batches, statistics, size))
    return None


def _copied(x: Any) -> Any:
    """A copy of an array, of JAX's or NumPy's; what is none as it is."""
    if isinstance(x, jax.Array):
        return jnp.copy(averaging.in_device_memory(x))
    return x.copy() if isinstance(x, np.ndarray) else x


def _call(model: Any, batch: Any) -> Any:
    return model(batch[0] if isinstance(batch, tuple | list) else batch)


def _size(batch: Any) -> float:
    for leaf in jax.tree.leaves(batch):
        if np.ndim(leaf):
            return np.shape(leaf)[0]
    raise ValueError("a batch without an array: pass `size` to say how much it weighs")


def _average(
    batches: Iterable[Any],
    statistics: Callable[[Any], Statistics],
    size: Callable[[Any], float],
) -> Statistics:
    """The mean over the batches of what `statistics` tells, weighted by size."""
    mean: Any = None
    total = 0.0
    for batch in batches:
        weight = float(size(batch))
        if not weight > 0:
            raise ValueError(f"the size of a batch must be positive, not {weight:g}")
        total += weight
        new = statistics(batch)
        if mean is None:
            mean = averaging.init_mean(new, None, compensated=False)
        else:
            share = jnp.asarray(weight / total, dtype=jnp.result_type(float))
            mean = _update_mean(mean, new, share)
    if mean is None:
        raise ValueError("no batches: an iterator that is exhausted already?")
    return mean
