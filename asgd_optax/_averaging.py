# SPDX-License-Identifier: Apache-2.0
"""The averaging kernel: a running mean of the iterates as they are applied.

Every transformation that averages rounds its updates (`round_updates`), lets
`optax.apply_updates` make the iterate of them and hands it to `update_mean` with a
weight of its own. What is rounded, and when:

- an update once, to the dtype in which it leaves;
- the iterate by `optax.apply_updates`, to the parameter's dtype;
- the mean on storage; it moves in at least float32.

A compiler may skip any of these roundings inside a fusion: XLA keeps a narrow
intermediate in float32 (excess precision), LLVM contracts a product and a sum
into a fused multiply-add. The average would then be that of iterates nobody
applied, so `rounded` and `_apart` write them in operations that neither removes.

What is done to a leaf is a `jax.jit` of its own: leaves of one shape then share a
trace, which is a third of the time that many leaves took to compile, and run as one
program each where nothing else is jitted.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from asgd_optax import _checks


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

    value: Any
    residual: Any


def init_mean(params: Any, accumulator_dtype: Any, compensated: bool) -> Any:
    """The mean before any iterate: a real copy of `params`, sharded as they are."""

    def copy(p: Any) -> jax.Array:
        # The explicit dtype drops weak types, which no later step would keep.
        return jnp.array(p, dtype=_mean_dtype(p, accumulator_dtype), copy=True)

    value = jax.tree.map(copy, params)
    if not compensated:
        return value
    return CompensatedMean(value, zeros_as(value))


def zeros_as(tree: Any) -> Any:
    """Zeros in the shapes, dtypes and shardings of a tree of arrays."""
    # They depend on the arrays and so take their sharding; under jit those of
    # `zeros_like` depend on nothing and are replicated. No constant is part of it:
    # with explicit axes jax 0.12 gives a choice between two a type without sharding.
    return jax.tree.map(lambda v: ((v == v) & (v != v)).astype(v.dtype), tree)


def round_updates(updates: Any) -> Any:
    """`updates` as they are, rounded to their dtypes inside a fusion too.

    Args:
      updates: pytree of floating or complex arrays.
    """

    def leaf(u: Any) -> jax.Array:
        u = jnp.asarray(u)
        return rounded_update(u, u.dtype)

    return jax.tree.map(leaf, updates)


def update_mean(mean: Any, iterates: Any, weight: jax.Array) -> Any:
    """`mean + weight * (iterate - mean)`; at weight 1 the iterate, bit for bit.

    Args:
      mean: what `init_mean` or an earlier call returned.
      iterates: the new iterates, a pytree of arrays shaped as the mean's.
      weight: scalar in [0, 1], floating.

    Returns:
      The new mean, in the structure of `iterates` and the dtypes of `mean`.
    """
    if not isinstance(mean, CompensatedMean):
        return jax.tree.map(_in_turn(partial(_plain, weight)), iterates, mean)
    pairs = jax.tree.map(
        _in_turn(partial(_compensated, weight)), iterates, mean.value, mean.residual
    )
    return CompensatedMean(
        jax.tree.map(lambda _, pair: pair[0], iterates, pairs),
        jax.tree.map(lambda _, pair: pair[1], iterates, pairs),
    )


def mean_value(mean: Any) -> Any:
    """The mean as a tree shaped as the parameters."""
    return mean.value if isinstance(mean, CompensatedMean) else mean


def wide_dtype(*arrays: Any) -> Any:
    """The dtype in which to compute with `arrays`: theirs, float32 at least."""
    return jnp.result_type(*(jnp.result_type(a) for a in arrays), jnp.float32)


def on_real_parts(f: Callable[..., Any], *arrays: jax.Array) -> Any:
    """`f` of real arrays, applied to complex ones part by part.

    So torch does it (`view_as_real`), and so a NaN or an overflow in one part
    stays out of the other, which a complex product would spread it to.
    """
    if not any(jnp.iscomplexobj(a) for a in arrays):
        return f(*arrays)
    real = f(*(jnp.real(a) for a in arrays))
    imag = f(*(jnp.imag(a) for a in arrays))
    return jax.tree.map(jax.lax.complex, real, imag)


def _in_turn(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """`kernel`, of an iterate and its mean, where the mean may lie in host memory.

    Such a mean is brought to the device and put back. A leaf is not fetched before
    the one ahead of it has been updated: a compiler left to itself may fetch all.
    """
    ahead: Any = ()

    def leaf(iterate: jax.Array, *mean: Any) -> Any:
        nonlocal ahead
        if not all(map(_on_host, mean)):
            return kernel(iterate, *mean)
        mean, _ = jax.lax.optimization_barrier((mean, ahead))
        mean = jax.device_put(mean, jax.memory.Space.Device)
        ahead = jax.device_put(kernel(iterate, *mean), jax.memory.Space.Host)
        return ahead

    return leaf


def _on_host(x: Any) -> bool:
    """Whether `x` is kept in host memory, beside a device that has its own."""
    # Older jax tells no memory spaces apart.
    return hasattr(jax, "memory") and jax.typeof(x).memory_space == (
        jax.memory.Space.Host
    )


@jax.jit
def _plain(weight: jax.Array, iterate: jax.Array, value: Any) -> jax.Array:
    def f(x: jax.Array, m: jax.Array) -> jax.Array:
        w = weight.astype(x.dtype)
        return jnp.where(w == 1, x, m + w * (x - m))

    value = jnp.asarray(value)
    wide = wide_dtype(value, iterate)
    mean = on_real_parts(f, _widened(iterate, wide), value.astype(wide))
    return mean.astype(value.dtype)


@jax.jit
def _compensated(
    weight: jax.Array, iterate: jax.Array, value: Any, residual: Any
) -> tuple[jax.Array, jax.Array]:
    def f(x: jax.Array, v: jax.Array, r: jax.Array) -> tuple[jax.Array, jax.Array]:
        w = weight.astype(x.dtype)
        # Where the weight is 1 the recursion starts anew from the iterate. Its
        # inputs are selected, not its outputs: on outputs XLA spends another pass.
        increment = jnp.where(w == 1, -0.0, w * ((x - v) - r) + r)
        total = rounded(jnp.where(w == 1, x, v) + increment, stored_dtype)
        # Selected once more, in words that XLA does not take for the same: on the CPU
        # it would keep an array of what two results share.
        start = jnp.where((w >= 1) & (w <= 1), x, v)
        return total, (start - total) + increment

    value, residual = jnp.asarray(value), jnp.asarray(residual)
    stored_dtype = jnp.finfo(value.dtype).dtype
    wide = wide_dtype(value, iterate)
    total, rest = on_real_parts(
        f, _widened(iterate, wide), value.astype(wide), residual.astype(wide)
    )
    return total.astype(value.dtype), rest.astype(value.dtype)


def _widened(iterate: jax.Array, wide: Any) -> jax.Array:
    """`iterate` in a dtype as wide or wider, with the rounding to its own."""
    return rounded(iterate.astype(wide), iterate.dtype)


@partial(jax.jit, static_argnums=1)
def rounded_update(u: jax.Array, dtype: Any) -> jax.Array:
    """`u` in a narrower or equal dtype, where it is not to be rounded once more."""
    if u.dtype == dtype == wide_dtype(u):
        return on_real_parts(_apart, u)
    return rounded(u.astype(wide_dtype(u)), dtype).astype(dtype)


def _apart(x: jax.Array) -> jax.Array:
    """`x`, which a compiler does not contract with what is added to it."""
    # The product that made `x` is contracted with this sum, if at all, and so
    # rounded before the next. Nothing but zeros is added to what is not zero, which
    # a compiler does not see. (On the CPU a comparison takes subnormals for zeros,
    # and a sum makes zeros of them.)
    zero = x == 0
    return jnp.where(zero, x, x + zero.astype(x.dtype))


def rounded(x: jax.Array, dtype: Any) -> jax.Array:
    """`x`, in its own dtype, rounded to the precision of a narrower or equal one.

    Args:
      x: array of any floating or complex dtype.
      dtype: floating or complex dtype of the precision wanted.
    """
    narrow, wide = jnp.finfo(dtype), jnp.finfo(x.dtype)
    if narrow.dtype == wide.dtype:
        return x

    def f(x: jax.Array) -> jax.Array:
        result = jax.lax.reduce_precision(x, narrow.nexp, narrow.nmant)
        if narrow.nexp == wide.nexp:
            return result
        # `reduce_precision` flushes what is subnormal in the narrow dtype. In the
        # binade of `shift`, `x`'s own dtype has just its spacing.
        shift = 1.5 * 2.0 ** (narrow.minexp - narrow.nmant + wide.nmant)
        subnormal = (x + shift) - shift
        tiny = jnp.abs(x) < 2.0**narrow.minexp
        # A zero is left to `reduce_precision`, which keeps its sign.
        return jnp.where(tiny & (subnormal != 0), subnormal, result)

    return on_real_parts(f, x)


def _mean_dtype(param: Any, accumulator_dtype: Any) -> Any:
    """The mean's dtype: the parameter's precision, float32 at least, or as told."""
    if accumulator_dtype is None:
        return wide_dtype(param)
    precision = jnp.finfo(accumulator_dtype).dtype
    if not jnp.issubdtype(jnp.result_type(param), jnp.complexfloating):
        return precision
    # There is no complex type of half precision.
    return jnp.promote_types(precision, jnp.complex64)


def check_accumulator_dtype(accumulator_dtype: Any) -> None:
    """Raises `ValueError` unless it is None or names a floating dtype."""
    if accumulator_dtype is None:
        return
    try:
        # A type that `optax.inject_hyperparams` took for a schedule is an array here.
        floating = (
            not isinstance(accumulator_dtype, jax.Array)
            and jnp.issubdtype(jnp.dtype(accumulator_dtype), jnp.inexact)
            and not _checks.is_narrow(jnp.dtype(accumulator_dtype), bits=16)
        )
    except TypeError:
        floating = False
    if not floating:
        raise ValueError(
            "accumulator_dtype must name a floating dtype of 16 bits or more, such as"
            " 'float32' (a string under optax.inject_hyperparams); got"
            f" {accumulator_dtype!r}"
        )
