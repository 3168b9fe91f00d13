# SPDX-License-Identifier: Apache-2.0
"""Compile for TPUs and GPUs without them, and count the bytes moved and allocated.

Needs `pip install "jax[tpu]"` or `pip install "jax[cuda12-local]"`, but no device, no
driver and no CUDA. Programs are compiled ahead of time and never run. Targets are named
like "v6e:16x16" (a TPU topology) or "H100:8" (GPUs of one node). Import this module
before anything uses a device.
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

# Keep jax from claiming a device, and the TPU compiler from asking the cloud which
# machine it is on.
jax.config.update("jax_platforms", os.environ.get("JAX_PLATFORMS", "cpu"))
os.environ.update(
    {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        **os.environ,
    }
)

# Descriptions for the GPU compiler, in fields of XLA's `GpuTargetConfigProto`, with the
# numbers of NVIDIA's A100-SXM4-80GB and H100 SXM.
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

SMALL = 256  # bytes; smaller arrays are not counted

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
    """The compiler's account of one step, per device, with sizes in bytes.

    Attributes:
      accessed: the TPU compiler's own count of bytes accessed, which counts a byte
        prefetched into vector memory several times. 0 on GPUs, which have no count.
      moved: bytes read from and written to device memory, in the most expensive
        branch if there are several.
      moved_between: the same in the cheapest branch, as on steps that do not average.
      host_moved: bytes read from and written to host memory, in the most expensive
        branch.
      host_moved_between: the same in the cheapest branch.
      temporary: device memory allocated besides arguments and results.
      host_arguments: size of the arguments in host memory.
      peak: peak device memory.
      kernels: number of fused kernels in the most expensive branch, without small ones.
      collectives: sorted names of the collectives.
      ptx: the kernels in the GPU's assembler, by name.
      seconds: compile time.
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
    """Return whether there is a compiler for "tpu" or "gpu"."""
    modules = {"tpu": ["libtpu"], "gpu": ["jax_cuda12_plugin", "jax_cuda13_plugin"]}
    return any(map(importlib.util.find_spec, modules[platform]))


@functools.cache
def devices_of(target: str) -> list[jax.Device]:
    """Return the devices of a target.

    Raises:
      RuntimeError: If there is no compiler for it, or the compiler does not know it.
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
    """Return a parameter sharded over all devices of a target, `size` numbers each."""
    devices = np.array(devices_of(target))
    sharding = NamedSharding(Mesh(devices, ("devices",)), PartitionSpec("devices"))
    return jax.ShapeDtypeStruct((size * devices.size,), dtype, sharding=sharding)


def state_like(
    tx: optax.GradientTransformation, params: optax.Params, host: bool = False
) -> optax.OptState:
    """Return the state of `tx`, with parameter-shaped arrays sharded like parameters.

    Args:
      tx: a gradient transformation.
      params: pytree of `jax.ShapeDtypeStruct`s with shardings over one mesh.
      host: whether the parameter-shaped arrays are in host memory.
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
    """Compile an update and its application, with params and state donated.

    Args:
      tx: a gradient transformation.
      params: pytree of `jax.ShapeDtypeStruct`s with shardings over one mesh.
      state: its state, from `state_like`.
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
    """Compile an update alone, with the state and optionally the gradients donated.

    Args:
      tx: a gradient transformation.
      params: pytree of `jax.ShapeDtypeStruct`s with shardings over one mesh.
      state: its state, from `state_like`.
      donate_grads: whether the updates may reuse the gradients' memory.
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
    """Count the bytes a compiled program moves by memory space, and its "kernels".

    An instruction reads each operand once and writes each result once. An asynchronous
    copy or slice reads as much as it writes. Small arrays (counters, learning rates,
    losses) are not counted, nor are kernels of nothing else.

    Args:
      text: the optimized program, from `Compiled.as_text()`.
      branch: `max` or `min`, which selects the branch to count by its traffic.

    Raises:
      ValueError: If the program has a loop.
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
                # Source and target in either order; a slice's source is the whole.
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
    """Return the operations of a kernel that are or may become fused multiply-adds.

    The assembler may contract products and sums that specify no rounding (`.rn`). A
    fused multiply-add with the constant 1 is a sum: GPUs without a sum in bfloat16
    have only that.

    Args:
      ptx: a kernel in the GPU's assembler, one of `Step.ptx`.
    """
    for one in re.findall(r"mov\.b16\s+(%\w+), 0x3F80;", ptx):
        ptx = re.sub(rf"fma\.rn\.bf16\s+%\w+, %\w+, {one}, %\w+;", "", ptx)
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
# A computation's header with its name; an instruction's name, results, operation, and
# the rest of the line, which starts with its operands.
_COMPUTATION = re.compile(r"(ENTRY )?%(\S+) \(.*\{$")
_INSTRUCTION = re.compile(
    r"  (?:ROOT )?%(\S+) = (\(.*?\)(?= [a-z])|\S+) ([\w-]+)\((.*)"
)
_NAME = re.compile(r"%([\w.-]+)")
_BRANCHES = re.compile(
    r"branch_computations=\{[^}]*|true_computation=\S+ false_computation=\S+"
)
_ARRAY = re.compile(r"\b(?:pred|[a-z]+(\d+))\[([\d,]*)\](?:\{([^}]*)\})?")
# Kernels of a hundred threads or more; the others are small.
_KERNEL = re.compile(
    r"\.entry (?P<name>\w+)\([^)]*\)\s*\.reqntid \d{3}.*?^\}", re.S | re.M
)
_ARITHMETIC = re.compile(r"\b(add|sub|mul|fma|mad)(?:\.\w+)*\.b?f\d+(?:x2)?\b")


def _arrays(results: str) -> list[tuple[int, str]]:
    """Return the size in bytes and the memory space of each array."""
    arrays = []
    for bits, shape, layout in _ARRAY.findall(results):
        elements = math.prod(int(n) for n in shape.split(",") if n)
        space = re.search(r"S\((\d+)\)", layout)
        number = int(space[1]) if space else 0
        size = elements * int(bits or 8) // 8
        arrays.append((size, SPACES.get(number, "other")))
    return arrays
