# SPDX-License-Identifier: Apache-2.0
"""What was tried to make a step on the CPU cheaper, and did not.

    python -m benchmarks.tried

One leaf: the two kernels that XLA makes of a step against a loop over blocks that stay
in the cache, the array updated in place. 1,000 leaves: what is the least time to
compile a step with two results a leaf, each of one product and one difference.
100,000 leaves: the time to make the state. See `docs/developers/tried.md`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from asgd_optax import asgd
from benchmarks import harness
from benchmarks.step_cost import BASE, HAND, IN_JAX, OURS, Method, compile_jax, trees

ETA, MU = 1e-4, 1e-3


def step(p: jax.Array, ax: jax.Array, g: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A step of averaged SGD in its shortest form."""
    p = p - ETA * g
    return p, ax + MU * (p - ax)


def by_blocks(size: int) -> Callable[..., Any]:
    """The same, block after block."""

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
    """A donated step of n parameters."""
    jitted = jax.jit(f, donate_argnums=(0, 1))

    def setup() -> Callable[[], None]:
        p, ax, g = jnp.ones(n), jnp.ones(n), jnp.ones(n)

        def call() -> None:
            nonlocal p, ax
            p, ax = jax.block_until_ready(jitted(p, ax, g))

        return call

    return harness.Contestant(setup, calls=2)


def of_init(init: Callable[[Any], Any], params: Any) -> harness.Contestant:
    """A state made."""
    return harness.Contestant(
        lambda: lambda: jax.block_until_ready(init(params)), calls=1
    )


def bare(p: Any, ax: Any, g: Any) -> tuple[Any, Any]:
    """Two results a leaf that are no average: one product and one difference each."""
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
    """Prints and saves the tables."""
    options = harness.parser("What was tried to make a step cheaper.").parse_args(argv)
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
        return harness.table([title, unit, "ratio"], rows)

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
    harness.report(
        "tried",
        "# What was tried to make a step cheaper\n\n"
        + "\n\n".join(sections)
        + f"\n\nMedians of {repetitions} repetitions, of {rotations} compilations.",
        options.output,
    )


if __name__ == "__main__":
    main()
