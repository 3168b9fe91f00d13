# SPDX-License-Identifier: Apache-2.0
"""A training on any mesh of any number of processes, for `test_processes.py`.

    python -m tests.process_worker PORT RANK FOLDER train|hang

is one of two processes, each of which has the devices that XLA_FLAGS gives it.
"""

import pathlib
import sys
import time

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
DEVICES = 2  # of each
SAVED, STEPS = 4, 7
MERGED = (-0.75, 1.75)  # how much of what one has saved, and of what two have
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
    """The array, of which each process has its own devices' part."""
    sharding = NamedSharding(mesh, spec)
    return jax.make_array_from_callback(values.shape, sharding, values.__getitem__)


def batch(mesh, step):
    x, y = np.random.default_rng((1, step)).standard_normal((2, 8, 4), np.float32)
    return spread(x, mesh, PartitionSpec("data")), spread(
        y, mesh, PartitionSpec("data")
    )


def start(mesh):
    """Params and state before the first step."""
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
        # One step at a time: the collectives of several can lock the CPU's threads.
        params, state = jax.block_until_ready(step(params, state, *batch(mesh, n)))
    return params, state


def save(folder, step, params, state):
    with ocp.CheckpointManager(folder) as manager:
        manager.save(step, args=ocp.args.StandardSave((params, state)))


def restore(folder, mesh):
    """The newest step that was saved, and what, in the layout of this mesh."""
    abstract = jax.tree.map(ocp.tree.to_shape_dtype_struct, start(mesh))
    with ocp.CheckpointManager(folder) as manager:
        step = manager.latest_step()
        return step, manager.restore(step, args=ocp.args.StandardRestore(abstract))


def gathered(params, state):
    """Params, state and average as NumPy arrays, in every process."""
    everything = (params, state, averaged_params(state, params))
    return jax.tree.map(
        lambda x: multihost_utils.process_allgather(x, tiled=True), everything
    )


def write(path, values):
    if jax.process_index() == 0:
        np.savez(path, *jax.tree.leaves(values))


def merge(folder, mesh):
    """What both have saved, averaged onto this mesh; and the params alone, on hosts."""
    paths = [folder / name / str(SAVED) for name in ("of_one", "of_two")]
    like = jax.tree.map(ocp.tree.to_shape_dtype_struct, start(mesh))
    merged = average_checkpoints(paths, MERGED, like=like)
    for leaf, target in zip(*map(jax.tree.leaves, (merged, like)), strict=True):
        assert leaf.sharding == target.sharding
    params = average_checkpoints(paths, MERGED, part="0")
    assert all(type(leaf) is np.ndarray for leaf in jax.tree.leaves(params))
    for name, leaf in gathered(*merged)[0].items():
        # The sums are made in another precision.
        np.testing.assert_allclose(params[name], leaf, rtol=1e-6)
    return merged


def train_and_exchange(folder, mesh):
    """Trains and saves in the middle; goes on from what one process has saved."""
    params, state = train(*start(mesh), mesh, range(SAVED))
    write(folder / "at_save.npz", gathered(params, state))
    save(folder / "of_two", SAVED, params, state)
    params, state = train(params, state, mesh, range(SAVED, STEPS))
    write(folder / "trained.npz", gathered(params, state))
    write(folder / "merged.npz", gathered(*merge(folder, mesh)))
    _, (params, state) = restore(folder / "of_one", mesh)
    write(folder / "restored.npz", gathered(params, state))
    params, state = train(params, state, mesh, range(SAVED, STEPS))
    write(folder / "resumed.npz", gathered(params, state))


class Hanging(ocp.type_handlers.ArrayHandler):
    """Begins to write and never ends."""

    def __init__(self, announcement):
        super().__init__()
        self._announcement = announcement

    async def serialize(self, *args, **kwargs):
        await super().serialize(*args, **kwargs)
        self._announcement.touch()
        time.sleep(600)


def hang_in_a_save(folder, mesh):
    """Saves twice; of the second save one process does not do its part."""
    params, state = train(*start(mesh), mesh, range(SAVED))
    save(folder / "of_two", SAVED, params, state)
    params, state = train(params, state, mesh, range(SAVED, STEPS))
    if jax.process_index() == 1:
        ocp.type_handlers.register_type_handler(
            jax.Array, Hanging(folder / "saving"), override=True
        )
    save(folder / "of_two", STEPS, params, state)
    (folder / "saved").touch()


def main(port, rank, folder, job):
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", PROCESSES, int(rank))
    mesh = mesh_of((PROCESSES, DEVICES))
    jobs = {"train": train_and_exchange, "hang": hang_in_a_save}
    jobs[job](pathlib.Path(folder), mesh)


if __name__ == "__main__":
    main(*sys.argv[1:])
