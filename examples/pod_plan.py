# SPDX-License-Identifier: Apache-2.0
"""A large model's averaged update on a TPU pod, planned by the TPU's own compiler.

    python examples/pod_plan.py
    python examples/pod_plan.py --topology v5p:8x8x8 --apart

Lays a transformer of 70 billion bfloat16 parameters (Llama 3's shapes) and their
float32 average over 256 chips, compiles `asgd`'s update for them and prints what a
chip holds and moves, and how fast its memory lets the step be. No TPU is needed, and
nothing is run: `pip install "jax[tpu]"`, in an environment of its own, brings the
compiler. What is planned is the optimizer's part of a training step; the gradients
arrive as the parameters are sharded.
"""

import argparse
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn

try:
    from examples import command_line, tpu_compiler
except ModuleNotFoundError:  # run as a script, with this folder on the path
    import command_line
    import tpu_compiler

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from asgd_optax import asgd

# A chip's memory bandwidth in bytes per second, as its vendor states it:
# https://docs.cloud.google.com/tpu/docs/v4, and likewise v5e, v5p, v6e.
BANDWIDTH = {"v4": 1200e9, "v5e": 819e9, "v5p": 2765e9, "v6e": 1600e9}

ROWS, COLUMNS = "rows", "columns"


class Plan(NamedTuple):
    """A model's update on a pod.

    Attributes:
      total: parameters of the model.
      parameters: parameters on a chip, those that every chip has a copy of included.
      params: bytes of them on a chip.
      gradients: bytes of the gradients on a chip.
      average: bytes of the average on a chip.
      step: what the compiler says of the update.
      step_time: seconds that `step.moved` takes at the chip's memory bandwidth.
    """

    total: int
    parameters: int
    params: int
    gradients: int
    average: int
    step: tpu_compiler.Step
    step_time: float


def weights(options: argparse.Namespace) -> dict[str, Any]:
    """The shapes of a transformer's weights: of the whole model, and of one layer."""
    hidden, kv = options.hidden, options.key_value
    layer = {
        "query": (hidden, hidden),
        "key": (hidden, kv),
        "value": (hidden, kv),
        "output": (hidden, hidden),
        "gate": (hidden, options.feed_forward),
        "up": (hidden, options.feed_forward),
        "down": (options.feed_forward, hidden),
        "attention_norm": (hidden,),
        "feed_forward_norm": (hidden,),
    }
    if options.apart:
        layers: Any = [layer] * options.layers
    else:
        layers = {name: (options.layers, *shape) for name, shape in layer.items()}
    return {
        "embedding": (options.vocabulary, hidden),
        "layers": layers,
        "norm": (hidden,),
        "head": (hidden, options.vocabulary),
    }


def lay_out(shapes: Any, mesh: Mesh) -> Any:
    """The parameters: matrices sharded over both axes of the mesh, norms copied.

    Raises:
      ValueError: an axis of the mesh that does not divide a matrix.
    """

    def place(path: Any, shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
        matrix = "norm" not in path[-1].key
        spec = PartitionSpec()
        if matrix:
            spec = PartitionSpec(*(None,) * (len(shape) - 2), ROWS, COLUMNS)
            for size, axis in zip(shape[-2:], (ROWS, COLUMNS), strict=True):
                if size % mesh.shape[axis]:
                    raise ValueError(
                        f"{mesh.shape[axis]} does not divide the {size} {axis} of"
                        f" {path[-1].key!r}"
                    )
        sharding = NamedSharding(mesh, spec)
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=sharding)

    return jax.tree_util.tree_map_with_path(
        place, shapes, is_leaf=lambda node: isinstance(node, tuple)
    )


def plan(params: Any, bandwidth: float) -> Plan:
    """Compiles the update of `params` and reckons its step time."""
    tx = asgd()
    state = tpu_compiler.state_like(tx, params)
    step = tpu_compiler.compile_step(tx, params, state)
    return Plan(
        total=sum(p.size for p in jax.tree.leaves(params)),
        parameters=_on_a_chip(params, 1),
        params=_on_a_chip(params),
        gradients=_on_a_chip(params),
        average=_on_a_chip(state.ax),
        step=step,
        step_time=step.moved / bandwidth,
    )


def _on_a_chip(tree: Any, itemsize: int | None = None) -> int:
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * (itemsize or x.dtype.itemsize)
        for x in jax.tree.leaves(tree)
    )


