# SPDX-License-Identifier: Apache-2.0
"""Cost of `average_iterates(every=k)` on the steps that do not average.

    python -m benchmarks.average_every

Times one donated SGD step of 33 M float32 parameters, in one leaf and in 16 leaves:
without an average, averaging at every step, and at every tenth step. Steps are
interleaved, and medians are reported. "select" computes the average at every step and
discards most results.
"""

import statistics
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from asgd_optax import average_iterates
from tools import command_line

SIZE = 2**25
ROUNDS = 100
EVERY = 10


def select_every(every: int) -> optax.GradientTransformation:
    """Write `average_iterates(every=every)` as a select over the whole average."""
    inner = average_iterates()

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, new = inner.update(updates, state, params)
        due = new.step % every == 0
        average = jax.tree.map(
            lambda n, o: jnp.where(due, n, o), new.average, state.average
        )
        return updates, new._replace(average=average)

    return optax.GradientTransformation(inner.init, update)


def main(argv: Sequence[str] | None = None) -> None:
    """Time both trees and print their tables."""
    command_line.Parser("Cost of the steps that do not average.").parse_args(argv)
    sgd = optax.sgd(0.1)
    transformations = {
        "SGD alone": sgd,
        "every iterate": optax.chain(sgd, average_iterates()),
        "every tenth": optax.chain(sgd, average_iterates(every=EVERY)),
        "every tenth, select": optax.chain(sgd, select_every(EVERY)),
    }
    for leaves in (1, 16):
        params = [jnp.ones(SIZE // leaves) for _ in range(leaves)]
        measure(f"{leaves} of {SIZE // leaves:,}", params, transformations)


def measure(title: str, params: Any, transformations: dict[str, Any]) -> None:
    """Print the median time of steps with and without averaging."""
    steps, states = {}, {}
    times: dict[str, list[tuple[int, float]]] = {name: [] for name in transformations}
    for name, tx in transformations.items():

        def step(params: Any, state: Any, grads: Any, tx: Any = tx) -> Any:
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        steps[name] = jax.jit(step, donate_argnums=(0, 1))
        states[name] = (jax.tree.map(jnp.copy, params), tx.init(params))
    for n in range(1, ROUNDS + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            states[name] = jax.block_until_ready(step(*states[name], params))
            times[name].append((n, time.perf_counter() - start))
    print(f"\n| {title} | between (ms) | ratio | averaging (ms) |")
    print("| --- | --- | --- | --- |")
    base = None
    for name, row in times.items():
        row = row[EVERY:]  # the first steps compile and touch fresh memory
        between = 1e3 * statistics.median(t for n, t in row if n % EVERY)
        due = 1e3 * statistics.median(t for n, t in row if n % EVERY == 0)
        base = base or between
        print(f"| {name} | {between:.1f} | {between / base:.2f} | {due:.1f} |")


if __name__ == "__main__":
    main()
