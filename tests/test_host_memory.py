# SPDX-License-Identifier: Apache-2.0
"""An average placed in host memory stays there, and its numbers are the same.

What a TPU's compiler makes of it is in `tests/tpu`.
"""

from functools import partial

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

# The field of each state that is to be placed; others are the optimizer's own.
FIELDS = ("ax", "average")

each_row = pytest.mark.parametrize(
    "row",
    # Its arrays are no average alone: they are read outside of the averaging.
    [row for row in ROWS if not row.name.endswith("random-scaling")],
    ids=lambda row: row.name,
)


def to_host(x):
    return jax.device_put(x, x.sharding.with_memory_kind("pinned_host"))


def placed(state):
    """`state` with its average in host memory, wherever in a chain it stands."""

    def is_averaging(node):
        return any(hasattr(node, field) for field in FIELDS)

    def place(node):
        (field,) = (f for f in FIELDS if hasattr(node, f))
        average = jax.tree.map(to_host, getattr(node, field))
        return node._replace(**{field: average})

    return jax.tree.map(
        lambda node: place(node) if is_averaging(node) else node,
        state,
        is_leaf=is_averaging,
    )


def kinds(tree):
    return {x.sharding.memory_kind for x in jax.tree.leaves(tree) if x.ndim}


def parameters(dtype="float32"):
    """Two leaves over eight devices, and one on each of them."""
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
def test_it_stays_there_and_is_the_same(row):
    tx, params = row.make(), parameters("bfloat16")
    # Its scalars lie where a step leaves them, or the second would compile once more.
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
    # Read in the parameters' dtypes, and brought to the device where they are.
    average = averaged_params(state, params)
    assert bits(average) == bits(averaged_params(expected[1], params))
    where = jax.tree.map(lambda p: p.sharding, params)
    assert kinds(jax.device_put(average, where)) == {"device"}


def test_eager_and_in_a_scan():
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


def test_a_state_made_there():
    """From `init` on, so that the device never holds it."""
    tx, params = optax.chain(optax.sgd(0.3), average_iterates()), parameters()
    shardings = jax.tree.map(lambda x: x.sharding, placed(jax.jit(tx.init)(params)))
    state = jax.jit(tx.init, out_shardings=shardings)(params)
    assert kinds(averaged_params(state)) == {"pinned_host"}
    assert bits(averaged_params(state)) == bits(params)


def test_each_leaf_waits_for_the_one_before():
    """Or a compiler may bring all of them to the device at once."""
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
    # And for no other: of many leaves there would be as many squared.
    assert fetched == [[(1,)], [(2,), (1,)], [(3,), (2,)], [(4,), (3,)]]


def test_a_mean_that_lies_there_in_part_is_left_where_it_is():
    """JAX refuses to compute with it: nothing is moved that was not placed."""
    tx = average_iterates(compensated=True)

    def update(params, field):
        state = tx.init(params)
        there = jax.device_put(getattr(state.average, field), jax.memory.Space.Host)
        average = state.average._replace(**{field: there})
        return tx.update(params, state._replace(average=average), params)

    for field in ("value", "residual"):
        with pytest.raises(ValueError):  # noqa: PT011 - the words are JAX's
            jax.eval_shape(partial(update, field=field), jnp.ones(3))


def test_a_running_average():
    mean, tree = running_average(), parameters()
    state = mean.init(tree)
    state = state._replace(average=jax.tree.map(to_host, state.average))
    update = jax.jit(mean.update, donate_argnums=0)
    state = update(update(state, tree), jax.tree.map(lambda x: 3 * x, tree))
    assert kinds(mean.value(state)) == {"pinned_host"}
    chex.assert_trees_all_close(
        mean.value(state), jax.tree.map(lambda x: 2 * x, tree), rtol=1e-6
    )
