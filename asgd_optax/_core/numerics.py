# SPDX-License-Identifier: Apache-2.0
"""Rounding, widening and counting, where a compiler or a dtype would spoil them.

A compiler may skip a rounding inside a fusion: XLA keeps a narrow intermediate in
float32 (excess precision), LLVM contracts a product and a sum into a fused
multiply-add. `rounded` and `uncontracted` write theirs in operations that neither
removes. Counts are compared in integers: above 2**24 float32 holds no odd number.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from asgd_optax._core import checks

LAST_STEP = np.iinfo(np.int32).max

# jax before 0.8 has it among what is experimental.
_home: Any = jax if hasattr(jax, "enable_x64") else jax.experimental
enable_x64: Callable[[bool], AbstractContextManager[None]] = _home.enable_x64


def wide_dtype(*arrays: ArrayLike) -> Any:
    """The dtype in which to compute with `arrays`: theirs, float32 at least."""
    return jnp.result_type(*(jnp.result_type(a) for a in arrays), jnp.float32)


def map_real_and_imaginary(f: Callable[..., Any], *arrays: jax.Array) -> Any:
    """`f` of real arrays, applied to complex ones part by part.

    So torch does it (`view_as_real`), and so a NaN or an overflow in one part
    stays out of the other, which a complex product would spread it to.
    """
    if not any(jnp.iscomplexobj(a) for a in arrays):
        return f(*arrays)
    real = f(*(jnp.real(a) for a in arrays))
    imag = f(*(jnp.imag(a) for a in arrays))
    return jax.tree.map(jax.lax.complex, real, imag)


def rounded(x: jax.Array, dtype: DTypeLike) -> jax.Array:
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
        # binade of `shift`, `x`'s own dtype has just its spacing. Adding a constant and
        # taking it off again XLA leaves out, where it sees the one beside the other.
        shift = 1.5 * 2.0 ** (narrow.minexp - narrow.nmant + wide.nmant)
        subnormal = uncontracted(x + shift) - shift
        tiny = jnp.abs(x) < 2.0**narrow.minexp
        # A zero is left to `reduce_precision`, which keeps its sign.
        return jnp.where(tiny & (subnormal != 0), subnormal, result)

    return map_real_and_imaginary(f, x)


def widened(x: jax.Array, wide: DTypeLike) -> jax.Array:
    """`x` in a dtype as wide or wider, with the rounding to its own."""
    return rounded(x.astype(wide), x.dtype)


def rounded_update(u: jax.Array, dtype: DTypeLike) -> jax.Array:
    """`u` in a narrower or equal dtype, where it is not to be rounded once more."""
    if u.dtype == dtype == wide_dtype(u):
        return map_real_and_imaginary(uncontracted, u)
    return rounded(u.astype(wide_dtype(u)), dtype).astype(dtype)


def uncontracted(x: jax.Array) -> jax.Array:
    """`x`, which a compiler does not join with what is added to it."""
    # The sum sees a choice, not the operation that made `x`. Twice a NaN is that NaN,
    # so the choice is none, which a compiler does not see.
    return jax.lax.select(x == x, x, x + x)


def zeros_as(tree: Any) -> Any:
    """Zeros in the shapes, dtypes and shardings of a tree of arrays."""
    return jax.tree.map(_zeros_as, tree)


@jax.jit
def _zeros_as(v: jax.Array) -> jax.Array:
    # They depend on the array and so take its sharding; under jit those of
    # `zeros_like` depend on nothing and are replicated. No constant is part of it:
    # with explicit axes jax 0.12 gives a choice between two a type without sharding.
    return ((v == v) & (v != v)).astype(v.dtype)


def default_float(value: ArrayLike) -> jax.Array:
    """A hyperparameter in JAX's default float dtype.

    `optax.inject_hyperparams` makes it complex where the parameters are.
    """
    return jnp.real(jnp.asarray(value)).astype(jnp.result_type(float))


def split_count(count: ArrayLike) -> tuple[Any, Any]:
    """A number of updates as its whole part, int32, and its fraction, floating.

    Steps are to be compared with the whole part, in integers. Numbers past the last
    step, `inf` too, become it: no step comes after it.
    """
    xp: Any = np
    value: Any = count
    if checks.is_traced(value):
        xp, value = jnp, jnp.real(value)
        # A float16 holds no number near the last step.
        whole = jnp.issubdtype(value.dtype, jnp.integer)
        value = value.astype(jnp.result_type(int if whole else float))
    else:
        value = checks.concrete(value)
    never = value >= LAST_STEP
    reached = xp.where(never, 0, value)
    whole = reached if xp.issubdtype(reached.dtype, xp.integer) else xp.floor(reached)
    fraction = jnp.asarray(reached - whole, dtype=jnp.result_type(float))
    return xp.where(never, LAST_STEP, whole.astype(np.int32)), fraction
