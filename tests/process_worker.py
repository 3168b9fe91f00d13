# SPDX-License-Identifier: Apache-2.0
"""Training on a mesh over two processes, for `test_processes.py`.

    python -m tests.process_worker PORT RANK FOLDER

is one of two processes. XLA_FLAGS sets the number of its devices.
"""

import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from asgd_optax import asgd, averaged_params
from asgd_optax.checkpoints import average_checkpoints

PROCESSES = 2
DEVICES = 2  # per process
SAVED, STEPS = 4, 7
MERGED = (-0.75, 1.75)  # coefficients of the two checkpoints
SHAPES = {"first": (4, 8), "second": (8, 4), "bias": (8,)}
SPECS = {
    "first": PartitionSpec("data", "model"),
    "second": PartitionSpec("model", "data"),
    "bias": PartitionSpec("model"),
}
TX = optax.chain(
    optax.clip_by_global_norm(1.0), asgd(0.1, lambd=0.1, t0=1, compensated=True)
)


def mesh_of(shape):
    return Mesh(np.array(jax.devices()).reshape(shape), ("data", "model"))


def spread(values, mesh, spec):
    """Return a global array, of which each process holds its devices' shards."""
    sharding = NamedSharding(mesh, spec)
    return jax.make_array_from_callback(values.shape, sharding, values.__getitem__)


def batch(mesh, step):
    xy = np.random.default_rng((1, step)).standard_normal((2, 8, 4), np.float32)
    return [spread(values, mesh, PartitionSpec("data")) for values in xy]


def start(mesh):
    """Return params and state before the first step."""
    rng = np.random.default_rng(0)
    params = {
        name: spread(rng.standard_normal(shape, np.float32), mesh, SPECS[name])
        for name, shape in SHAPES.items()
    }
    return params, jax.jit(TX.init)(params)


def loss(params, x, y):
    hidden = jnp.tanh(x @ params["first"] + params["bias"])
    return jnp.mean((hidden @ params["second"] - y) ** 2)


def train(params, state, mesh, steps):
    shardings = jax.tree.map(lambda x: x.sharding, (params, state))

    def step(params, state, x, y):
        grads = jax.grad(loss)(params, x, y)
        updates, state = TX.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    step = jax.jit(step, donate_argnums=(0, 1), out_shardings=shardings)
    for n in steps:
        # One step at a time: the collectives of several can deadlock on the CPU.
        params, state = jax.block_until_ready(step(params, state, *batch(mesh, n)))
    return params, state


def save(folder, step, params, state):
    with ocp.CheckpointManager(folder) as manager:
        manager.save(step, args=ocp.args.StandardSave((params, state)))


def gathered(params, state):
    """Return params, state and average as NumPy arrays in every process."""
    everything = (params, state, averaged_params(state, params))
    return jax.tree.map(
        lambda x: multihost_utils.process_allgather(x, tiled=True), everything
    )


def write(path, values):
    if jax.process_index() == 0:
        np.savez(path, *jax.tree.leaves(values))


def merge(folder, mesh):
    """Average both checkpoints onto this mesh, and the params alone on the host."""
    paths = [folder / str(step) for step in (SAVED, STEPS)]
    like = jax.tree.map(ocp.tree.to_shape_dtype_struct, start(mesh))
    merged = average_checkpoints(paths, MERGED, like=like)
    for leaf, target in zip(*map(jax.tree.leaves, (merged, like)), strict=True):
        assert leaf.sharding == target.sharding
    params = average_checkpoints(paths, MERGED, part="0")
    assert all(type(leaf) is np.ndarray for leaf in jax.tree.leaves(params))
    merged = gathered(*merged)
    for name, leaf in merged[0].items():
        # The two sums have different precisions.
        np.testing.assert_allclose(params[name], leaf, rtol=1e-6)
    return merged


def main(port, rank, folder):
    """Train, save twice and average the two checkpoints."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", PROCESSES, int(rank))
    mesh, folder = mesh_of((PROCESSES, DEVICES)), pathlib.Path(folder)
    run = start(mesh)
    for first, last in ((0, SAVED), (SAVED, STEPS)):
        run = train(*run, mesh, range(first, last))
        save(folder / "checkpoints", last, *run)
        write(folder / f"{last}.npz", gathered(*run))
    write(folder / "merged.npz", merge(folder / "checkpoints", mesh))


if __name__ == "__main__":
    main(*sys.argv[1:])
