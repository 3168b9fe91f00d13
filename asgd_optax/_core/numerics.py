# SPDX-License-Identifier: Apache-2.0
"""Rounding and counting that no compiler optimizes away.

Inside a fusion XLA may keep a narrow intermediate in float32 (excess precision), and
LLVM may contract a product and a sum into a fused multiply-add. `rounded` and
`uncontracted` use operations that neither removes. Steps are compared as integers,
because float32 cannot represent odd numbers above 2**24.
"""

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from asgd_optax._core import checks

LAST_STEP = np.iinfo(np.int32).max

# Before jax 0.8, `enable_x64` is experimental.
_home: Any = jax if hasattr(jax, "enable_x64") else jax.experimental
enable_x64: Callable[[bool], AbstractContextManager[None]] = _home.enable_x64


def wide_dtype(*arrays: ArrayLike) -> Any:
    """Return the dtype in which to compute with `arrays`, at least float32."""
    # By NumPy: with `jax_numpy_dtype_promotion="strict"` JAX promotes no dtypes.
    dtypes = (jnp.result_type(a) for a in arrays)
    return functools.reduce(np.promote_types, dtypes, np.dtype(np.float32))


def map_real_and_imaginary(f: Callable[..., Any], *arrays: jax.Array) -> Any:
    """Apply `f` to real arrays, or to the two parts of complex arrays separately.

    PyTorch does the same (`view_as_real`). A NaN or an overflow in one part then does
    not spread to the other, as it would in a complex product.
    """
    if not any(jnp.iscomplexobj(a) for a in arrays):
        return f(*arrays)
    real = f(*(jnp.real(a) for a in arrays))
    imag = f(*(jnp.imag(a) for a in arrays))
    return jax.tree.map(jax.lax.complex, real, imag)


def rounded(x: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Round `x` to the precision of a narrower dtype, but keep its own dtype.

    Args:
      x: a floating or complex array.
      dtype: a floating or complex dtype, no wider than that of `x`.
    """
    narrow, wide = jnp.finfo(dtype), jnp.finfo(x.dtype)
    if narrow.dtype == wide.dtype:
        return x

    def f(x: jax.Array) -> jax.Array:
        result = jax.lax.reduce_precision(x, narrow.nexp, narrow.nmant)
        if narrow.nexp == wide.nexp:
            return result
        # `reduce_precision` flushes numbers that are subnormal in the narrow dtype. In
        # the binade of `shift`, the dtype of `x` has the spacing of those numbers. XLA
        # folds `(x + c) - c` when it sees both operations, so hide one.
        shift = 1.5 * 2.0 ** (narrow.minexp - narrow.nmant + wide.nmant)
        subnormal = uncontracted(x + shift) - shift
        tiny = jnp.abs(x) < 2.0**narrow.minexp
        # `reduce_precision` keeps the sign of a zero.
        return jnp.where(tiny & (subnormal != 0), subnormal, result)

    return map_real_and_imaginary(f, x)


def widened(x: jax.Array, wide: DTypeLike) -> jax.Array:
    """Convert `x` to a wider dtype, after rounding it to its own."""
    return rounded(x.astype(wide), x.dtype)


def rounded_update(u: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Convert `u` to a narrower or equal dtype with one rounding."""
    if u.dtype == dtype == wide_dtype(u):
        return map_real_and_imaginary(uncontracted, u)
    return rounded(u.astype(wide_dtype(u)), dtype).astype(dtype)


def uncontracted(x: jax.Array) -> jax.Array:
    """Return `x` in a form that no compiler contracts with a later addition."""
    # Always equals x (x + x is NaN when x is). The compiler cannot prove that, so it
    # cannot fuse the multiply that made x with a later add.
    return jax.lax.select(x == x, x, x + x)


def copied(x: ArrayLike) -> jax.Array:
    """Copy an array without its weak type, so that both can be donated together."""
    return jnp.array(x, dtype=jnp.result_type(x), copy=True)


def zeros_as(tree: Any) -> Any:
    """Return zeros with the shapes, dtypes and shardings of a tree of arrays."""
    return jax.tree.map(_zeros_as, tree)


@jax.jit
def _zeros_as(v: jax.Array) -> jax.Array:
    # These zeros depend on the array, so they take its sharding; under jit,
    # `zeros_like` depends on nothing and is replicated. Use no constants: with explicit
    # axes jax 0.12 gives a choice between two constants a type without a sharding.
    return ((v == v) & (v != v)).astype(v.dtype)


def default_float(value: ArrayLike) -> jax.Array:
    """Convert a hyperparameter to JAX's default float dtype.

    `optax.inject_hyperparams` makes it complex if the parameters are.
    """
    return jnp.real(jnp.asarray(value)).astype(jnp.result_type(float))


def split_count(count: ArrayLike) -> tuple[Any, Any]:
    """Split a number of updates into its whole part (int32) and its fraction.

    Compare steps with the whole part, as integers. Numbers above the last step, also
    `inf`, become the last step.
    """
    xp: Any = np
    value: Any = count
    if checks.is_traced(value):
        xp, value = jnp, jnp.real(value)
        # The range of float16 ends before the last step.
        whole = jnp.issubdtype(value.dtype, jnp.integer)
        value = value.astype(jnp.result_type(int if whole else float))
    else:
        value = checks.concrete(value)
    never = value >= LAST_STEP
    reached = xp.where(never, 0, value)
    whole = reached if xp.issubdtype(reached.dtype, xp.integer) else xp.floor(reached)
    fraction = jnp.asarray(reached - whole, dtype=jnp.result_type(float))
    return xp.where(never, LAST_STEP, whole.astype(np.int32)), fraction
