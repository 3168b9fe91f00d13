# SPDX-License-Identifier: Apache-2.0
"""Plan the averaged update of a large model on a TPU pod with the TPU compiler.

    python -m examples.pod_plan

This example shards a transformer of 70 billion bfloat16 parameters (Llama 3's shapes)
and their float32 average over 256 chips, and compiles the update of `asgd` for them. It
prints the memory used and moved on each chip, and the least time that the memory
bandwidth allows. Nothing is run and no TPU is needed: `pip install "jax[tpu]"`, in an
environment of its own, installs the compiler. The plan covers the optimizer's part of a
training step, with gradients sharded like the parameters. This example imports
`benchmarks`, so it runs only in a checkout.
"""

import math
from argparse import ArgumentParser
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from asgd_optax import asgd
from benchmarks import compilers

TOPOLOGY = "v6e:16x16"  # generation and chips
# Memory bandwidth of a chip in bytes per second, as documented by the vendor:
# https://docs.cloud.google.com/tpu/docs/v4, and likewise v5e, v5p, v6e.
BANDWIDTH = {"v4": 1200e9, "v5e": 819e9, "v5p": 2765e9, "v6e": 1600e9}

LAYERS, HIDDEN, FEED_FORWARD, KEY_VALUE, VOCABULARY = 80, 8192, 28672, 1024, 128256
LAYER = {
    "query": (HIDDEN, HIDDEN),
    "key": (HIDDEN, KEY_VALUE),
    "value": (HIDDEN, KEY_VALUE),
    "output": (HIDDEN, HIDDEN),
    "gate": (HIDDEN, FEED_FORWARD),
    "up": (HIDDEN, FEED_FORWARD),
    "down": (FEED_FORWARD, HIDDEN),
    "attention_norm": (HIDDEN,),
    "feed_forward_norm": (HIDDEN,),
}


class Plan(NamedTuple):
    """A model's update on a pod. Numbers for a chip include replicated arrays."""

    total: int  # parameters of the model
    parameters: int  # on a chip
    params: int  # bytes of params on a chip; gradients take as many
    average: int  # bytes of the average on a chip
    step: compilers.Step  # report of the compiler on the update
    step_time: float  # seconds to move `step.moved` bytes at the memory bandwidth


def lay_out(mesh: Mesh, layers: int, apart: bool) -> optax.Params:
    """Return abstract parameters: matrices sharded over both axes, norms replicated."""
    stack = () if apart else (layers,)

    def weight(*shape: int, stack: tuple[int, ...] = ()) -> jax.ShapeDtypeStruct:
        axes = mesh.axis_names if len(shape) == 2 else (None,)
        sharding = NamedSharding(mesh, PartitionSpec(*[None] * len(stack), *axes))
        return jax.ShapeDtypeStruct(stack + shape, jnp.bfloat16, sharding=sharding)

    layer = {name: weight(*shape, stack=stack) for name, shape in LAYER.items()}
    return {
        "embedding": weight(VOCABULARY, HIDDEN),
        "layers": [layer] * layers if apart else layer,
        "norm": weight(HIDDEN),
        "head": weight(HIDDEN, VOCABULARY),
    }


def on_a_chip(tree: optax.Params, itemsize: int | None = None) -> int:
    """Return the bytes of the arrays on a chip, if each number takes `itemsize`."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * (itemsize or x.dtype.itemsize)
        for x in jax.tree.leaves(tree)
    )


def table(plan: Plan, bandwidth: float) -> str:
    """Format the memory, the traffic and the time of a chip."""
    step, each = plan.step, plan.step.moved / plan.parameters
    rows = {
        "a chip": "",
        "-" * 18: "-" * 22,
        "parameters": f"{plan.parameters / 1e6:.1f} M",
        "bfloat16 params": f"{plan.params / 1e9:.2f} GB",
        "bfloat16 gradients": f"{plan.params / 1e9:.2f} GB",
        "float32 average": f"{plan.average / 1e9:.2f} GB",
        "temporary": f"{step.temporary / 1e9:.2f} GB",
        "moved in a step": f"{step.moved / 1e9:.2f} GB, {each:.2f} B each",
        f"at {bandwidth / 1e9:g} GB/s": f"{1e3 * plan.step_time:.2f} ms",
        "collectives": ", ".join(step.collectives) or "none",
        "kernels": f"{step.kernels}",
        "compiled in": f"{step.seconds:.0f} s",
    }
    return "\n".join(f"| {name:18} | {value:22} |" for name, value in rows.items())


def main(topology: str = TOPOLOGY, layers: int = LAYERS, apart: bool = False) -> Plan:
    """Print and return the plan.

    With `apart`, every layer has its own leaves; otherwise all layers are stacked.
    """
    if not compilers.installed("tpu"):
        raise SystemExit("The TPU compiler is missing: pip install 'jax[tpu]'")
    devices = compilers.devices_of(topology)
    bandwidth = BANDWIDTH[topology.partition(":")[0]]
    chips = len(devices)
    # As square as possible.
    rows = max(n for n in range(1, math.isqrt(chips) + 1) if chips % n == 0)
    mesh = Mesh(np.array(devices).reshape(rows, -1), ("rows", "columns"))
    params = lay_out(mesh, layers, apart)
    total = sum(p.size for p in jax.tree.leaves(params))
    print(
        f"{total / 1e9:.2f} B parameters, {layers} layers"
        f" {'apart' if apart else 'stacked'}, on {topology}: {chips} chips, as"
        f" {rows}x{chips // rows}\n",
        flush=True,  # compiling takes a while
    )
    tx = asgd()
    state = compilers.state_like(tx, params)
    step = compilers.compile_step(tx, params, state)
    plan = Plan(
        total=total,
        parameters=on_a_chip(params, 1),
        params=on_a_chip(params),
        average=on_a_chip(state.ax),
        step=step,
        step_time=step.moved / bandwidth,
    )
    print(table(plan, bandwidth))
    counted = step.accessed / plan.parameters
    print(
        f"\nThe compiler itself counts {counted:.2f} B each. This includes traffic of"
    )
    print("its vector memory, into which it prefetches small arrays.")
    return plan


if __name__ == "__main__":
    ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    main()
