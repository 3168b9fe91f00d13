# SPDX-License-Identifier: Apache-2.0
"""An average placed in host memory stays there and has the same numbers.

`tests/tpu` checks the same for the TPU compiler.
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from asgd_optax import average_iterates, averaged_params, running_average
from tests.support import bits, train_step
from tests.transformations import ROWS

STEPS = 4

each_row = pytest.mark.parametrize(
    "row",
    # Random scaling reads its arrays outside of the averaging kernel, too. The others
    # differ from "uniform" in the weighting alone.
    [
        row
        for row in ROWS
        if row.name not in ("random-scaling", "polynomial", "exponential", "power")
    ],
    ids=lambda row: row.name,
)


def to_host(x):
    return jax.device_put(x, x.sharding.with_memory_kind("pinned_host"))


def placed(state):
    """Return `state` with its average in host memory, also inside a chain."""

    def place(path, x):
        names = {getattr(key, "name", None) for key in path}
        return to_host(x) if names & {"ax", "average"} else x

    return jax.tree_util.tree_map_with_path(place, state)


def kinds(tree):
    return {x.sharding.memory_kind for x in jax.tree.leaves(tree) if x.ndim}


def parameters(dtype="float32"):
    """Return two leaves that are sharded over eight devices and a replicated one."""
    mesh = Mesh(np.array(jax.devices()), ("devices",))
    rng = np.random.default_rng(0)

    def leaf(shape, *axes):
        sharding = NamedSharding(mesh, PartitionSpec(*axes))
        return jax.device_put(jnp.asarray(rng.standard_normal(shape), dtype), sharding)

    return {
        "matrix": leaf((16, 3), "devices"),
        "wide": leaf((2, 24), None, "devices"),
        "bias": leaf((5,)),
    }


@jax.jit
def gradients(params, n):
    return jax.tree.map(lambda p: (p * (0.5 + 0.1 * n) - 0.2).astype(p.dtype), params)


def train(tx, params, state, step):
    for n in range(STEPS):
        params, state = step(tx, params, state, gradients(params, n))
    return params, state


compiled = jax.jit(train_step, static_argnums=0)
donating = jax.jit(train_step, static_argnums=0, donate_argnums=(1, 2))


@each_row
def test_average_stays_in_host_memory_with_the_same_numbers(row):
    tx, params = row.make(), parameters("bfloat16")
    # Scalars are placed as a step returns them, or the second step would recompile.
    everywhere = NamedSharding(params["bias"].sharding.mesh, PartitionSpec())
    state = jax.tree.map(
        lambda x: x if x.ndim else jax.device_put(x, everywhere), tx.init(params)
    )
    expected = train(tx, params, state, compiled)

    state = placed(state)
    shardings = jax.tree.map(lambda x: x.sharding, averaged_params(state))
    for n in range(STEPS):
        old = jax.tree.leaves(averaged_params(state))
        params, state = donating(tx, params, state, gradients(params, n))
        assert kinds(params) == {"device"}
        assert kinds(averaged_params(state)) == {"pinned_host"}
        assert all(x.is_deleted() for x in old)
    assert bits((params, state)) == bits(expected)
    average = averaged_params(state)
    assert jax.tree.map(lambda x: x.sharding, average) == shardings
    # `device_put` brings an average in the parameters' dtypes to the device.
    average = averaged_params(state, params)
    assert bits(average) == bits(averaged_params(expected[1], params))
    where = jax.tree.map(lambda p: p.sharding, params)
    assert kinds(jax.device_put(average, where)) == {"device"}


def test_average_stays_in_host_memory_in_eager_steps_and_in_a_scan():
    tx = optax.chain(optax.sgd(0.3), average_iterates(every=2, compensated=True))
    expected = train(tx, parameters(), tx.init(parameters()), compiled)
    state = placed(tx.init(parameters()))
    eager = train(tx, parameters(), state, train_step)
    assert kinds(averaged_params(eager[1])) == {"pinned_host"}

    def body(carry, n):
        return train_step(tx, *carry, gradients(carry[0], n)), None

    scanned, _ = jax.lax.scan(body, (parameters(), state), jnp.arange(STEPS))
    assert kinds(averaged_params(scanned[1])) == {"pinned_host"}
    for actual in (eager, scanned):
        chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-6)


def test_init_can_place_the_average_in_host_memory():
    tx, params = optax.chain(optax.sgd(0.3), average_iterates()), parameters()
    shardings = jax.tree.map(lambda x: x.sharding, placed(jax.jit(tx.init)(params)))
    state = jax.jit(tx.init, out_shardings=shardings)(params)
    assert kinds(averaged_params(state)) == {"pinned_host"}
    assert bits(averaged_params(state)) == bits(params)


def test_update_brings_one_leaf_at_a_time_to_the_device():
    tx, params = average_iterates(), [jnp.ones(n) for n in (1, 2, 3, 4)]

    @jax.make_jaxpr
    def update(params):
        state = tx.init(params)
        average = jax.device_put(state.average, jax.memory.Space.Host)
        return tx.update(params, state._replace(average=average), params)

    fetched = [
        [v.aval.shape for v in equation.invars]
        for equation in update(params).eqns
        if equation.primitive.name == "optimization_barrier"
    ]
    # Each leaf waits for the leaf before it alone, not for all of them.
    assert fetched == [[(1,)], [(2,), (1,)], [(3,), (2,)], [(4,), (3,)]]


def test_running_average_stays_in_host_memory():
    mean, tree = running_average(), parameters()
    state = mean.init(tree)
    state = state._replace(average=jax.tree.map(to_host, state.average))
    update = jax.jit(mean.update, donate_argnums=0)
    state = update(update(state, tree), jax.tree.map(lambda x: 3 * x, tree))
    assert kinds(mean.value(state)) == {"pinned_host"}
    chex.assert_trees_all_close(
        mean.value(state), jax.tree.map(lambda x: 2 * x, tree), rtol=1e-6
    )