def table(plan: Plan, bandwidth: float) -> str:
    """What a chip holds, moves and waits for."""
    step, per = plan.step, plan.parameters
    rows = {
        "parameters": f"{plan.parameters / 1e6:.1f} M",
        "bfloat16 params": _gigabytes(plan.params),
        "bfloat16 gradients": _gigabytes(plan.gradients),
        "float32 average": _gigabytes(plan.average),
        "temporary": _gigabytes(step.temporary),
        "moved in a step": f"{_gigabytes(step.moved)}, {step.moved / per:.2f} B each",
        f"at {bandwidth / 1e9:g} GB/s": f"{1e3 * plan.step_time:.2f} ms",
        "collectives": ", ".join(step.collectives) or "none",
        "kernels": f"{step.kernels}",
        "compiled in": f"{step.seconds:.0f} s",
    }
    rows = {"a chip": "", "-" * 18: "-" * 22} | rows
    return "\n".join(f"| {name:18} | {value:22} |" for name, value in rows.items())


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB"


def parser() -> command_line.Parser:
    """The options: a topology, a mesh over it, and a transformer's shapes."""
    parser = command_line.Parser("Plan an averaged update on a TPU pod.")
    parser.add_argument(
        "--topology",
        default="v6e:16x16",
        help="generation and chips of the slice (default: %(default)s)",
    )
    parser.add_argument(
        "--mesh",
        help="chips along the rows and along the columns of every matrix, such as"
        " 8x32 (default: as square as may be)",
    )
    for option, default, meaning in (
        ("--layers", 80, "transformer layers"),
        ("--hidden", 8192, "width of the model"),
        ("--feed-forward", 28672, "width inside of a feed-forward block"),
        ("--key-value", 1024, "width of the keys and of the values"),
        ("--vocabulary", 128256, "tokens"),
    ):
        parser.add_argument(
            option,
            type=command_line.count,
            default=default,
            help=f"{meaning} (default: %(default)s)",
        )
    parser.add_argument(
        "--apart",
        action="store_true",
        help="keep every layer's weights in leaves of their own (default: stacked,"
        " one leaf for all layers)",
    )
    return parser


def _mesh(command: command_line.Parser, options: argparse.Namespace) -> Mesh:
    """The mesh that the options ask for, or the end of the program."""
    generation, _, shape = options.topology.partition(":")
    if generation not in BANDWIDTH or not shape:
        command.error(
            f"argument --topology: must be {', '.join(BANDWIDTH)} and a shape, as in"
            f" v6e:16x16, not {options.topology!r}"
        )
    if not tpu_compiler.installed():
        command.error("the TPU's compiler is missing: pip install 'jax[tpu]'")
    try:
        devices = tpu_compiler.devices_of(options.topology)
    except RuntimeError as error:
        _compiler_refuses(command, error)
    chips = len(devices)
    if options.mesh is None:
        rows = max(n for n in range(1, math.isqrt(chips) + 1) if chips % n == 0)
        options.mesh = f"{rows}x{chips // rows}"
    try:
        rows, columns = (int(n) for n in options.mesh.split("x"))
    except ValueError:
        command.error(f"argument --mesh: must be as in 8x32, not {options.mesh!r}")
    if rows < 1 or rows * columns != chips:
        command.error(
            f"argument --mesh: {options.mesh} is not the {chips} chips of"
            f" {options.topology}"
        )
    return Mesh(np.array(devices).reshape(rows, columns), (ROWS, COLUMNS))


def _compiler_refuses(command: command_line.Parser, error: RuntimeError) -> NoReturn:
    """Ends the program: no such topology, or too small a memory; all in one line."""
    reason = str(error).splitlines()[0]
    command.error(f"argument --topology: the TPU's compiler says: {reason}")


def main(argv: Sequence[str] | None = None) -> Plan:
    """Plans, prints the table and returns the figures."""
    command = parser()
    options = command.parse_args(argv)
    mesh = _mesh(command, options)
    bandwidth = BANDWIDTH[options.topology.split(":")[0]]
    try:
        params = lay_out(weights(options), mesh)
    except ValueError as error:
        command.error(f"argument --mesh: {error}")
    try:
        figures = plan(params, bandwidth)
    except RuntimeError as error:
        _compiler_refuses(command, error)
    layers = "apart" if options.apart else "stacked"
    print(
        f"{figures.total / 1e9:.2f} B parameters, {options.layers} layers {layers}, on"
        f" {options.topology}: {mesh.size} chips, as {options.mesh}\n"
    )
    print(table(figures, bandwidth))
    counted = figures.step.accessed / figures.parameters
    print(
        f"\nThe compiler itself counts {counted:.2f} B each: with the traffic of its"
        " vector\nmemory, into which it prefetches what is small."
    )
    return figures


if __name__ == "__main__":
    main()
