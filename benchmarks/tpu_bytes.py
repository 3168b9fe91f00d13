# SPDX-License-Identifier: Apache-2.0
"""Bytes that a compiled step moves on a TPU, and what an average on the host stages.

    python -m benchmarks.tpu_bytes

Needs `pip install "jax[tpu]"`, in an environment of its own, and no TPU: the step is
compiled ahead of time for each topology and is not run. The first table has one leaf
of half a gigabyte a chip; the second 32 leaves of 64 MiB, their average in host memory.
"""

from collections.abc import Sequence

import jax
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from asgd_optax import asgd, average_iterates, nt_asgd, track_random_scaling
from benchmarks import command_line, compilers

TOPOLOGIES = ("v4:2x2x1", "v5e:2x4", "v5p:2x2x1", "v6e:2x2")
DTYPES = ("float32", "bfloat16")
SIZE = 2**27  # parameters a chip

SGD = optax.sgd(0.1)
EVERY = optax.chain(SGD, average_iterates(every=10))
TRANSFORMATIONS = {
    "sgd": SGD,
    "asgd": asgd(),
    "asgd, compensated": asgd(compensated=True),
    "nt_asgd": nt_asgd(0.1),
    "sgd, average_iterates": optax.chain(SGD, average_iterates()),
    "sgd, average_iterates, compensated": optax.chain(
        SGD, average_iterates(compensated=True)
    ),
    "sgd, average_iterates, every=10": EVERY,
    "sgd, track_random_scaling": optax.chain(SGD, track_random_scaling()),
}
ON_HOST = {
    "asgd": asgd(),
    "asgd, compensated": asgd(compensated=True),
    "sgd, average_iterates, every=10": EVERY,
}
LEAVES = 32


def leaf(topology: str, dtype: str, size: int) -> jax.ShapeDtypeStruct:
    """A parameter sharded over all chips of a topology, `size` numbers on each."""
    chips = np.array(compilers.devices_of(topology))
    sharding = NamedSharding(Mesh(chips, ("chips",)), PartitionSpec("chips"))
    return jax.ShapeDtypeStruct((size * chips.size,), dtype, sharding=sharding)


def main(argv: Sequence[str] | None = None) -> None:
    """Prints both tables."""
    command_line.Parser("Bytes that a step moves on a TPU.").parse_args(argv)
    print(
        "| topology | params | transformation | bytes | between | temporary | kernels |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for topology in TOPOLOGIES:
        for dtype in DTYPES:
            params = leaf(topology, dtype, SIZE)
            for name, tx in TRANSFORMATIONS.items():
                state = compilers.state_like(tx, params)
                step = compilers.compile_step(tx, params, state)
                print(
                    f"| {topology} | {dtype} | {name} | {step.moved / SIZE:.2f} |"
                    f" {step.moved_between / SIZE:.2f} | {step.temporary / SIZE:.2f} |"
                    f" {step.kernels} |",
                    flush=True,
                )
    size = SIZE // 8
    print(
        "\n| topology | average on the host | its MiB | staged on the device | fetched"
        " and put away | between |"
    )
    print("| --- | --- | --- | --- | --- | --- |")
    for topology in TOPOLOGIES:
        leaves = [leaf(topology, "float32", size)] * LEAVES
        for name, tx in ON_HOST.items():
            state = compilers.state_like(tx, leaves, host=True)
            step = compilers.compile_step(tx, leaves, state)
            print(
                f"| {topology} | {name} | {step.host_arguments / 2**20:.0f} |"
                f" {step.temporary / 2**20:.0f} | {step.host_moved / 2**20:.0f} |"
                f" {step.host_moved_between / 2**20:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
