# SPDX-License-Identifier: Apache-2.0
"""The averaging kernel: a running mean of the iterates as they are applied.

Every transformation that averages rounds its updates (`round_updates`), lets
`optax.apply_updates` make the iterate of them and hands it to `update_mean` with a
weight of its own. What is rounded, and when:

- an update once, to the dtype in which it leaves;
- the iterate by `optax.apply_updates`, to the parameter's dtype;
- the mean on storage; it moves in at least float32.

A compiler would skip some of these roundings, and the average be that of iterates
nobody applied: `_numerics` has what keeps them.

What is done to a leaf is a `jax.jit` of its own: leaves of one shape then share a
trace, which is a third of the time that many leaves took to compile, and run as one
program each where nothing else is jitted.
"""

from functools import partial
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
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
    """A mean kept as a compensated sum (Kahan 1965); the state where `compensated`.

    At weight 1/n the increments of a plain float32 mean of numbers near 1 fall
    below half a unit in its last place after some millions of iterates, and
    what falls below is lost. Here it is carried to the next step.

    Attributes:
      value: the mean, rounded: parameters' shapes, accumulator's dtype.
      residual: what `value` has not taken in yet, at most about half a unit in
        its last place: parameters' shapes, accumulator's dtype.
    """

    value: optax.Params
    residual: optax.Params


# A tree shaped as the parameters, or two.
Mean: TypeAlias = optax.Params | CompensatedMean


def init_mean(
    params: optax.Params, accumulator_dtype: DTypeLike | None, compensated: bool
) -> Mean:
    """The mean before any iterate: a real copy of `params`, sharded as they are."""
    value = jax.tree.map(lambda p: _copied(jnp.asarray(p), accumulator_dtype), params)
    return CompensatedMean(value, zeros_as(value)) if compensated else value


def round_updates(updates: optax.Updates) -> optax.Updates:
    """`updates` as they are, rounded to their dtypes inside a fusion too.

    Args:
      updates: pytree of floating or complex arrays.
    """
    return jax.tree.map(lambda u: _round(jnp.asarray(u)), updates)


def update_mean(mean: Mean, iterates: optax.Params, weight: jax.Array) -> Mean:
    """`mean + weight * (iterate - mean)`; at weight 1 the iterate, bit for bit.

    A mean that lies in host memory is brought to the device, a leaf at a time, and
    put back.

    Args:
      mean: what `init_mean` or an earlier call returned.
      iterates: the new iterates, a pytree of arrays shaped as the mean's.
      weight: scalar in [0, 1], floating.

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
            # Not before the leaf ahead is done with: a compiler left to itself may
            # fetch all of them.
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
    """The mean as a tree shaped as the parameters."""
    return mean.value if isinstance(mean, CompensatedMean) else mean


def mean_trees(name: str, mean: Mean) -> dict[str, optax.Params]:
    """The trees that make a mean, by their names where the mean has this one."""
    if not isinstance(mean, CompensatedMean):
        return {name: mean}
    return {f"{name}.{field}": tree for field, tree in mean._asdict().items()}


def in_device_memory(x: jax.Array) -> jax.Array:
    """`x`, brought to its device where it lies in host memory."""
    if not _in_host_memory(x):
        return x
    return jax.device_put(x, jax.memory.Space.Device)


def _in_host_memory(x: Any) -> bool:
    """Whether `x` is kept in host memory, beside a device that has its own."""
    # Older jax tells no memory spaces apart.
    return hasattr(jax, "memory") and jax.typeof(x).memory_space == (
        jax.memory.Space.Host
    )


@partial(jax.jit, static_argnums=1)
def _copied(p: jax.Array, accumulator_dtype: DTypeLike | None) -> jax.Array:
    # The explicit dtype drops weak types, which no later step would keep.
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
        # Where the weight is 1 the recursion starts anew from the iterate. Its
        # inputs are selected, not its outputs: on outputs XLA spends another pass.
        restart = w == 1
        increment = w * ((x - v) - r) + r
        increment = jax.lax.select(restart, jnp.full_like(x, -0.0), increment)
        total = rounded(jax.lax.select(restart, x, v) + increment, stored_dtype)
        # Selected once more, in words that XLA does not take for the same: on the CPU
        # it would keep an array of what two results share.
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
    """The mean's dtype: the parameter's precision, float32 at least, or as told."""
    if accumulator_dtype is None:
        return wide_dtype(param)
    precision = jnp.finfo(accumulator_dtype).dtype
    if not jnp.issubdtype(jnp.result_type(param), jnp.complexfloating):
        return precision
    # There is no complex type of half precision.
    return jnp.promote_types(precision, jnp.complex64)
