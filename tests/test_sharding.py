# SPDX-License-Identifier: Apache-2.0
"""Many devices give the numbers of one, and averaging moves no array between them."""

import functools
import operator
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from asgd_optax import averaged_params
from tests.support import bits, train_step
from tests.transformations import ROWS

if hasattr(jax, "shard_map"):
    shard_map = jax.shard_map
else:  # jax before 0.6
    from jax.experimental.shard_map import shard_map

# The kind of axes that `jax.make_mesh` makes since jax 0.9: operations on two arrays of
# different shardings are errors.
EXPLICIT = jax.sharding.AxisType.Explicit if hasattr(jax, "shard_map") else None
STEPS = 6
AXES = ("data", "model")
# The parameter "data" is bfloat16, the others float32. For parameters of one shape the
# partitioner of jax 0.5 would share a broadcast of the step size and one sharding.
SHAPES = {
    "data": (8, 6),
    "model": (6, 8),
    "both": (8, 4),
    "replicated": (3, 5),
}
SPECS = {
    "data": PartitionSpec("data"),
    "model": PartitionSpec(None, "model"),
    "both": PartitionSpec("data", "model"),
    "replicated": PartitionSpec(),
}
ALL = tuple(SPECS)
# Two are enough where all parameters have the same sharding.
FEW = ("data", "model")
# XLA contracts products and sums of the update or not, depending on the shape of the
# shard and the rest of the program.
ROUNDINGS = {"rtol": 1e-6, "atol": 1e-6}
COLLECTIVES = re.compile(
    r" (all-gather|all-reduce|all-to-all|collective-\w+|ragged-all-to-all|"
    r"reduce-scatter|send|recv)(-start)?\("
)

each_row = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)


def mesh_of(kind=None):
    devices = np.array(jax.devices()).reshape(4, 2)
    if kind is None:
        return Mesh(devices, AXES)
    return Mesh(devices, AXES, axis_types=(kind,) * len(AXES))


def tree(seed, names):
    """Return multiples of 1/2 from -2 to 2, whose sums are exact in bfloat16."""
    rng = np.random.default_rng(seed)
    return {
        name: jnp.asarray(
            rng.integers(-4, 5, SHAPES[name]) / 2,
            "bfloat16" if name == "data" else "float32",
        )
        for name in names
    }


def gradients(names):
    return [tree((1, n), names) for n in range(STEPS)]


