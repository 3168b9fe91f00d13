# SPDX-License-Identifier: Apache-2.0
"""Train one network on many devices, by `pmap` and by sharded arrays.

    python -m examples.data_parallel

A Flax network learns digits by ASGD on eight virtual CPU devices, in two ways:

- *pmap*: every device keeps all parameters and the whole average.
- *jit*: parameters and average are sharded over the devices ("FSDP"). The step is
  written for one device; `jax.jit` adds the communication. The update needs none.

With several processes, each calls `jax.distributed.initialize()`, then `train("jit")`.
"""

from argparse import ArgumentParser
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import trange

from asgd_optax import asgd, averaged_params

STEPS = 200
BATCH = 64
LEARNING_RATE = 1.0
NOISE = np.float32(0.2)  # standard deviation; pixels are in [0, 1]
NETWORK = nn.Sequential([nn.Dense(512), nn.relu, nn.Dense(10)])

Data = tuple[np.ndarray, np.ndarray]  # images and labels
Carry = tuple[optax.Params, optax.OptState]  # passed from step to step
Step = Callable[[Carry, Data], Carry]


class Outcome(NamedTuple):
    """Cross-entropies on the test set, and the memory used on one device."""

    last_loss: float
    average_loss: float
    params_bytes: int
    state_bytes: int


def load() -> list[Data]:
    """Load training and test images, the same as in `examples/digits.py`."""
    x, y = load_digits(return_X_y=True)
    x = (x / 16).astype(np.float32)
    split = {"test_size": 400, "random_state": 0}
    x, x_test, y, y_test = train_test_split(x, y, stratify=y, **split)
    x, _, y, _ = train_test_split(x, y, stratify=y, **split)
    return [(x, y), (x_test, y_test)]


def minibatches(images: np.ndarray, labels: np.ndarray) -> Iterator[Data]:
    """Yield noisy minibatches forever, in a new order of the images in each epoch."""
    rng = np.random.default_rng(0)
    while True:
        order = rng.permutation(len(labels))
        for start in range(0, len(order) - BATCH + 1, BATCH):
            picked = order[start : start + BATCH]
            noise = NOISE * rng.standard_normal((BATCH, 64), np.float32)
            yield images[picked] + noise, labels[picked]


def loss(params: optax.Params, data: Data) -> jax.Array:
    """Return the mean cross-entropy of the network."""
    logits = NETWORK.apply({"params": params}, data[0])
    return optax.softmax_cross_entropy_with_integer_labels(logits, data[1]).mean()


def by_pmap(step: Step, init: Any, params: optax.Params) -> tuple[Step, Carry]:
    """Copy everything to every device, stacked along a first axis."""
    n = jax.device_count()
    step = jax.pmap(step, axis_name="devices", donate_argnums=0)
    params = jax.tree.map(lambda x: np.stack([x] * n), params)
    carry = params, jax.pmap(init)(params)
    divide = partial(jax.tree.map, lambda x: x.reshape(n, -1, *x.shape[1:]))
    return lambda carry, batch: step(carry, divide(batch)), carry


def by_jit(step: Step, init: Any, params: optax.Params) -> tuple[Step, Carry]:
    """Shard everything over the devices of all processes."""
    mesh = Mesh(np.array(jax.devices()), ("devices",))
    rows = NamedSharding(mesh, PartitionSpec("devices"))
    whole = NamedSharding(mesh, PartitionSpec())
    # Shard the first axis if its length is divisible by the number of devices.
    layout = jax.tree.map(lambda x: whole if len(x) % mesh.size else rows, params)
    params = jax.device_put(params, layout)
    carry = params, jax.jit(init)(params)
    shardings = jax.tree.map(lambda x: x.sharding, carry)
    step = jax.jit(step, donate_argnums=0, out_shardings=shardings)
    return lambda carry, batch: step(carry, jax.device_put(batch, rows)), carry


def train(how: str, steps: int = STEPS) -> Outcome:
    """Train on the devices of all processes that have been joined."""
    training, test = load()
    optimizer = asgd(LEARNING_RATE, lambd=0.0, t0=steps // 2)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optimizer)

    def one_step(carry: Carry, batch: Data) -> Carry:
        params, state = carry
        grads = jax.grad(loss)(params, batch)
        if how == "pmap":
            grads = jax.lax.pmean(grads, "devices")
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params = NETWORK.init(jax.random.key(0), training[0][:1])["params"]
    params = jax.tree.map(np.asarray, params)  # on the host
    step, carry = {"pmap": by_pmap, "jit": by_jit}[how](one_step, tx.init, params)
    batches = minibatches(*training)
    for _ in trange(steps, desc=how, disable=jax.process_index() > 0):
        # Devices of one CPU share threads, so several steps in flight can deadlock.
        carry = jax.block_until_ready(step(carry, next(batches)))
    params, average = carry[0], averaged_params(carry[1], carry[0])
    shards = [[x.addressable_data(0) for x in jax.tree.leaves(t)] for t in carry]
    held = (sum(x.nbytes for x in shard) for shard in shards)
    if how == "pmap":
        params, average = jax.tree.map(lambda x: x[0], (params, average))
    score = jax.jit(loss)
    return Outcome(float(score(params, test)), float(score(average, test)), *held)


def report(outcomes: dict[str, Outcome]) -> None:
    """Print the losses, and the memory of params and optimizer state on one device."""
    print("| way       | last iterate | average  | params, kB | state, kB |")
    print("| --------- | ------------ | -------- | ---------- | --------- |")
    for how, (last, average, params, state) in outcomes.items():
        memory = f"{params / 1e3:<10.1f} | {state / 1e3:<9.1f}"
        print(f"| {how:9} | {last:<12.6f} | {average:.6f} | {memory} |")


def main(steps: int = STEPS) -> dict[str, Outcome]:
    outcomes = {how: train(how, steps) for how in ("pmap", "jit")}
    report(outcomes)
    return outcomes


if __name__ == "__main__":
    ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    jax.config.update("jax_num_cpu_devices", 8)
    main()
