# SPDX-License-Identifier: Apache-2.0
"""The averaging kernel: the iterate as it is applied, and its running mean.

Every transformation that averages is `round_updates`, `applied_iterates` and
`update_mean`, fed a weight of its own. What is rounded, and when:

- an update is rounded once, to the dtype in which it leaves;
- the iterate is the one `optax.apply_updates` makes of that update, its rounding
  to the parameter's dtype included;
- the mean moves in at least float32 and is rounded to its own dtype on storage.

A compiler may skip any of these roundings inside a fusion: XLA keeps a narrow
intermediate in float32 (excess precision), LLVM contracts a product and a sum
into a fused multiply-add. The average would then be that of iterates nobody
applied, so `_as_stored` writes the roundings in operations that neither removes.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


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
    # Zeros that depend on the value take its sharding; under jit those of
    # `zeros_like` depend on nothing and are replicated.
    zero = jax.tree.map(lambda v: jnp.where(v == v, 0, 0).astype(v.dtype), value)
    return CompensatedMean(value, zero)


def round_updates(updates: Any, dtypes_of: Any, weight: jax.Array) -> Any:
    """`updates` rounded to the dtypes of the tree `dtypes_of`, fusion or not."""

    def leaf(u: Any, like: Any) -> jax.Array:
        return _as_stored(jnp.asarray(u), jnp.result_type(like), weight)

    return jax.tree.map(leaf, updates, dtypes_of)


def applied_iterates(params: Any, updates: Any, weight: jax.Array) -> Any:
    """What `optax.apply_updates(params, updates)` makes of rounded updates."""

    def leaf(p: Any, u: jax.Array) -> jax.Array:
        p = jnp.asarray(p)
        iterate = p.astype(wide_dtype(p, u)) + u
        if iterate.dtype == p.dtype:
            return iterate
        return _as_stored(iterate, p.dtype, weight)

    return jax.tree.map(leaf, params, updates)


def update_mean(mean: Any, iterates: Any, weight: jax.Array) -> Any:
    """`mean + weight * (iterate - mean)`; at weight 1 the iterate, bit for bit.

    Args:
      mean: what `init_mean` or an earlier call returned.
      iterates: the new iterates, a pytree of arrays shaped as the mean's.
      weight: scalar in [0, 1], floating.

    Returns:
      The new mean, in the structure of `iterates` and the dtypes of `mean`.
    """
    leaves, treedef = jax.tree.flatten(iterates)
    if not isinstance(mean, CompensatedMean):
        values = treedef.flatten_up_to(mean)
        new = [_plain(v, x, weight) for v, x in zip(values, leaves, strict=True)]
        return treedef.unflatten(new)
    values = treedef.flatten_up_to(mean.value)
    residuals = treedef.flatten_up_to(mean.residual)
    pairs = [
        _compensated(v, r, x, weight)
        for v, r, x in zip(values, residuals, leaves, strict=True)
    ]
    return CompensatedMean(
        treedef.unflatten([value for value, _ in pairs]),
        treedef.unflatten([residual for _, residual in pairs]),
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


def _plain(value: Any, iterate: jax.Array, weight: jax.Array) -> jax.Array:
    def f(m: jax.Array, x: jax.Array) -> jax.Array:
        w = weight.astype(x.dtype)
        return jnp.where(w == 1, x, m + w * (x - m))

    value = jnp.asarray(value)
    wide = wide_dtype(value, iterate)
    mean = on_real_parts(f, value.astype(wide), iterate.astype(wide))
    return mean.astype(value.dtype)


def _compensated(
    value: Any, residual: Any, iterate: jax.Array, weight: jax.Array
) -> tuple[jax.Array, jax.Array]:
    value, residual = jnp.asarray(value), jnp.asarray(residual)
    stored_dtype = jnp.finfo(value.dtype).dtype

    def f(v: jax.Array, r: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        w = weight.astype(x.dtype)
        # Where the weight is 1 the recursion starts anew from the iterate. Its
        # inputs are selected, not its outputs: on outputs XLA spends another pass.
        # -0.0 is the one number whose addition changes nothing, zeros included.
        start = jnp.where(w == 1, x, v)
        increment = jnp.where(w == 1, -0.0, w * ((x - v) - r) + r)
        total = start + increment
        if total.dtype != stored_dtype:
            total = _as_stored(total, stored_dtype, weight).astype(total.dtype)
        return total, (start - total) + increment

    wide = wide_dtype(value, iterate)
    arrays = (a.astype(wide) for a in (value, residual, iterate))
    total, rest = on_real_parts(f, *arrays)
    return total.astype(value.dtype), rest.astype(residual.dtype)


def _as_stored(x: jax.Array, dtype: Any, weight: jax.Array) -> jax.Array:
    """`x` in `dtype`, rounded as by a store to memory, inside a fusion too."""
    narrow, wide = jnp.finfo(dtype), jnp.finfo(x.dtype)

    def f(x: jax.Array) -> jax.Array:
        if x.dtype == narrow.dtype:
            # No compiler knows that this factor is 1, so none contracts a product
            # that made `x` with the sum that uses it; times 1 is exact.
            return x * (1 + 0 * weight).astype(x.dtype)
        rounded = jax.lax.reduce_precision(x, narrow.nexp, narrow.nmant)
        if narrow.nexp < wide.nexp:
            # `reduce_precision` flushes what is subnormal in the narrow dtype. In
            # the binade of `shift`, `x`'s own dtype has just its spacing.
            shift = 1.5 * 2.0 ** (narrow.minexp - narrow.nmant + wide.nmant)
            subnormal = (x + shift) - shift
            tiny = jnp.abs(x) < 2.0**narrow.minexp
            # A zero is left to `reduce_precision`, which keeps its sign.
            rounded = jnp.where(tiny & (subnormal != 0), subnormal, rounded)
        return rounded.astype(narrow.dtype)

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
        floating = jnp.issubdtype(jnp.dtype(accumulator_dtype), jnp.inexact)
    except TypeError:
        floating = False
    if not floating:
        raise ValueError(
            "accumulator_dtype must name a floating dtype, such as 'float32';"
            f" got {accumulator_dtype!r}"
        )
