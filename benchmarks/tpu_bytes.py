# SPDX-License-Identifier: Apache-2.0
r"""Bytes that a compiled step moves on a TPU, by the TPU compiler's own count.

    JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 TPU_WORKER_HOSTNAMES=localhost \
    TPU_ACCELERATOR_TYPE=v5litepod-4 python benchmarks/tpu_bytes.py

Needs `pip install "jax[tpu]"`, in an environment of its own, and no TPU: the step is
compiled ahead of time for each topology, with one leaf of 2**27 parameters a chip, and
is not run. A smaller leaf may be prefetched, and its bytes counted twice.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from asgd_optax import asgd, average_iterates

TOPOLOGIES = ("v4:2x2x1", "v5e:2x4", "v5p:2x2x1", "v6e:2x2")
SIZE = 2**27  # parameters a chip

SGD = optax.sgd(0.1)
TRANSFORMATIONS = {
    "sgd": SGD,
    "asgd": asgd(),
    "asgd, compensated": asgd(compensated=True),
    "sgd, average_iterates": optax.chain(SGD, average_iterates()),
    "sgd, average_iterates, compensated": optax.chain(
        SGD, average_iterates(compensated=True)
    ),
    # The count holds the branch that averages and the one that does not.
    "sgd, average_iterates, every=10": optax.chain(SGD, average_iterates(every=10)),
}


def compile_step(tx: Any, mesh: Mesh, dtype: Any) -> Any:
    """The donated update of one leaf, sharded over the whole mesh."""
    sharded = NamedSharding(mesh, PartitionSpec("chips"))
    replicated = NamedSharding(mesh, PartitionSpec())
    shape = (SIZE * mesh.size,)
    params = jax.ShapeDtypeStruct(shape, dtype, sharding=sharded)
    state = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=sharded if x.shape == shape else replicated
        ),
        jax.eval_shape(tx.init, params),
    )

    def step(params: Any, state: Any, grads: Any) -> Any:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return jax.jit(step, donate_argnums=(0, 1)).lower(params, state, params).compile()


def main() -> None:
    print("| topology | params | transformation | bytes | temporary | fusions |")
    print("| --- | --- | --- | --- | --- | --- |")
    for topology in TOPOLOGIES:
        chips = topologies.get_topology_desc(platform="tpu", topology_name=topology)
        mesh = Mesh(np.array(chips.devices), ("chips",))
        for dtype in (jnp.float32, jnp.bfloat16):
            for name, tx in TRANSFORMATIONS.items():
                compiled = compile_step(tx, mesh, dtype)
                text = compiled.as_text()
                fusions = text[text.index("ENTRY") :].count(" fusion(")
                moved = compiled.cost_analysis()["bytes accessed"] / SIZE
                temporary = compiled.memory_analysis().temp_size_in_bytes / SIZE
                print(
                    f"| {topology} | {dtype.__name__} | {name} | {moved:.2f} |"
                    f" {temporary:.2f} | {fusions} |"
                )


if __name__ == "__main__":
    main()
