# SPDX-License-Identifier: Apache-2.0
"""A large model's averaged update on a TPU pod, planned by the TPU's own compiler.

    python -m examples.pod_plan

Lays a transformer of 70 billion bfloat16 parameters (Llama 3's shapes) and their
float32 average over 256 chips, compiles `asgd`'s update for them and prints what a
chip holds and moves, and how fast its memory lets the step be. Nothing is run and no
TPU is needed: `pip install "jax[tpu]"`, in an environment of its own, brings the
compiler. What is planned is the optimizer's part of a training step; the gradients
arrive as the parameters are sharded. What asks the compiler is of this repository's
`benchmarks`, so that this one lesson runs in a checkout alone.
"""

import math
from argparse import SUPPRESS, ArgumentParser
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from asgd_optax import asgd
from benchmarks import compilers

TOPOLOGY = "v6e:16x16"  # generation and chips
# A chip's memory bandwidth in bytes per second, as its vendor states it:
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
    """A model's update on a pod; what is on a chip includes what all have a copy of."""

    total: int  # parameters of the model
    parameters: int  # on a chip
    params: int  # bytes of them; the gradients take as many
    average: int  # bytes of it on a chip
    step: compilers.Step  # what the compiler says of the update
    step_time: float  # seconds that `step.moved` takes at the memory's bandwidth


def lay_out(mesh: Mesh, layers: int, apart: bool) -> optax.Params:
    """The parameters: matrices sharded over both axes of the mesh, norms copied."""
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
    """Bytes of the arrays that a chip holds, or those of numbers of `itemsize`."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * (itemsize or x.dtype.itemsize)
        for x in jax.tree.leaves(tree)
    )


def table(plan: Plan, bandwidth: float) -> str:
    """What a chip holds, moves and waits for."""
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
    """Plans, prints the table and returns the figures.

    With `apart` every layer has leaves of its own; else all layers are stacked in one.
    """
    if not compilers.installed("tpu"):
        raise SystemExit("The TPU's compiler is missing: pip install 'jax[tpu]'")
    devices = compilers.devices_of(topology)
    bandwidth = BANDWIDTH[topology.partition(":")[0]]
    chips = len(devices)
    # As square as may be.
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
    print(f"\nThe compiler itself counts {counted:.2f} B each: with the traffic of its")
    print("vector memory, into which it prefetches what is small.")
    return plan


if __name__ == "__main__":
    ArgumentParser(usage=SUPPRESS, description=__doc__.partition("\n")[0]).parse_args()
    main()
