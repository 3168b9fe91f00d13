# SPDX-License-Identifier: Apache-2.0
"""ASGD in a Flax Linen `TrainState`: stop, and resume from an Orbax checkpoint.

    python -m examples.linen_train_state [--checkpoint-dir FOLDER]

A small network learns scikit-learn's breast cancer data. The run stops halfway, resumes
from the newest checkpoint, and ends bit for bit as an uninterrupted run. The average is
part of the optimizer's state, so it is saved and restored with it.
"""

import contextlib
import gc
import hashlib
import io
import logging
import sys
import tempfile
import time
from argparse import SUPPRESS, ArgumentParser
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
from flax import linen as nn
from flax.training.train_state import TrainState
from orbax.checkpoint import args
from sklearn.datasets import load_breast_cancer
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler
from tqdm import tqdm, trange

from asgd_optax import asgd, averaged_params

STEPS, SAVE_EVERY, BATCH_SIZE, RATE, T0, CLIP, SEED = 1000, 100, 8, 0.3, 300, 1.0, 0
NETWORK = nn.Sequential([nn.Dense(16), nn.relu, nn.Dense(2)])
KEEP = ocp.CheckpointManagerOptions(max_to_keep=2, cleanup_tmp_directories=True)
KEEP.enable_async_checkpointing = False


def load_splits() -> Any:
    """Load standardised inputs and labels for training and test."""
    x, y = load_breast_cancer(return_X_y=True)
    x, test_x, y, test_y = train_test_split(x, y, stratify=y, random_state=0)
    scale = StandardScaler().fit(x).transform
    return (scale(x), y), (scale(test_x), test_y)


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


def bits(tree: Any) -> bytes:
    """Return the contents of all arrays, with their dtypes and shapes."""
    arrays = map(jnp.asarray, jax.tree.leaves(tree))
    return b"".join(f"{x.dtype}{x.shape}".encode() + x.tobytes() for x in arrays)


def attempt(what: str, function: Callable[..., Any], *given: Any, **named: Any) -> Any:
    """Call a function that reads or writes; on failure, exit with one line."""
    # Orbax's threads log and print a lot about an error, partly later.
    logging.disable(logging.ERROR)
    with contextlib.redirect_stderr(io.StringIO()), contextlib.ExitStack() as stack:
        stack.callback(logging.disable, logging.NOTSET)
        try:
            return function(*given, **named)
        except Exception as error:  # Orbax raises many types
            why = " ".join(str(error).split()).split(" [")[0]
        time.sleep(0.5)  # some threads are not Python's and cannot be joined
        gc.collect()
    tqdm.write(f"cannot {what}: {why}", file=sys.stderr)
    sys.exit(1)


def save(manager: ocp.CheckpointManager, step: int, state: Any, run: Any) -> None:
    """Save a state, and a description of its run."""
    run = args.JsonSave(run | {"sha256": hashlib.sha256(bits(state)).hexdigest()})
    manager.save(step, args=args.Composite(state=args.StandardSave(state), run=run))


def resume(manager: ocp.CheckpointManager, fresh: Any, run: Any) -> tuple[int, Any]:
    """Restore the newest complete checkpoint; without one, return 0 and `fresh`."""
    if (step := manager.latest_step()) is None:  # Orbax skips interrupted saves
        return 0, fresh
    theirs = manager.restore(step, args=args.Composite(run=args.JsonRestore())).run
    if other := [name for name in run if theirs.get(name) != run[name]]:
        raise ValueError(f"it was made with another {' and '.join(other)}")
    target = jax.tree.map(ocp.tree.to_shape_dtype_struct, fresh)
    items = args.Composite(state=args.StandardRestore(target))
    state = manager.restore(step, args=items).state
    if hashlib.sha256(bits(state)).hexdigest() != theirs["sha256"]:
        raise ValueError("these are not the bits that were saved")
    return step, state


def main(checkpoint_dir: Path | None = None, steps: int = STEPS) -> dict[str, Any]:
    """Train with and without interruption, compare, print and return the results."""
    (data, test_data), key = load_splits(), jax.random.key(SEED)
    tx = optax.chain(optax.clip_by_global_norm(CLIP), asgd(RATE, lambd=0.0, t0=T0))
    params = NETWORK.init(key, data[0][:1])["params"]
    fresh = TrainState.create(apply_fn=NETWORK.apply, params=params, tx=tx)
    run: Any = {"rate": RATE, "t0": T0, "batch size": BATCH_SIZE, "seed": SEED}
    run["model or optimizer"] = str(jax.eval_shape(lambda: (params, fresh.opt_state)))
    results: dict[str, Any] = {"starts": []}
    with tempfile.TemporaryDirectory() as temporary:
        folder = (checkpoint_dir or Path(temporary)).absolute()
        what = f"keep checkpoints in {folder}"
        attempt(what, folder.mkdir, parents=True, exist_ok=True)
        with attempt(what, ocp.CheckpointManager, folder, options=KEEP) as manager:
            for stop in (steps // 2, steps):
                # Each of the two starts from the contents of the folder alone.
                what = f"go on from {folder}/{manager.latest_step()}"
                start, state = attempt(what, resume, manager, fresh, run)
                print(f"{'resumed' if start else 'afresh'}: {folder}, step {start}")
                results["starts"].append(start)
                for step in trange(start + 1, stop + 1, disable=None, leave=False):
                    state = train_step(state, key, *data)
                    if step % SAVE_EVERY == 0 or step == stop:
                        attempt(f"save in {folder}", save, manager, step, state, run)
    uninterrupted = fresh
    for _ in trange(int(state.step), disable=None, leave=False):
        uninterrupted = train_step(uninterrupted, key, *data)
    results["bitwise"] = bits(state) == bits(uninterrupted)
    print(f"ended in the same bits as an uninterrupted run: {results['bitwise']}")
    average = averaged_params(state.opt_state, state.params)
    for name, params in (("last", state.params), ("averaged", average)):
        results[name] = tuple(map(float, score(params, *test_data)))
        print("{:8}  test loss {:.4f}, accuracy {:.2%}".format(name, *results[name]))
    return results


if __name__ == "__main__":
    parser = ArgumentParser(usage=SUPPRESS, description=__doc__.partition("\n")[0])
    parser.add_argument("--checkpoint-dir", type=Path, help="keep checkpoints here")
    main(parser.parse_args().checkpoint_dir)
