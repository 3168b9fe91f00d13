# SPDX-License-Identifier: Apache-2.0
"""The compilers of TPUs and GPUs without either: what a step would move and allocate.

Needs `pip install "jax[tpu]"` or `pip install "jax[cuda12-local]"` and nothing else, no
device, no driver and no CUDA. Programs are compiled ahead of time and never run, for a
target named as in "v6e:16x16", a TPU's topology, or "H100:8", GPUs of one node. To be
imported before anything has used a device.
"""

import collections
import functools
import importlib.util
import math
import os
import pathlib
import re
import tempfile
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

# Jax must not take hold of a device where there is one, and the TPU's compiler not ask
# the cloud what machine it is on.
jax.config.update("jax_platforms", os.environ.get("JAX_PLATFORMS", "cpu"))
os.environ.update(
    {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        **os.environ,
    }
)

# What the GPU's compiler is told of one, in fields of XLA's `GpuTargetConfigProto`; the
# figures are those of NVIDIA's A100-SXM4-80GB and H100 SXM.
GPUS = {
    "A100": "cuda_compute_capability { major: 8 } core_count: 108 fpus_per_core: 64"
    " clock_rate_ghz: 1.41 memory_bandwidth: 2039040000000 l2_cache_size: 41943040"
    " device_memory_size: 85100068864 shared_memory_per_core: 167936"
    " shared_memory_per_block_optin: 166912",
    "H100": "cuda_compute_capability { major: 9 } core_count: 132 fpus_per_core: 128"
    " clock_rate_ghz: 1.98 memory_bandwidth: 3352320000000 l2_cache_size: 52428800"
    " device_memory_size: 84942979072 shared_memory_per_core: 233472"
    " shared_memory_per_block_optin: 232448",
}
_OF_ALL_GPUS = (
    "threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048"
    " block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535"
    " shared_memory_per_block: 49152 registers_per_core_limit: 65536"
    " registers_per_block_limit: 65536"
)
_SOFTWARE = (
    'platform_name: "CUDA" dnn_version_info { major: 9 minor: 10 }'
    " runtime_version { major: 12 minor: 9 }"
)

# The memory spaces of a compiled program's layouts.
SPACES = {0: "device", 1: "vector", 5: "host"}

