# SPDX-License-Identifier: Apache-2.0
"""The averaging kernel: a running mean of the iterates as they are applied.

Every averaging transformation rounds its updates (`round_updates`), lets
`optax.apply_updates` compute the iterate and passes it to `update_mean` with a weight.
Roundings:

- an update is rounded once, to the dtype in which the transformation returns it;
- `optax.apply_updates` rounds the iterate to the parameter's dtype;
- the mean is computed in at least float32 and rounded when it is stored.

A compiler would skip some of these roundings, and the average would differ from that of
the applied parameters. The functions of `numerics` prevent that.

The work on one leaf is a `jax.jit` of its own. Leaves of one shape then share a trace,
which saves a third of the compile time of many leaves, and each leaf runs as one
program if the step is not jitted.
"""

from functools import partial
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import DTypeLike

from asgd_optax._core.numerics import (
    map_real_and_imaginary,
    rounded,
    rounded_update,
    wide_dtype,
    widened,
    zeros_as,
)


class CompensatedMean(NamedTuple):
    """A mean with its rounding error (Kahan 1965), the state if `compensated=True`.

    After some millions of iterates, the increments of a uniform float32 mean of numbers
    near 1 are smaller than half a unit in the last place, and a plain mean loses them.
    A compensated mean carries them to the next step.

    Attributes:
      value: the rounded mean. Shapes of the parameters, dtype of the accumulator.
      residual: the part that `value` has not absorbed yet, at most about half a unit in
        its last place. Shapes and dtypes of `value`.
    """

    value: optax.Params
    residual: optax.Params


# A tree shaped like the parameters, or two of them.
Mean: TypeAlias = optax.Params | CompensatedMean


def init_mean(
    params: optax.Params, accumulator_dtype: DTypeLike | None, compensated: bool
) -> Mean:
    """Return the mean before any iterate: a copy of `params`, sharded as they are."""
    value = jax.tree.map(lambda p: _copied(jnp.asarray(p), accumulator_dtype), params)
    return CompensatedMean(value, zeros_as(value)) if compensated else value


def round_updates(updates: optax.Updates) -> optax.Updates:
    """Return the same updates, rounded to their dtypes even inside a fusion."""
    return jax.tree.map(lambda u: _round(jnp.asarray(u)), updates)


def update_mean(mean: Mean, iterates: optax.Params, weight: jax.Array) -> Mean:
    """Return `mean + weight * (iterates - mean)`; at weight 1 exactly `iterates`.

    A mean in host memory is copied to the device one leaf at a time, and back.

    Args:
      mean: the result of `init_mean` or of the last call.
      iterates: a pytree of arrays shaped like the mean.
      weight: a floating scalar in [0, 1].

    Returns:
      The new mean, in the structure of `iterates` and the dtypes of `mean`.
    """
    compensated = isinstance(mean, CompensatedMean)
    kernel = _compensated if compensated else _plain
    leaves, treedef = jax.tree.flatten(iterates)
    trees = tuple(mean) if compensated else (mean,)
    new: list[tuple[jax.Array, ...]] = []
    for iterate, *old in zip(leaves, *map(jax.tree.leaves, trees), strict=True):
        in_host_memory = all(map(_in_host_memory, old))
        if in_host_memory:
            # Wait for the previous leaf, or XLA may copy all leaves to the device at
            # once.
            old, _ = jax.lax.optimization_barrier((old, new[-1:]))
            old = jax.device_put(old, jax.memory.Space.Device)
        result = kernel(weight, iterate, *old)
        if in_host_memory:
            result = jax.device_put(result, jax.memory.Space.Host)
        new.append(result)
    columns = [
        jax.tree.unflatten(treedef, [leaf[i] for leaf in new])
        for i in range(len(trees))
    ]
    return CompensatedMean(*columns) if compensated else columns[0]


def mean_value(mean: Mean) -> optax.Params:
    """Return the mean as a tree shaped like the parameters."""
    return mean.value if isinstance(mean, CompensatedMean) else mean


def in_device_memory(x: jax.Array) -> jax.Array:
    """Copy `x` to the device if it is in host memory."""
    if not _in_host_memory(x):
        return x
    return jax.device_put(x, jax.memory.Space.Device)


def _in_host_memory(x: Any) -> bool:
    """Return whether `x` is in the host memory of an accelerator."""
    # Older jax does not distinguish memory spaces.
    return hasattr(jax, "memory") and jax.typeof(x).memory_space == (
        jax.memory.Space.Host
    )


@partial(jax.jit, static_argnums=1)
def _copied(p: jax.Array, accumulator_dtype: DTypeLike | None) -> jax.Array:
    # The explicit dtype drops weak types, which later steps would not keep.
    return jnp.array(p, dtype=_mean_dtype(p, accumulator_dtype), copy=True)


@jax.jit
def _round(u: jax.Array) -> jax.Array:
    return rounded_update(u, u.dtype)


@jax.jit
def _plain(weight: jax.Array, iterate: jax.Array, value: Any) -> tuple[jax.Array]:
    def f(x: jax.Array, m: jax.Array) -> jax.Array:
        w = weight.astype(x.dtype)
        return jax.lax.select(w == 1, x, m + w * (x - m))

    value = jnp.asarray(value)
    wide = wide_dtype(value, iterate)
    mean = map_real_and_imaginary(f, widened(iterate, wide), value.astype(wide))
    return (mean.astype(value.dtype),)


@jax.jit
def _compensated(
    weight: jax.Array, iterate: jax.Array, value: Any, residual: Any
) -> tuple[jax.Array, jax.Array]:
    def f(x: jax.Array, v: jax.Array, r: jax.Array) -> tuple[jax.Array, jax.Array]:
        w = weight.astype(x.dtype)
        # At weight 1 the recursion restarts from the iterate. Select its inputs, not
        # its outputs: for outputs XLA makes another pass over memory.
        restart = w == 1
        increment = w * ((x - v) - r) + r
        increment = jax.lax.select(restart, jnp.full_like(x, -0.0), increment)
        total = rounded(jax.lax.select(restart, x, v) + increment, stored_dtype)
        # Select again, with a condition that XLA does not recognize as the same: on
        # the CPU it would store an array that two results share.
        start = jax.lax.select((w >= 1) & (w <= 1), x, v)
        return total, (start - total) + increment

    value, residual = jnp.asarray(value), jnp.asarray(residual)
    stored_dtype = jnp.finfo(value.dtype).dtype
    wide = wide_dtype(value, iterate)
    total, rest = map_real_and_imaginary(
        f, widened(iterate, wide), value.astype(wide), residual.astype(wide)
    )
    return total.astype(value.dtype), rest.astype(value.dtype)


def _mean_dtype(param: Any, accumulator_dtype: DTypeLike | None) -> Any:
    """Return the dtype in which to keep the mean of a parameter."""
    if accumulator_dtype is None:
        return wide_dtype(param)
    precision = jnp.finfo(accumulator_dtype).dtype
    if not jnp.issubdtype(jnp.result_type(param), jnp.complexfloating):
        return precision
    # There is no half-precision complex type.
    return np.promote_types(precision, np.complex64)
