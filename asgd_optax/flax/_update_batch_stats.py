# SPDX-License-Identifier: Apache-2.0
"""BatchNorm statistics recomputed over a data set."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, overload

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx

from asgd_optax._core import averaging
from asgd_optax.flax._linen_batch_stats import linen_batch_stats
from asgd_optax.flax._nnx_batch_stats import nnx_batch_stats

_update_mean = jax.jit(averaging.update_mean)


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
    r"""Recompute BatchNorm statistics over a data set, as torch's `update_bn` does.

    The averaged parameters produce different activations, so the stored running
    statistics are wrong for them. Each BatchNorm gets the means over `batches`,

    .. math::

        \mathrm{mean} = \frac{\sum_b n_b\,\mathrm{mean}_b}{\sum_b n_b}, \quad
        \mathrm{var} = \frac{\sum_b n_b\,\mathrm{var}_b}{\sum_b n_b}

    with n_b the size of batch b, and mean_b and var_b the statistics that normalise it.
    The momentum of the layer and its earlier statistics do not matter.

    `torch.optim.swa_utils.update_bn` differs in three ways. It weights all batches
    equally. Its var_b is the unbiased variance, n / (n - 1) times that of Flax for n
    numbers per channel. It runs the whole model in training mode, including dropout.
    Here only BatchNorm uses batch statistics, and all other layers keep their mode.

    The `BatchStat` variables of all BatchNorms of an NNX model are updated in place,
    after the last batch. An error leaves the model unchanged. Modes, momenta, the
    counts of its `Rngs` and other variables never change.

    Args:
      model: an `nnx.Module` or a `linen.Module` with a BatchNorm in it.
      batches: any iterable, iterated once. The loop is not jitted; for speed, jit
        `call`.
      variables: for Linen only: the variables of `model`, which are not changed. The
        "batch_stats" collection may be missing.
      call: `call(model, batch)` runs the model on a batch; its result is ignored. By
        default `model(batch)`, or `model(batch[0])` for a tuple or list. With NNX it
        gets a copy of the model with all BatchNorms in training mode, and must not set
        `use_running_average`. With Linen it gets a bound module, and
        `use_running_average` is overridden. May be an `nnx.jit` or a `linen.jit`.
      size: `size(batch)` is the weight n_b, positive. By default the length of the
        first array's leading axis.

    Returns:
      None for NNX. For Linen the variables with a new "batch_stats" collection, in the
      same shapes and dtypes. Entries of other layers, and of BatchNorms that `call`
      does not reach, are unchanged.

    Raises:
      ValueError: If there are no batches; if a size is not positive, or a batch has no
        array with a leading axis and `size` is missing; if the model has no BatchNorm;
        for NNX, if `call` does not reach a BatchNorm or does not run it in training
        mode.
      TypeError: If `model` is not a Flax module, or `variables` are given for NNX or
        missing for Linen.

    If a model uses a BatchNorm several times in one call, its last use counts.

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
        statistics, replaced = linen_batch_stats(model, variables, call)
        return replaced(_mean_over(batches, statistics, size))
    if not isinstance(model, nnx.Module):
        raise TypeError(f"model must be an nnx.Module or a linen.Module; got {model!r}")
    if variables is not None:
        raise TypeError("an nnx.Module holds its own variables: do not pass any")
    statistics, write = nnx_batch_stats(model, call)
    write(_mean_over(batches, statistics, size))
    return None


def _call(model: Any, batch: Any) -> Any:
    return model(batch[0] if isinstance(batch, tuple | list) else batch)


def _size(batch: Any) -> float:
    for leaf in jax.tree.leaves(batch):
        if np.ndim(leaf):
            return np.shape(leaf)[0]
    raise ValueError("a batch has no array with a leading axis: pass `size`")


def _mean_over(
    batches: Iterable[Any], statistics: Callable[[Any], Any], size: Callable[[Any], Any]
) -> Any:
    """Return the mean of `statistics(batch)`, weighted by `size(batch)`."""
    mean: Any = None
    total = 0.0
    for batch in batches:
        weight = float(size(batch))
        if not weight > 0:
            raise ValueError(f"the size of a batch must be positive; got {weight:g}")
        total += weight
        new = statistics(batch)
        if mean is None:
            mean = averaging.init_mean(new, None, compensated=False)
        else:
            fraction = jnp.asarray(weight / total, dtype=jnp.result_type(float))
            mean = _update_mean(mean, new, fraction)
    if mean is None:
        raise ValueError("batches is empty: is it an iterator that was used before?")
    return mean
