# SPDX-License-Identifier: Apache-2.0
"""The TPU compiler without a TPU: what a compiled step would move and allocate.

Needs `pip install "jax[tpu]"` and nothing else; programs are compiled ahead of time
for a topology named as in "v6e:16x16" and never run. To be imported before anything
has used a device.
"""

import collections
import importlib.util
import math
import os
import re
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec, Sharding

# Jax must not take hold of a TPU where there is one, and the compiler not ask the
# cloud what machine it is on.
jax.config.update("jax_platforms", os.environ.get("JAX_PLATFORMS", "cpu"))
os.environ.update(
    {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        **os.environ,
    }
)

# The memory spaces of a compiled program's layouts.
SPACES = {0: "device", 1: "vector", 5: "host"}

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)


class Step(NamedTuple):
    """What the compiler says of one step, per chip; sizes in bytes.

    Attributes:
      accessed: bytes accessed by the compiler's own count, which takes a byte
        that is prefetched into vector memory several times over.
      moved: bytes read from and written to device memory, where there are branches
        in the most expensive one.
      moved_between: the same in the cheapest branch, as between averaged steps.
      host_moved: bytes read from and written to host memory, in the most expensive
        branch.
      host_moved_between: the same in the cheapest branch.
      temporary: device memory allocated besides arguments and results.
      host_arguments: of the arguments, those in host memory.
      peak: device memory at its fullest.
      kernels: fused kernels, the most expensive branch's among them.
      collectives: names of the collectives, sorted.
      seconds: time that the compilation took.
    """

    accessed: int
    moved: int
    moved_between: int
    host_moved: int
    host_moved_between: int
    temporary: int
    host_arguments: int
    peak: int
    kernels: int
    collectives: list[str]
    seconds: float


def installed() -> bool:
    """Whether there is a TPU compiler."""
    return importlib.util.find_spec("libtpu") is not None


def devices_of(topology: str) -> list[jax.Device]:
    """The chips of a topology.

    Raises:
      RuntimeError: no TPU compiler, or a topology it does not know.
    """
    return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices


def state_like(
    tx: optax.GradientTransformation, params: optax.Params, host: bool = False
) -> optax.OptState:
    """The state of `tx`, each array of a parameter's shape sharded as the parameter.

    Args:
      tx: a gradient transformation.
      params: pytree of `jax.ShapeDtypeStruct`s with shardings over one mesh.
      host: whether those arrays lie in host memory.
    """
    mesh = jax.tree.leaves(params)[0].sharding.mesh
    kind = "pinned_host" if host else "device"

    def place(x: jax.ShapeDtypeStruct, sharding: Sharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return optax.tree_map_params(
        tx,
        lambda x, p: place(x, p.sharding.with_memory_kind(kind)),
        jax.eval_shape(tx.init, params),
        params,
        transform_non_params=lambda x: place(x, NamedSharding(mesh, PartitionSpec())),
    )


def compile_step(
    tx: optax.GradientTransformation, params: optax.Params, state: optax.OptState
) -> Step:
    """Compiles the update and its application, params and state donated.

    Args:
      tx: a gradient transformation.
      params: pytree of `jax.ShapeDtypeStruct`s with shardings over one mesh.
      state: its state, as `state_like` makes it.
    """

    def step(
        params: optax.Params, state: optax.OptState, grads: optax.Updates
    ) -> tuple[optax.Params, optax.OptState]:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    start = time.perf_counter()
    lowered = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, params)
    compiled: Any = lowered.compile()  # of which the TPU's compiler tells everything
    seconds = time.perf_counter() - start
    text, memory = compiled.as_text(), compiled.memory_analysis()
    moved, between = traffic(text), traffic(text, branch=min)
    return Step(
        accessed=int(compiled.cost_analysis()["bytes accessed"]),
        moved=moved["device"],
        moved_between=between["device"],
        host_moved=moved["host"],
        host_moved_between=between["host"],
        temporary=memory.temp_size_in_bytes,
        host_arguments=memory.host_argument_size_in_bytes,
        peak=memory.peak_memory_in_bytes,
        kernels=moved["kernels"],
        collectives=[name for name in COLLECTIVES if f" {name}" in text],
        seconds=seconds,
    )


def traffic(text: str, branch: Callable[..., Any] = max) -> collections.Counter[str]:
    """Bytes that a compiled program reads and writes by memory space, and "kernels".

    An instruction reads its operands and writes its results, each once; of a copy
    or a slice that runs beside the others, as much is read as written.

    Args:
      text: the optimized program, as `Compiled.as_text()` gives it.
      branch: `max` or `min`, the branch to count by its traffic.

    Raises:
      ValueError: the program has a loop.
    """
    computations: dict[str, list[re.Match[str]]] = {}
    for line in text.splitlines():
        if header := _COMPUTATION.match(line):
            computations[header[2]] = instructions = []
            if header[1]:
                entry = header[2]
        elif computations and (instruction := _INSTRUCTION.match(line)):
            instructions.append(instruction)

    def count(computation: str) -> collections.Counter[str]:
        moved: collections.Counter[str] = collections.Counter()
        arrays: dict[str, list[tuple[int, str]]] = {}
        for name, results, operation, rest in (
            instruction.groups() for instruction in computations[computation]
        ):
            arrays[name] = _arrays(results)
            operands, _, attributes = rest.partition("), ")
            if operation in _MOVES_NOTHING:
                continue
            if operation == "conditional":
                names = attributes.partition("branch_computations={")[2]
                branches = map(count, _NAME.findall(names.partition("}")[0]))
                moved += branch(branches, key=lambda c: c["device"] + c["host"])
            elif operation in ("while", "call"):
                raise ValueError(f"cannot count the bytes of a {operation}")
            elif operation in ("copy-start", "slice-start"):
                # Source and target, in either order; a slice's source is the whole.
                (one, here), (other, there) = arrays[name][:2]
                moved[here] += min(one, other)
                moved[there] += min(one, other)
            else:
                moved["kernels"] += operation == "fusion"
                for operand in _NAME.findall(operands):
                    for size, space in arrays[operand]:
                        moved[space] += size
                for size, space in arrays[name]:
                    moved[space] += size
        return moved

    return count(entry)


_MOVES_NOTHING = {
    "bitcast",
    "constant",
    "copy-done",
    "get-tuple-element",
    "parameter",
    "slice-done",
    "tuple",
}
# A computation's header, with its name; an instruction's name, its results, its
# operation, and its operands with what follows them.
_COMPUTATION = re.compile(r"(ENTRY )?%(\S+) \(.*\{$")
_INSTRUCTION = re.compile(
    r"  (?:ROOT )?%(\S+) = (\(.*?\)(?= [a-z])|\S+) ([\w-]+)\((.*)"
)
_NAME = re.compile(r"%([\w.-]+)")
_ARRAY = re.compile(r"\b(?:pred|[a-z]+(\d+))\[([\d,]*)\](?:\{([^}]*)\})?")


def _arrays(results: str) -> list[tuple[int, str]]:
    """The size in bytes and the memory space of each array among results."""
    arrays = []
    for bits, shape, layout in _ARRAY.findall(results):
        elements = math.prod(int(n) for n in shape.split(",") if n)
        space = re.search(r"S\((\d+)\)", layout)
        number = int(space[1]) if space else 0
        size = elements * int(bits or 8) // 8
        arrays.append((size, SPACES.get(number, "other")))
    return arrays
