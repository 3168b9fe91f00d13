# SPDX-License-Identifier: Apache-2.0
"""Many devices: the numbers of one, no array moved that training does not move."""

import functools
import operator
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from asgd_optax import asgd, averaged_params
from tests.support import bits, train_step
from tests.transformations import ROWS

if hasattr(jax, "shard_map"):
    shard_map = jax.shard_map
else:  # jax before 0.6
    from jax.experimental.shard_map import shard_map

# Axes on which an operation on two arrays of different shardings is an error; those of
# `jax.make_mesh` are, since jax 0.9.
EXPLICIT = jax.sharding.AxisType.Explicit if hasattr(jax, "shard_map") else None
STEPS = 6
AXES = ("data", "model")
# Of each parameter; that of "data" is bfloat16. The shapes differ,
# or the partitioner of jax 0.5 would make one broadcast of the step size for all, and
# spread them all as the most divided one.
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
# Where all parameters are spread alike, two will do.
FEW = ("data", "model")
# Whether XLA contracts a product and a sum of the update into one rounding depends on
# the shape of the piece and on what is compiled along with it.
ROUNDINGS = {"rtol": 1e-6, "atol": 1e-6}
COLLECTIVES = re.compile(
    r" (all-gather|all-reduce|all-to-all|collective-\w+|ragged-all-to-all|"
    r"reduce-scatter|send|recv)(-start)?\("
)

each_row = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)


def mesh_of(shape=(4, 2), kind=None):
    devices = np.array(jax.devices()[: np.prod(shape)]).reshape(shape)
    if kind is None:
        return Mesh(devices, AXES)
    return Mesh(devices, AXES, axis_types=(kind,) * len(AXES))


