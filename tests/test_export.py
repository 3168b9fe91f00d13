# SPDX-License-Identifier: Apache-2.0
"""An exported and serialized train step gives the same bits in another process."""

import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import export

from tests import export_worker
from tests.support import bits, random_tree, train_step
from tests.transformations import ROWS

# Steps before the export, where no row averages yet, and after it.
STEPS, MORE = 1, 5


def loss(params, x):
    leaves = [leaf.astype("float32") for leaf in jax.tree.leaves(params)]
    return sum(jnp.sum(jnp.sin(x * leaf)) for leaf in leaves)


def test_exported_step_resumes_bitwise_in_another_process(tmp_path):
    """One program for all rows and three platforms, without asgd_optax or optax."""
    chain = functools.partial(optax.chain, optax.clip_by_global_norm(1.0))
    txs = {row.name: chain(row.make()) for row in ROWS}
    params = {d: random_tree(0, d)["a"]["matrix"] for d in ("bfloat16", "float32")}
    runs = {name: (params, tx.init(params)) for name, tx in txs.items()}
    leaves, structure = jax.tree.flatten(runs)

    @jax.jit
    def step(leaves, x):
        runs = jax.tree.unflatten(structure, leaves)
        for name, (params, state) in runs.items():
            grads = jax.grad(loss)(params, x)
            runs[name] = train_step(txs[name], params, state, grads)
        return jax.tree.leaves(runs)

    data = np.linspace(0.5, 2.0, STEPS + MORE, dtype="float32")
    for x in data[:STEPS]:
        leaves = step(leaves, x)
    exported = export.export(step, platforms=["cpu", "cuda", "tpu"])(leaves, data[0])
    (tmp_path / "program").write_bytes(exported.serialize())
    np.savez(tmp_path / "given.npz", *leaves, data[STEPS:])
    for x in data[STEPS:]:
        leaves = step(leaves, x)

    worker = [sys.executable, export_worker.__file__, tmp_path]
    subprocess.run(worker, check=True, timeout=120)
    with np.load(tmp_path / "result.npz") as arrays:
        found = jax.tree.unflatten(structure, arrays.values())
    for name, run in jax.tree.unflatten(structure, leaves).items():
        assert bytes_of(found[name]) == bytes_of(run), name


def bytes_of(tree):
    return [data for _, _, data in bits(tree)]
