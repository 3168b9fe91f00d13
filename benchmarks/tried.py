# SPDX-License-Identifier: Apache-2.0
"""Failed attempts to make a step on the CPU cheaper.

    python -m benchmarks.tried

- One leaf: XLA's two kernels for a step, compared with a loop over blocks that fit in
  the cache and are updated in place.
- 1,000 leaves: the compile time of the simplest step with two results per leaf, of one
  product and one difference each.
- 100,000 leaves: the time to create the state.

See `docs/explanation/tried.md`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from asgd_optax import asgd
from benchmarks import harness
from benchmarks.step_cost import BASE, HAND, IN_JAX, OURS, Method, compile_jax, trees
from tools import command_line, report

ETA, MU = 1e-4, 1e-3


def step(p: jax.Array, ax: jax.Array, g: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Take a step of averaged SGD, in its shortest form."""
    p = p - ETA * g
    return p, ax + MU * (p - ax)


def by_blocks(size: int) -> Callable[..., Any]:
    """Return the same step as a loop over blocks."""

    def looped(p: jax.Array, ax: jax.Array, g: jax.Array) -> Any:
        def block(n: jax.Array, carry: Any) -> Any:
            begin = (n * size,)
            parts = [jax.lax.dynamic_slice(x, begin, (size,)) for x in (*carry, g)]
            return tuple(
                jax.lax.dynamic_update_slice(whole, part, begin)
                for whole, part in zip(carry, step(*parts), strict=True)
            )

        return jax.lax.fori_loop(0, len(p) // size, block, (p, ax))

    return looped


def contestant(f: Callable[..., Any], n: int) -> harness.Contestant:
    """Time a donated step of n parameters."""
    jitted = jax.jit(f, donate_argnums=(0, 1))

    def setup() -> Callable[[], None]:
        p, ax, g = jnp.ones(n), jnp.ones(n), jnp.ones(n)

        def call() -> None:
            nonlocal p, ax
            p, ax = jax.block_until_ready(jitted(p, ax, g))

        return call

    return harness.Contestant(setup, calls=2)


def of_init(init: Callable[[Any], Any], params: Any) -> harness.Contestant:
    """Time the creation of a state."""
    return harness.Contestant(
        lambda: lambda: jax.block_until_ready(init(params)), calls=1
    )


def bare(p: Any, ax: Any, g: Any) -> tuple[Any, Any]:
    """Compute two results per leaf, of one product and one difference each."""
    p = jax.tree.map(lambda p, g: p - ETA * g, p, g)
    return p, jax.tree.map(lambda ax, g: ax - MU * g, ax, g)


METHODS = {
    BASE: IN_JAX[BASE],
    "two bare results": Method(init=lambda params: params, step=bare),
    **{
        name: IN_JAX[name]
        for name in (
            f"asgd{HAND}",
            "asgd",
            "asgd, compensated",
            f"uniform{HAND}",
            f"uniform{OURS}",
            "optax.adam",
        )
    },
}
INITS = {
    "optax.trace": optax.trace(0.9).init,
    "asgd().init": asgd().init,
    "asgd(compensated=True).init": asgd(compensated=True).init,
}


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print and save the tables."""
    parser = command_line.report_parser("Failed attempts to make a step cheaper.")
    options = parser.parse_args(argv)
    size, repetitions, rotations = (2**14, 2, 1) if options.quick else (2**25, 5, 3)
    leaves = 100 if options.quick else 100_000
    tree = trees(options.quick)[-1]
    compiled = {
        name: sum(made.seconds)
        for name, made in compile_jax(METHODS, tree, rotations).items()
    }
    steps = {"XLA's two kernels": step}
    steps |= {f"blocks of {size // n:,}": by_blocks(size // n) for n in (8, 32)}
    many = [jnp.full((4, 4), 1.0 * i) for i in range(leaves)]
    times = harness.measure(
        {name: contestant(f, size) for name, f in steps.items()}
        | {name: of_init(init, many) for name, init in INITS.items()},
        repetitions,
    )

    def section(title: str, unit: str, seconds: Mapping[str, float], scale: int) -> str:
        base = next(iter(seconds.values()))
        rows = [
            [name, f"{scale * s:.3g}", f"{s / base:.1f}"] for name, s in seconds.items()
        ]
        return report.table([title, unit, "ratio"], rows)

    medians = {name: time.median for name, time in times.items()}
    sections = [
        section(
            f"{size:,} in one leaf", "step (ms)", {n: medians[n] for n in steps}, 1000
        ),
        section(tree.title, "compile (s)", compiled, 1),
        section(
            f"{leaves:,} leaves of 4x4", "init (s)", {n: medians[n] for n in INITS}, 1
        ),
    ]
    report.write(
        "benchmarks.tried",
        "# What was tried to make a step cheaper\n\n"
        + "\n\n".join(sections)
        + f"\n\nMedians of {repetitions} repetitions, of {rotations} compilations.",
        options.output,
    )


if __name__ == "__main__":
    main()
