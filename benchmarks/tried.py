# SPDX-License-Identifier: Apache-2.0
"""What was tried to make a step on the CPU cheaper, and did not.

    python -m benchmarks.tried

One leaf: the two kernels that XLA makes of a step against a loop over blocks that stay
in the cache, the array updated in place. 1,000 leaves: what is the least time to
compile a step with two results a leaf, each of one product and one difference. See
`docs/developers/tried.md`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import harness
from benchmarks.step_cost import BASE, IN_JAX, Method, compile_jax, trees

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


def bare(p: Any, ax: Any, g: Any) -> tuple[Any, Any]:
    """Two results a leaf that are no average: one product and one difference each."""
    p = jax.tree.map(lambda p, g: p - ETA * g, p, g)
    return p, jax.tree.map(lambda ax, g: ax - MU * g, ax, g)


METHODS = {
    BASE: IN_JAX[BASE],
    "two bare results": Method(init=lambda params: params, step=bare),
    "asgd": IN_JAX["asgd"],
    "optax.adam": IN_JAX["optax.adam"],
}


def main(argv: Sequence[str] | None = None) -> None:
    """Prints and saves both tables."""
    options = harness.parser("What was tried to make a step cheaper.").parse_args(argv)
    size, repetitions, rotations = (2**14, 2, 1) if options.quick else (2**25, 5, 3)
    tree = trees(options.quick)[-1]
    compiled = {
        name: sum(made.seconds)
        for name, made in compile_jax(METHODS, tree, rotations).items()
    }
    blocks = {f"blocks of {size // n:,}": by_blocks(size // n) for n in (8, 32)}
    times = harness.measure(
        {
            name: contestant(f, size)
            for name, f in {"XLA's two kernels": step, **blocks}.items()
        },
        repetitions,
    )
    base = next(iter(times.values())).median
    steps = [
        [name, f"{1e3 * t.median:.1f}", f"{t.median / base:.1f}"]
        for name, t in times.items()
    ]
    base = compiled[BASE]
    compilations = [[n, f"{s:.2f}", f"{s / base:.1f}"] for n, s in compiled.items()]
    harness.report(
        "tried",
        "# What was tried to make a step cheaper\n\n"
        + harness.table([f"{size:,} in one leaf", "step (ms)", "ratio"], steps)
        + "\n\n"
        + harness.table([tree.title, "compile (s)", "ratio"], compilations)
        + f"\n\nMedians of {repetitions} repetitions, of {rotations} compilations.",
        options.output,
    )


if __name__ == "__main__":
    main()
