# SPDX-License-Identifier: Apache-2.0
"""A Flax Linen `TrainState` that stops, and resumes from an Orbax checkpoint.

    python -m examples.linen_train_state [--checkpoint-dir FOLDER]

A small network learns scikit-learn's breast cancer data with ASGD. The run stops
halfway, resumes from the newest checkpoint, and ends bit for bit as an uninterrupted
run. The average is part of the optimizer's state, so it is saved and restored with it.
"""

import tempfile
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import linen as nn
from flax.training.train_state import TrainState
from sklearn.datasets import load_breast_cancer
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler

from asgd_optax import asgd, averaged_params

LEARNING_RATE = 0.3
T0 = 300  # updates before averaging
STEPS = 1000
SAVE_EVERY = 100
BATCH_SIZE = 8
MAX_GRADIENT_NORM = 1.0
NETWORK = nn.Sequential([nn.Dense(16), nn.relu, nn.Dense(2)])


def load_splits() -> tuple[Any, Any]:
    """Load standardised inputs and labels for training and test."""
    x, y = load_breast_cancer(return_X_y=True)
    x, test_x, y, test_y = train_test_split(x, y, stratify=y, random_state=0)
    scale = StandardScaler().fit(x).transform
    return (scale(x), y), (scale(test_x), test_y)


def create_state(key: jax.Array, inputs: jax.Array) -> TrainState:
    """Initialise the parameters and the optimizer, with the average last."""
    params = NETWORK.init(key, inputs[:1])["params"]
    tx = optax.chain(
        optax.clip_by_global_norm(MAX_GRADIENT_NORM),
        asgd(LEARNING_RATE, lambd=0.0, t0=T0),
    )
    return TrainState.create(apply_fn=NETWORK.apply, params=params, tx=tx)


def score(params: Any, inputs: jax.Array, labels: jax.Array) -> tuple[Any, Any]:
    """Return the mean cross-entropy and the accuracy."""
    logits: Any = NETWORK.apply({"params": params}, inputs)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return losses.mean(), jnp.mean(logits.argmax(-1) == labels)


@jax.jit
def train_step(state: TrainState, key: Any, inputs: Any, labels: Any) -> TrainState:
    """Train for one step, on a minibatch that depends only on the step number."""
    key = jax.random.fold_in(key, state.step)
    rows = jax.random.randint(key, (BATCH_SIZE,), 0, len(labels))
    grads, _ = jax.grad(score, has_aux=True)(state.params, inputs[rows], labels[rows])
    return state.apply_gradients(grads=grads)


def resume(manager: ocp.CheckpointManager, fresh: TrainState) -> TrainState:
    """Restore the newest complete checkpoint; without one, return `fresh`."""
    step = manager.latest_step()  # Orbax skips interrupted saves
    if step is None:
        return fresh
    target = jax.tree.map(ocp.tree.to_shape_dtype_struct, fresh)
    return manager.restore(step, args=ocp.args.StandardRestore(target))


def train(folder: Path, key: jax.Array, data: Any, stop: int) -> tuple[int, TrainState]:
    """Train up to step `stop`, from the newest checkpoint in `folder` if there is one.

    Returns:
      The step at which this run started, and the state at its end.
    """
    options = ocp.CheckpointManagerOptions(
        max_to_keep=2,
        enable_async_checkpointing=False,  # simpler, for a small model
    )
    with ocp.CheckpointManager(folder, options=options) as manager:
        state = resume(manager, create_state(key, data[0]))
        start = int(state.step)
        print(f"start at step {start}, stop at step {stop}")
        for step in range(start + 1, stop + 1):
            state = train_step(state, key, *data)
            if step % SAVE_EVERY == 0 or step == stop:
                manager.save(step, args=ocp.args.StandardSave(state))
    return start, state


def equal(one: Any, other: Any) -> bool:
    """Return whether all arrays of two trees are equal, bit for bit."""
    return all(map(np.array_equal, jax.tree.leaves(one), jax.tree.leaves(other)))


def main(checkpoint_dir: Path | None = None, steps: int = STEPS) -> dict[str, Any]:
    """Train with and without interruption, compare, print and return the results."""
    (data, test_data), key = load_splits(), jax.random.key(0)
    with tempfile.TemporaryDirectory() as temporary:
        folder = (checkpoint_dir or Path(temporary)).absolute()
        # The second call starts from the contents of the folder alone.
        first, _ = train(folder, key, data, steps // 2)
        second, state = train(folder, key, data, steps)

    uninterrupted = create_state(key, data[0])
    for _ in range(int(state.step)):
        uninterrupted = train_step(uninterrupted, key, *data)
    results: dict[str, Any] = {"starts": [first, second]}
    results["bitwise"] = equal(state, uninterrupted)
    print(f"equal to an uninterrupted run, bit for bit: {results['bitwise']}")

    average = averaged_params(state, state.params)
    for name, params in (("last", state.params), ("averaged", average)):
        loss, accuracy = results[name] = tuple(map(float, score(params, *test_data)))
        print(f"{name:8}  test loss {loss:.4f}, accuracy {accuracy:.2%}")
    return results


if __name__ == "__main__":
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint-dir", type=Path, help="keep checkpoints here")
    main(parser.parse_args().checkpoint_dir)
