# SPDX-License-Identifier: Apache-2.0
"""Bytes that a compiled step moves on TPUs and GPUs, according to their compilers.

    python -m benchmarks.step_bytes

Needs `pip install "jax[tpu]"` or `pip install "jax[cuda12-local]"`, in a separate
environment, but neither a TPU nor a GPU: the step is compiled ahead of time for each
target and never run. The first table has one leaf of half a gigabyte per device. The
second table has the same leaf, with `update` compiled alone. The third table, for TPUs,
has 32 leaves of 64 MiB with their average in host memory.
"""

from collections.abc import Sequence

import optax

from asgd_optax import (
    asgd,
    average_iterates,
    nt_asgd,
    running_random_scaling,
    track_iterates,
)
from benchmarks import compilers
from tools import command_line

TARGETS = {
    "tpu": ("v4:2x2x1", "v5e:2x4", "v5p:2x2x1", "v6e:2x2"),
    "gpu": ("A100:1", "H100:8"),
}
DTYPES = ("float32", "bfloat16")
SIZE = 2**27  # parameters per device

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
    "sgd, random scaling": optax.chain(SGD, track_iterates(running_random_scaling())),
}
ALONE = {
    "asgd": asgd(),
    "sgd, average_iterates": TRANSFORMATIONS["sgd, average_iterates"],
}
ON_HOST = {
    "asgd": asgd(),
    "asgd, compensated": asgd(compensated=True),
    "sgd, average_iterates, every=10": EVERY,
}
LEAVES = 32


def main(argv: Sequence[str] | None = None) -> None:
    """Print the tables for the installed compilers."""
    command_line.Parser("Bytes that a step moves on TPUs and GPUs.").parse_args(argv)
    targets = [
        target
        for platform, its in TARGETS.items()
        if compilers.installed(platform)
        for target in its
    ]
    if not targets:
        raise SystemExit(
            "no compiler found: pip install 'jax[tpu]' or 'jax[cuda12-local]'"
        )
    print(
        "| target | params | transformation | bytes | between | temporary | kernels |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for target in targets:
        for dtype in DTYPES:
            params = compilers.leaf(target, dtype, SIZE)
            for name, tx in TRANSFORMATIONS.items():
                state = compilers.state_like(tx, params)
                step = compilers.compile_step(tx, params, state)
                print(
                    f"| {target} | {dtype} | {name} | {step.moved / SIZE:.2f} |"
                    f" {step.moved_between / SIZE:.2f} | {step.temporary / SIZE:.2f} |"
                    f" {step.kernels} |",
                    flush=True,
                )
    print("\n| target | `update` alone | donated | bytes | temporary |")
    print("| --- | --- | --- | --- | --- |")
    for target in targets:
        params = compilers.leaf(target, "float32", SIZE)
        for name, tx in ALONE.items():
            for donate_grads in (False, True):
                state = compilers.state_like(tx, params)
                step = compilers.compile_update(tx, params, state, donate_grads)
                donated = "state and gradients" if donate_grads else "state"
                print(
                    f"| {target} | {name} | {donated} | {step.moved / SIZE:.2f} |"
                    f" {step.temporary / SIZE:.2f} |",
                    flush=True,
                )
    if not compilers.installed("tpu"):
        return
    size = SIZE // 8
    print(
        "\n| target | average on the host | its MiB | staged on the device | moved to"
        " and from the host | between |"
    )
    print("| --- | --- | --- | --- | --- | --- |")
    for target in TARGETS["tpu"]:
        leaves = [compilers.leaf(target, "float32", size)] * LEAVES
        for name, tx in ON_HOST.items():
            state = compilers.state_like(tx, leaves, host=True)
            step = compilers.compile_step(tx, leaves, state)
            print(
                f"| {target} | {name} | {step.host_arguments / 2**20:.0f} |"
                f" {step.temporary / 2**20:.0f} | {step.host_moved / 2**20:.0f} |"
                f" {step.host_moved_between / 2**20:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
