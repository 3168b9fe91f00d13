# SPDX-License-Identifier: Apache-2.0
"""A state that was saved and restored is the same, and training goes on from it."""

import functools

import flax.serialization
import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
import pytest

from asgd_optax import ASGDState, CompensatedMean, asgd, nt_asgd
from tests.support import bits, random_tree, train_step
from tests.transformations import ROWS


def through_a_state_dict(saved, like, folder):
    del folder
    state_dict = flax.serialization.to_state_dict(saved)
    return flax.serialization.from_state_dict(like, state_dict)


def through_bytes(saved, like, folder):
    del folder
    return flax.serialization.from_bytes(like, flax.serialization.to_bytes(saved))


def through_orbax(saved, like, folder):
    abstract = jax.tree.map(ocp.tree.to_shape_dtype_struct, like)
    with ocp.CheckpointManager(folder) as manager:
        manager.save(3, args=ocp.args.StandardSave(saved))
    # Another manager, as in another process: it knows what is in the files, no more.
    with ocp.CheckpointManager(folder) as manager:
        return manager.restore(3, args=ocp.args.StandardRestore(abstract))


WAYS = [through_a_state_dict, through_bytes, through_orbax]


def chain(transformation):
    return optax.chain(optax.clip_by_global_norm(1.0), transformation)


def tree(seed, dtype):
    """Without the empty array: Orbax saves none."""
    return {**random_tree(seed, dtype), "b": [None]}


def gradients(step, dtype):
    return tree(100 + step, dtype)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_a_restored_run_goes_on_to_the_bit(row, tmp_path):
    tx = chain(row.make())
    # Those of bfloat16 params hold float32 averages besides.
    params = tree(0, "bfloat16")
    # Whatever a way makes of an array: without a device it would be compiled for each.
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    step_fn = jax.jit(functools.partial(train_step, tx), in_shardings=device)

    def train(params, state, steps):
        for step in steps:
            params, state = step_fn(params, state, gradients(step, "bfloat16"))
        return params, state

    fresh = (params, tx.init(params))
    saved = train(*fresh, range(5))
    assert bits(saved) != bits(fresh)
    expected = train(*saved, range(5, 9))
    for way in WAYS:
        restored = way(saved, fresh, tmp_path)
        assert jax.tree.structure(restored) == jax.tree.structure(saved)
        assert bits(restored) == bits(saved)
        assert bits(train(*restored, range(5, 9))) == bits(expected), way


@pytest.mark.parametrize("way", WAYS)
def test_a_restored_state_serves_outside_jit(way, tmp_path):
    """Where its leaves may be NumPy arrays, which compute by other rules."""
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


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("stop", [1, 3, 5])
def test_a_trigger_restored_before_it_fires_does_so_at_the_same_loss(
    way, stop, tmp_path
):
    losses = [4.0, 3.0, 3.5, 2.0, 2.5, 3.2, 1.0]  # 3.2 is above the lowest but two
    tx = chain(nt_asgd(0.1, nonmono=2))
    params = tree(0, "float32")

    def fired(state, steps):
        flags = []
        for step in steps:
            grads = gradients(step, "float32")
            _, state = tx.update(grads, state, params, validation_loss=losses[step])
            flags.append(bool(state[1].triggered))
        return state, flags

    fresh = tx.init(params)
    saved, before = fired(fresh, range(stop))
    restored = way(saved, fresh, tmp_path)
    _, after = fired(restored, range(stop, 7))
    assert before + after == [False] * 5 + [True] * 2


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("compensated", [False, True])
def test_the_types_come_back(compensated, way, tmp_path):
    tx = chain(asgd(compensated=compensated))
    state = tx.init({"w": jnp.ones(3, jnp.bfloat16)})
    restored = way(state, state, tmp_path)[1]
    assert type(restored) is ASGDState
    mean = restored.ax.value if compensated else restored.ax
    assert type(restored.ax) is (CompensatedMean if compensated else dict)
    assert mean["w"].dtype == jnp.float32
    assert restored.step.dtype == jnp.int32


def test_a_state_dict_names_the_fields():
    tx = chain(asgd(compensated=True))
    state_dict = flax.serialization.to_state_dict(tx.init({"w": jnp.ones(3)}))["1"]
    assert state_dict.keys() == {"step", "eta", "mu", "ax"}
    assert state_dict["ax"].keys() == {"value", "residual"}


@pytest.mark.parametrize("way", WAYS)
def test_a_plain_state_is_not_taken_for_a_compensated_one(way, tmp_path):
    params = {"w": jnp.ones(3)}
    plain = asgd().init(params)
    compensated = asgd(compensated=True).init(params)
    with pytest.raises((ValueError, KeyError)):
        way(plain, compensated, tmp_path / "plain")
    with pytest.raises((ValueError, KeyError)):
        way(compensated, plain, tmp_path / "compensated")
