# SPDX-License-Identifier: Apache-2.0
"""Counting updates exactly, from any start, up to the end of int32."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from asgd_optax import _checks

LAST = np.iinfo(np.int32).max


def split_start(start: Any) -> tuple[Any, Any]:
    """A number of updates as its whole part, int32, and its fraction, floating.

    Above 2**24 float32 holds no odd number, so steps are to be compared with the
    whole part, in integers. Starts past the last step, `inf` too, become it: no
    step comes after it.
    """
    xp: Any = np
    if _checks.is_traced(start):
        xp, start = jnp, jnp.real(start)
        # A float16 holds no number near the last step.
        whole = jnp.issubdtype(start.dtype, jnp.integer)
        start = start.astype(jnp.result_type(int if whole else float))
    else:
        start = _checks.concrete(start)
    never = start >= LAST
    reached = xp.where(never, 0, start)
    whole = reached if xp.issubdtype(reached.dtype, xp.integer) else xp.floor(reached)
    fraction = jnp.asarray(reached - whole, dtype=jnp.result_type(float))
    return xp.where(never, LAST, whole.astype(np.int32)), fraction


def float_of(value: Any) -> jax.Array:
    """A hyperparameter in JAX's default float dtype.

    `optax.inject_hyperparams` makes it complex where the parameters are.
    """
    return jnp.real(jnp.asarray(value)).astype(jnp.result_type(float))
