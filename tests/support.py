# SPDX-License-Identifier: Apache-2.0
"""What several test modules need."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

if hasattr(jax, "enable_x64"):
    enable_x64 = jax.enable_x64
else:  # jax before 0.8
    from jax.experimental import enable_x64


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


def train_step(tx, params, state, grads, **extra):
    updates, state = tx.update(grads, state, params, **extra)
    return optax.apply_updates(params, updates), state


def bits(tree):
    """The leaves' bytes: equality that tells -0.0 from 0.0 and knows NaN."""
    return [
        (np.asarray(x).dtype, np.shape(x), np.asarray(x).tobytes())
        for x in jax.tree.leaves(tree)
    ]


def assert_close(actual, desired, rtol, atol=0.0):
    """Trees of one structure, leaf for leaf, with the leaf's path in the message."""
    assert jax.tree.structure(actual) == jax.tree.structure(desired)
    pairs = zip(
        jax.tree_util.tree_leaves_with_path(actual),
        jax.tree.leaves(desired),
        strict=True,
    )
    for (path, a), d in pairs:
        np.testing.assert_allclose(
            np.asarray(a),
            np.asarray(d),
            rtol=rtol,
            atol=atol,
            err_msg=jax.tree_util.keystr(path),
        )
