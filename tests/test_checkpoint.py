# SPDX-License-Identifier: Apache-2.0
"""A saved and restored state is the same, and training resumes from it bit for bit."""

import functools

import flax.serialization
import jax
import optax
import orbax.checkpoint as ocp
import pytest

from asgd_optax import asgd
from tests.support import bits, random_tree, train_step
from tests.transformations import ROWS


def through_flax(saved, like, folder):
    del folder
    return flax.serialization.from_bytes(like, flax.serialization.to_bytes(saved))


def through_orbax(saved, like, folder):
    abstract = jax.tree.map(ocp.tree.to_shape_dtype_struct, like)
    with ocp.CheckpointManager(folder) as manager:
        manager.save(3, args=ocp.args.StandardSave(saved))
    # A new manager knows only what is in the files, as one in another process.
    with ocp.CheckpointManager(folder) as manager:
        return manager.restore(3, args=ocp.args.StandardRestore(abstract))


WAYS = [through_flax, through_orbax]


def chain(transformation):
    return optax.chain(optax.clip_by_global_norm(1.0), transformation)


def tree(seed, dtype):
    """Return a random tree without an empty array, which Orbax does not save."""
    return {**random_tree(seed, dtype), "b": [None]}


def gradients(step, dtype):
    return tree(100 + step, dtype)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_restored_run_resumes_bitwise(row, tmp_path):
    tx = chain(row.make())
    # The averages of bfloat16 params are float32, so both dtypes are saved.
    params = tree(0, "bfloat16")
    # With a device specified, restored arrays of any kind share one program.
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    step_fn = jax.jit(functools.partial(train_step, tx), in_shardings=device)

    def train(params, state, steps):
        for step in steps:
            params, state = step_fn(params, state, gradients(step, "bfloat16"))
        return params, state

    start = (params, tx.init(params))
    saved = train(*start, range(5))
    assert bits(saved) != bits(start)
    expected = train(*saved, range(5, 9))
    for way in WAYS:
        restored = way(saved, start, tmp_path)
        assert jax.tree.structure(restored) == jax.tree.structure(saved)
        assert bits(restored) == bits(saved)
        assert bits(train(*restored, range(5, 9))) == bits(expected), way


@pytest.mark.parametrize("way", WAYS)
def test_restored_state_can_be_updated_eagerly(way, tmp_path):
    """Its leaves may be NumPy arrays, which have other promotion rules."""
    tx = chain(asgd(0.3, lambd=0.1, t0=0, compensated=True))
    params = tree(0, "bfloat16")
    state = tx.init(params)
    for step in range(3):
        grads = gradients(step, "bfloat16")
        params, state = train_step(tx, params, state, grads)
    restored = way((params, state), (params, state), tmp_path)
    grads = gradients(3, "bfloat16")
    expected = train_step(tx, params, state, grads)
    assert bits(train_step(tx, *restored, grads)) == bits(expected)
