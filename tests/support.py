# SPDX-License-Identifier: Apache-2.0
"""Helpers that several test modules share."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from asgd_optax import (
    exponential_weighting,
    polynomial_weighting,
    uniform_weighting,
)
from asgd_optax._core.numerics import enable_x64

INT32_MAX = 2**31 - 1

# Name and parameter of each weighting; the uniform one has no parameter.
WEIGHTINGS = [
    ("uniform", None),
    *(("polynomial", gamma) for gamma in (0.0, 1.0, 3.0)),
    *(("exponential", decay) for decay in (0.0, 0.9, 0.999)),
]


def make_weighting(name, value):
    if name == "uniform":
        return uniform_weighting()
    return {"polynomial": polynomial_weighting, "exponential": exponential_weighting}[
        name
    ](value)


def precision_of(dtype):
    """Return a context in which `dtype` exists: 64-bit types are off by default."""
    return enable_x64(jnp.finfo(dtype).bits == 64)


def random_tree(seed, dtype, scale=1.0):
    """Return a tree with a matrix, a scalar, an empty array and a missing leaf."""
    rng = np.random.default_rng(seed)

    def array(*shape):
        x = scale * rng.standard_normal(shape)
        if np.issubdtype(np.dtype(dtype), np.complexfloating):
            x = x + 1j * scale * rng.standard_normal(shape)
        return jnp.asarray(x, dtype)

    return {"a": {"matrix": array(3, 2), "scalar": array()}, "b": [array(0, 4), None]}


def stacked(trees):
    """Stack trees along a new leading axis."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def train_step(tx, params, state, grads, **extra):
    updates, state = tx.update(grads, state, params, **extra)
    return optax.apply_updates(params, updates), state


def bits(tree):
    """Return the leaves' bytes, which compare -0.0 and NaN as bits do."""
    return [
        (np.asarray(x).dtype, np.shape(x), np.asarray(x).tobytes())
        for x in jax.tree.leaves(tree)
    ]


def hard_numbers(dtype, seed=0):
    """Return normal and tiny numbers, with subnormal ones and both zeros."""
    rng, info = np.random.default_rng(seed), jnp.finfo(dtype)
    x = rng.standard_normal(4096)
    tiny = rng.random(4096) < 0.5
    x = np.where(tiny, x * 2.0 ** (int(info.minexp) - 3), x)
    x[:2] = 0.0, -0.0
    return jnp.asarray(x, dtype)
