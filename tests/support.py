# SPDX-License-Identifier: Apache-2.0
"""What several test modules need."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

from asgd_optax import (
    averaged_params,
    exponential_weighting,
    polynomial_weighting,
    uniform_weighting,
)
from asgd_optax._core.numerics import enable_x64


def precision_of(dtype):
    """The context in which `dtype` exists: 64-bit types are off by default."""
    return enable_x64(jnp.finfo(dtype).bits == 64)


def random_tree(seed, dtype, scale=1.0):
    """A tree with a matrix, a scalar, an empty array and a missing leaf."""
    rng = np.random.default_rng(seed)

    def array(*shape):
        x = scale * rng.standard_normal(shape)
        if np.issubdtype(np.dtype(dtype), np.complexfloating):
            x = x + 1j * scale * rng.standard_normal(shape)
        return jnp.asarray(x, dtype)

    return {"a": {"matrix": array(3, 2), "scalar": array()}, "b": [array(0, 4), None]}


def stacked(trees):
    """One tree, with an axis for the trees in front."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def train_step(tx, params, state, grads, **extra):
    updates, state = tx.update(grads, state, params, **extra)
    return optax.apply_updates(params, updates), state


def bits(tree):
    """The leaves' bytes: equality that tells -0.0 from 0.0 and knows NaN."""
    return [
        (np.asarray(x).dtype, np.shape(x), np.asarray(x).tobytes())
        for x in jax.tree.leaves(tree)
    ]


def hard_numbers(dtype, seed=0):
    """Normal and tiny values, subnormals of `dtype` and both zeros among them."""
    rng, info = np.random.default_rng(seed), jnp.finfo(dtype)
    x = rng.standard_normal(4096)
    tiny = rng.random(4096) < 0.5
    x = np.where(tiny, x * 2.0 ** (int(info.minexp) - 3), x)
    x[:2] = 0.0, -0.0
    return jnp.asarray(x, dtype)


def hard_trees(pairs, steps):
    """Params and gradients for `assert_average_follows`: a leaf for two dtypes each."""
    rng = np.random.default_rng(1)
    params, grads = {}, {}
    for p_dtype, g_dtype in pairs:
        p, name = hard_numbers(p_dtype), f"{p_dtype}, {g_dtype} gradient"
        g = np.abs(np.asarray(p, np.float64)) * rng.standard_normal((steps, p.size))
        params[name], grads[name] = p, jnp.asarray(g, g_dtype)
    return params, grads


def assert_average_follows(tx, params, grads):
    """Before averaging begins: the average is the params bit for bit.

    Step by step, in one fused step, in a scan, in several unrolled, with the update
    apart, and with a step whose number the compiler knows.

    Args:
      tx: a transformation that does not average yet.
      params: a dictionary of arrays.
      grads: another, with an axis for the steps in front.
    """
    steps = len(next(iter(grads.values())))
    each = [{name: g[n] for name, g in grads.items()} for n in range(steps)]

    def run_with(step):
        def run(p, state):
            for g in each:
                p, state = step(p, state, g)
            return p, state

        return run

    unrolled = run_with(partial(train_step, tx))

    def scanned(p, state):
        step = lambda carry, g: (train_step(tx, *carry, g), None)  # noqa: E731
        return jax.lax.scan(step, (p, state), grads)[0]

    update = jax.jit(tx.update)

    def step_apart(p, state, g):
        updates, state = update(g, state, p)
        return optax.apply_updates(p, updates), state

    @jax.jit
    def first(g, p):
        return tx.update(g, tx.init(p), p)

    def begun_inside(p, state):
        updates, state = first(each[0], p)
        return optax.apply_updates(p, updates), state

    for run in (
        unrolled,
        run_with(jax.jit(partial(train_step, tx))),
        jax.jit(unrolled),
        jax.jit(scanned),
        run_with(step_apart),
        begun_inside,
    ):
        p, state = run(params, tx.init(params))
        average, as_params = averaged_params(state), averaged_params(state, p)
        for name, leaf in p.items():
            assert bits(leaf) != bits(params[name]), name
            assert bits(as_params[name]) == bits(leaf), name
            # Nor is anything hidden below the params' own precision.
            assert bits(average[name].astype(leaf.dtype)) == bits(leaf), name
            assert bits(average[name]) == bits(leaf.astype(jnp.float32)), name


# Name, and the value of its parameter: uniform has none.
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