def noise_of(devices):
    """Return a multiple of 1/2 per device, with sum zero."""
    half = np.arange(1, devices // 2 + 1) / 2
    return jnp.asarray([*half, *-half])


def sharded(values, mesh):
    return {
        name: jax.device_put(x, NamedSharding(mesh, SPECS[name]))
        for name, x in values.items()
    }


def settled(values):
    """Wait for a step: the collectives of several at once can deadlock on the CPU."""
    return jax.block_until_ready(values)


@functools.cache
def on_one_device(row_name, names):
    """Return params, state and average of the same training on one device."""
    (row,) = (row for row in ROWS if row.name == row_name)
    tx, params = row.make(), tree(0, names)
    state = tx.init(params)
    for g in gradients(names):
        params, state = train_step(tx, params, state, g)
    assert bits(averaged_params(state, params)) != bits(params)
    return params, state, averaged_params(state)


def parameter_of(path, x):
    """Return the name of the parameter that a leaf of a state belongs to, or None."""
    name = getattr(path[-1], "key", None) if path else None
    return name if name in SHAPES and np.shape(x)[-2:] == SHAPES[name] else None


def arrays(values):
    """Return the leaves that belong to parameters."""
    pairs = jax.tree_util.tree_leaves_with_path(values)
    return [x for path, x in pairs if parameter_of(path, x)]


def assert_sharded_as_params(values, params):
    found = 0
    for path, x in jax.tree_util.tree_leaves_with_path(values):
        if name := parameter_of(path, x):
            assert x.sharding.is_equivalent_to(params[name].sharding, x.ndim), path
            found += 1
    assert found >= len(params)


def test_search_for_collectives_finds_one():
    mesh = mesh_of()
    x = jax.device_put(jnp.ones(8), NamedSharding(mesh, SPECS["data"]))
    for moved in (lambda x: x.sum(), lambda x: x):
        step = jax.jit(moved, out_shardings=NamedSharding(mesh, PartitionSpec()))
        assert COLLECTIVES.search(step.lower(x).compile().as_text())


@each_row
def test_jit_over_a_mesh_keeps_shardings_without_collectives(row):
    tx, mesh = row.make(), mesh_of()
    params = sharded(tree(0, ALL), mesh)
    state, eager = jax.jit(tx.init)(params), tx.init(params)
    assert bits(state) == bits(eager)
    assert_sharded_as_params(eager, params)
    step = jax.jit(functools.partial(train_step, tx), donate_argnums=(0, 1))
    # A program that is compiled ahead of time accepts no other shardings.
    step = step.lower(params, state, params).compile()
    assert not COLLECTIVES.search(step.as_text())
    for values in gradients(ALL):
        assert_sharded_as_params(state, params)
        old, g = arrays((params, state)), sharded(values, mesh)
        params, state = step(params, state, g)
        assert all(x.is_deleted() for x in old)
        assert_sharded_as_params(params, g)
    assert_sharded_as_params(state, params)

    def read(state, params):
        return averaged_params(state), averaged_params(state, params)

    for average in (*read(state, params), *jax.jit(read)(state, params)):
        assert_sharded_as_params(average, params)
    everything = (params, state, averaged_params(state))
    chex.assert_trees_all_close(everything, on_one_device(row.name, ALL), **ROUNDINGS)


if EXPLICIT:

    @each_row
    def test_explicit_axes_keep_shardings(row):
        """Shardings are part of the types, so tracing is enough to check them."""
        tx = row.make()
        params = sharded(tree(0, ALL), mesh_of(kind=EXPLICIT))
        assert_sharded_as_params(tx.init(params), params)
        params = jax.eval_shape(lambda x: x, params)
        state = jax.eval_shape(tx.init, params)
        assert_sharded_as_params(state, params)
        new = jax.eval_shape(functools.partial(train_step, tx), params, state, params)
        assert_sharded_as_params(new, params)
        average = jax.eval_shape(averaged_params, state, params)
        assert_sharded_as_params(average, params)


TXS = {row.name: row.make() for row in ROWS}


def init_every_row(params):
    return {name: tx.init(params[name]) for name, tx in TXS.items()}


def step_every_row(axis, params, state, g, noise):
    """Return params and state after a step on gradients averaged over an axis."""
    g = jax.tree.map(lambda x: x + noise.astype(x.dtype), g)
    g = jax.lax.pmean(g, axis)
    new = {n: train_step(tx, params[n], state[n], g) for n, tx in TXS.items()}
    return tuple({n: pair[i] for n, pair in new.items()} for i in (0, 1))


def average_every_row(state):
    return {name: averaged_params(state[name]) for name in TXS}


def assert_equal_to_one_device(params, state, average):
    for name in TXS:
        found = params[name], state[name], average[name]
        chex.assert_trees_all_close(found, on_one_device(name, FEW), **ROUNDINGS)


def test_pmap_keeps_replicas_bitwise_equal():
    devices = jax.device_count()
    step = jax.pmap(
        functools.partial(step_every_row, "replicas"),
        axis_name="replicas",
        donate_argnums=(0, 1),
    )

    def replicated(values):
        return jax.tree.map(lambda x: jnp.stack([x] * devices), values)

    one_per_device = jax.pmap(lambda x: x)
    params = {name: one_per_device(replicated(tree(0, FEW))) for name in TXS}
    state = jax.pmap(init_every_row)(params)
    for g in gradients(FEW):
        old = arrays((params, state))
        params, state = settled(step(params, state, replicated(g), noise_of(devices)))
        assert all(x.is_deleted() for x in old)
    average = jax.pmap(average_every_row)(state)
    for name in TXS:
        assert_sharded_as_params((state[name], average[name]), params[name])
    everything = jax.tree.map(np.asarray, (params, state, average))
    first, *others = (
        jax.tree.map(operator.itemgetter(replica), everything)
        for replica in range(devices)
    )
    assert all(bits(other) == bits(first) for other in others)
    assert_equal_to_one_device(*first)


def test_shard_map_equals_one_device():
    """Params are split over one axis of the mesh, the batch over the other."""
    mesh, split = mesh_of(), PartitionSpec(None, "model")

    def specs(values):
        return jax.tree_util.tree_map_with_path(
            lambda path, x: split if parameter_of(path, x) else PartitionSpec(), values
        )

    def over_the_mesh(f, inputs, outputs):
        return jax.jit(shard_map(f, mesh=mesh, in_specs=inputs, out_specs=outputs))

    params = jax.device_put(tree(0, FEW), NamedSharding(mesh, split))
    params = dict.fromkeys(TXS, params)
    both = specs((params, jax.eval_shape(init_every_row, params)))
    step = over_the_mesh(
        lambda params, state, g, noise: step_every_row(
            "data", params, state, g, noise[0]
        ),
        (*both, dict.fromkeys(FEW, split), PartitionSpec("data")),
        both,
    )
    state = over_the_mesh(init_every_row, both[:1], both[1])(params)
    for g in gradients(FEW):
        params, state = settled(step(params, state, g, noise_of(mesh.shape["data"])))
        assert_sharded_as_params(state, params["asgd"])
    average = over_the_mesh(average_every_row, both[1:], both[0])(state)
    assert_sharded_as_params(average, params["asgd"])
    for leaf in arrays(params):
        assert leaf.sharding.is_equivalent_to(NamedSharding(mesh, split), 2)
    assert_equal_to_one_device(params, state, average)