SMALL = 256  # bytes: arrays below are not counted

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
    """What the compiler says of one step, per device; sizes in bytes.

    Attributes:
      accessed: bytes accessed by the TPU compiler's own count, which takes a byte
        that is prefetched into vector memory several times over; the GPU's has none,
        and 0 stands for it.
      moved: bytes read from and written to device memory, where there are branches
        in the most expensive one.
      moved_between: the same in the cheapest branch, as between averaged steps.
      host_moved: bytes read from and written to host memory, in the most expensive
        branch.
      host_moved_between: the same in the cheapest branch.
      temporary: device memory allocated besides arguments and results.
      host_arguments: of the arguments, those in host memory.
      peak: device memory at its fullest.
      kernels: fused kernels, small ones apart, the most expensive branch's among them.
      collectives: names of the collectives, sorted.
      ptx: what those kernels are in a GPU's assembler, by their names.
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
    ptx: dict[str, str]
    seconds: float


def installed(platform: str) -> bool:
    """Whether there is a compiler for "tpu" or for "gpu"."""
    modules = {"tpu": ["libtpu"], "gpu": ["jax_cuda12_plugin", "jax_cuda13_plugin"]}
    return any(map(importlib.util.find_spec, modules[platform]))


@functools.cache
def devices_of(target: str) -> list[jax.Device]:
    """The devices of a target.

    Raises:
      RuntimeError: no compiler for it, or a target that it does not know.
    """
    name, _, count = target.partition(":")
    if name not in GPUS:
        return topologies.get_topology_desc(
            platform="tpu", topology_name=target
        ).devices
    device = f"gpu_device_info {{ {GPUS[name]} {_OF_ALL_GPUS} }}"
    return topologies.get_topology_desc(
        platform="cuda",
        topology=f"1x1x{count or 1}",  # of one slice and one node
        target_config=f'{device} {_SOFTWARE} device_description_str: "{name}"',
    ).devices


def leaf(target: str, dtype: str, size: int) -> jax.ShapeDtypeStruct:
    """A parameter sharded over all devices of a target, `size` numbers on each."""
    devices = np.array(devices_of(target))
    sharding = NamedSharding(Mesh(devices, ("devices",)), PartitionSpec("devices"))
    return jax.ShapeDtypeStruct((size * devices.size,), dtype, sharding=sharding)


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

    return _compile(step, (0, 1), params, state, params)


def compile_update(
    tx: optax.GradientTransformation,
    params: optax.Params,
    state: optax.OptState,
    donate_grads: bool = False,
) -> Step:
    """Compiles the update alone, the state donated and, if so told, the gradients.

    Args:
      tx: a gradient transformation.
      params: pytree of `jax.ShapeDtypeStruct`s with shardings over one mesh.
      state: its state, as `state_like` makes it.
      donate_grads: whether the updates may take the gradients' place.
    """
    donated = (0, 1) if donate_grads else (1,)
    return _compile(tx.update, donated, params, state, params)


def _compile(function: Callable[..., Any], donated: Any, *arguments: Any) -> Step:
    device = jax.tree.leaves(arguments)[0].sharding.mesh.devices.flat[0]
    start = time.perf_counter()
    lowered = jax.jit(function, donate_argnums=donated).lower(*arguments)
    with tempfile.TemporaryDirectory() as folder:
        dump: dict[str, str | bool] = {
            "xla_dump_to": folder,
            "xla_dump_emitter_re": ".*",
        }
        compiled: Any = lowered.compile(dump if device.platform == "gpu" else None)
        seconds = time.perf_counter() - start
        ptx = {}
        for file in pathlib.Path(folder).glob("*.ptx"):
            for kernel in _KERNEL.finditer(file.read_text()):
                ptx[kernel["name"]] = kernel[0]
    text, memory = compiled.as_text(), compiled.memory_analysis()
    moved, between = traffic(text), traffic(text, branch=min)
    return Step(
        accessed=int((compiled.cost_analysis() or {}).get("bytes accessed", 0)),
        moved=moved["device"],
        moved_between=between["device"],
        host_moved=moved["host"],
        host_moved_between=between["host"],
        temporary=memory.temp_size_in_bytes,
        host_arguments=memory.host_argument_size_in_bytes,
        peak=memory.peak_memory_in_bytes,
        kernels=moved["kernels"],
        collectives=[name for name in COLLECTIVES if f" {name}" in text],
        ptx=ptx,
        seconds=seconds,
    )


def traffic(text: str, branch: Callable[..., Any] = max) -> collections.Counter[str]:
    """Bytes that a compiled program reads and writes by memory space, and "kernels".

    An instruction reads its operands and writes its results, each once; of a copy
    or a slice that runs beside the others, as much is read as written. What is small
    is left out, counters, rates and recorded losses, and a GPU's kernels of nothing
    else.

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
                branches = map(count, _NAME.findall(_BRANCHES.findall(attributes)[0]))
                moved += branch(branches, key=lambda c: c["device"] + c["host"])
            elif operation in ("while", "call"):
                raise ValueError(f"cannot count the bytes of a {operation}")
            elif operation in ("copy-start", "slice-start"):
                # Source and target, in either order; a slice's source is the whole.
                (one, here), (other, there) = arrays[name][:2]
                if (size := min(one, other)) >= SMALL:
                    moved[here] += size
                    moved[there] += size
            else:
                names = [*_NAME.findall(operands), name]
                touched = [(n, s) for x in names for n, s in arrays[x] if n >= SMALL]
                moved["kernels"] += operation == "fusion" and bool(touched)
                for size, space in touched:
                    moved[space] += size
        return moved

    return count(entry)


def contractible(ptx: str) -> list[str]:
    """The operations of a kernel that are, or may become, fused multiply-adds.

    Products and sums that do not say how they round (`.rn`) may be contracted by what
    makes machine code of them.

    Args:
      ptx: a kernel in a GPU's assembler, one of `Step.ptx`.
    """
    return [
        operation[0]
        for operation in _ARITHMETIC.finditer(ptx)
        if operation[1] in ("fma", "mad") or ".rn" not in operation[0]
    ]


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
_BRANCHES = re.compile(
    r"branch_computations=\{[^}]*|true_computation=\S+ false_computation=\S+"
)
_ARRAY = re.compile(r"\b(?:pred|[a-z]+(\d+))\[([\d,]*)\](?:\{([^}]*)\})?")
# Of a hundred threads or more: others are small, as above.
_KERNEL = re.compile(
    r"\.entry (?P<name>\w+)\([^)]*\)\s*\.reqntid \d{3}.*?^\}", re.S | re.M
)
_ARITHMETIC = re.compile(r"\b(add|sub|mul|fma|mad)(?:\.\w+)*\.b?f\d+(?:x2)?\b")


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