def tree(seed, names):
    """Halves, from -2 to 2: sums of a few are exact in bfloat16, in any order."""
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
    """One number a device: halves, their sum zero."""
    half = np.arange(1, devices // 2 + 1) / 2
    return jnp.asarray([*half, *-half])


def sharded(values, mesh):
    return {
        name: jax.device_put(x, NamedSharding(mesh, SPECS[name]))
        for name, x in values.items()
    }


def settled(values):
    """After a step with collectives: of several at once, the CPU's threads may lock."""
    return jax.block_until_ready(values)


@functools.cache
def on_one_device(row_name, names):
    """The params, the state and the average of the training that the tests spread."""
    (row,) = (row for row in ROWS if row.name == row_name)
    tx, params = row.make(), tree(0, names)
    state = tx.init(params)
    for g in gradients(names):
        params, state = train_step(tx, params, state, g)
    assert bits(averaged_params(state, params)) != bits(params)
    return params, state, averaged_params(state)


def parameter_of(path, x):
    """The parameter that a leaf of a state belongs to; None where to no one."""
    name = getattr(path[-1], "key", None) if path else None
    return name if name in SHAPES and np.shape(x)[-2:] == SHAPES[name] else None


def arrays(values):
    """The leaves that belong to parameters."""
    pairs = jax.tree_util.tree_leaves_with_path(values)
    return [x for path, x in pairs if parameter_of(path, x)]


def assert_sharded_as_params(values, params):
    found = 0
    for path, x in jax.tree_util.tree_leaves_with_path(values):
        if name := parameter_of(path, x):
            assert x.sharding.is_equivalent_to(params[name].sharding, x.ndim), path
            found += 1
    assert found >= len(params)


def test_the_search_finds_a_collective():
    mesh = mesh_of()
    x = jax.device_put(jnp.ones(8), NamedSharding(mesh, SPECS["data"]))
    for moved in (lambda x: x.sum(), lambda x: x):
        step = jax.jit(moved, out_shardings=NamedSharding(mesh, PartitionSpec()))
        assert COLLECTIVES.search(step.lower(x).compile().as_text())


@each_row
def test_jit_over_a_mesh(row):
    tx, mesh = row.make(), mesh_of()
    params = sharded(tree(0, ALL), mesh)
    state, eager = jax.jit(tx.init)(params), tx.init(params)
    assert bits(state) == bits(eager)
    assert_sharded_as_params(eager, params)
    step = jax.jit(functools.partial(train_step, tx), donate_argnums=(0, 1))
    # What is compiled ahead of time takes no other shardings than these.
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
    def test_explicit_axes(row):
        """Shardings are part of the types: to trace is to see them through."""
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


one_a_device = jax.pmap(lambda x: x)


@each_row
def test_pmap(row):
    """Replicas that average their gradients stay the same, bit for bit."""
    tx, devices = row.make(), jax.device_count()

    @functools.partial(jax.pmap, axis_name="replicas", donate_argnums=(0, 1))
    def step(params, state, g, noise):
        g = jax.tree.map(lambda x: x + noise.astype(x.dtype), g)
        return train_step(tx, params, state, jax.lax.pmean(g, "replicas"))

    def replicated(values):
        return jax.tree.map(lambda x: jnp.stack([x] * devices), values)

    params = one_a_device(replicated(tree(0, FEW)))
    state = jax.pmap(tx.init)(params)
    for g in gradients(FEW):
        old = arrays((params, state))
        params, state = settled(step(params, state, replicated(g), noise_of(devices)))
        assert all(x.is_deleted() for x in old)
    average = jax.pmap(averaged_params)(state, params)
    assert_sharded_as_params((state, average), params)
    everything = jax.tree.map(np.asarray, (params, state, averaged_params(state)))
    first, *others = (
        jax.tree.map(operator.itemgetter(replica), everything)
        for replica in range(devices)
    )
    assert all(bits(other) == bits(first) for other in others)
    chex.assert_trees_all_close(first, on_one_device(row.name, FEW), **ROUNDINGS)


@each_row
def test_shard_map(row):
    """Params split over one axis of the mesh, the batch over the other."""
    tx, mesh, split = row.make(), mesh_of(), PartitionSpec(None, "model")

    def specs(values):
        return jax.tree_util.tree_map_with_path(
            lambda path, x: split if parameter_of(path, x) else PartitionSpec(), values
        )

    def step(params, state, g, noise):
        g = jax.tree.map(lambda x: x + noise[0].astype(x.dtype), g)
        return train_step(tx, params, state, jax.lax.pmean(g, "data"))

    def over_the_mesh(f, inputs, outputs):
        return jax.jit(shard_map(f, mesh=mesh, in_specs=inputs, out_specs=outputs))

    params = jax.device_put(tree(0, FEW), NamedSharding(mesh, split))
    both = specs((params, jax.eval_shape(tx.init, params)))
    step = over_the_mesh(step, (*both, both[0], PartitionSpec("data")), both)
    state = over_the_mesh(tx.init, both[:1], both[1])(params)
    for g in gradients(FEW):
        params, state = settled(step(params, state, g, noise_of(mesh.shape["data"])))
        assert_sharded_as_params(state, params)
    average = over_the_mesh(averaged_params, both[1:], both[0])(state)
    assert_sharded_as_params(average, params)
    assert params["data"].sharding.is_equivalent_to(NamedSharding(mesh, split), 2)
    chex.assert_trees_all_close(
        (params, state, average), on_one_device(row.name, FEW), **ROUNDINGS
    )


# The errors of many devices are JAX's own: it raises them before it computes, and
# before it takes what is donated.


def on_two_meshes(shape, kind=None):
    """`asgd`'s params on eight devices, its state on a mesh of another shape."""
    tx, params = asgd(0.25, t0=0), tree(0, ALL)
    state = jax.jit(tx.init)(sharded(params, mesh_of(shape, kind)))
    return tx, sharded(params, mesh_of(kind=kind)), state


REFUSED = [(None, (2, 2))]
if EXPLICIT:
    REFUSED += [(EXPLICIT, (2, 2)), (EXPLICIT, (2, 4))]


@pytest.mark.parametrize(("kind", "shape"), REFUSED)
@pytest.mark.parametrize("compiled", [False, True])
def test_params_and_state_on_two_meshes(kind, shape, compiled):
    tx, params, state = on_two_meshes(shape, kind)
    grads = sharded(tree(1, ALL), mesh_of(kind=kind))
    step, before = functools.partial(train_step, tx), bits((params, state))
    if compiled:
        step = jax.jit(step, donate_argnums=(0, 1))
    # Either lists both lots of devices, or both meshes.
    with pytest.raises(ValueError, match="incompatible devices|Mesh for all inputs"):
        step(params, state, grads)
    assert bits((params, state)) == before


def test_params_and_state_in_two_layouts():
    """On the same devices, with axes that are not explicit, JAX moves the arrays."""
    tx, params, state = on_two_meshes((2, 4))
    step = jax.jit(functools.partial(train_step, tx))
    grads = sharded(tree(1, ALL), mesh_of())
    expected = step(params, jax.jit(tx.init)(params), grads)
    chex.assert_trees_all_close(step(params, state, grads), expected, **ROUNDINGS)


@pytest.mark.parametrize("how", ["pmap", "jit"])
def test_a_batch_that_the_devices_do_not_divide(how):
    tx = asgd(0.25, t0=0)

    def step(params, state, batch):
        grads = jax.tree.map(lambda p: p * batch.mean().astype(p.dtype), params)
        return train_step(tx, params, state, grads)

    params, batch = tree(0, ALL), np.ones((12, 3))
    if how == "pmap":
        params = jax.tree.map(lambda x: jnp.stack([x] * 8), params)
        state = jax.pmap(tx.init)(params)
        step = jax.pmap(step, donate_argnums=(0, 1))
    else:
        params = sharded(params, mesh_of())
        state = jax.jit(tx.init)(params)
        split = NamedSharding(mesh_of(), PartitionSpec(AXES))
        step = jax.jit(step, in_shardings=(None, None, split), donate_argnums=(0, 1))
    before = bits((params, state))
    with pytest.raises(ValueError, match=r"(?s)\b8\b.*\b12\b"):
        step(params, state, batch)
    assert bits((params, state)) == before
