# SPDX-License-Identifier: Apache-2.0
"""ASGD in a Flax Linen `TrainState`, stopped and resumed from an Orbax checkpoint.

    python examples/linen_train_state.py

A small network learns scikit-learn's breast cancer data. Halfway its training state
is saved, and a new start resumes from the saved one: it ends in the very bits of a
run that nothing interrupted. The averaged iterate is then compared with the last.
"""

import argparse
import hashlib
import math
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

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

BATCH_SIZE = 8
NETWORK = nn.Sequential([nn.Dense(16), nn.relu, nn.Dense(2)])


class Results(NamedTuple):
    """What a run found; losses and accuracies are those on the test set."""

    starts: list[int]  # the step from which each of the two starts went on
    bitwise: bool  # whether they ended in the bits of the uninterrupted run
    last_loss: float
    last_accuracy: float
    average_loss: float
    average_accuracy: float


def load_splits() -> tuple[list[jax.Array], list[jax.Array]]:
    """Standardised inputs and labels: to train on, and to test on."""
    inputs, labels = load_breast_cancer(return_X_y=True)
    splits = train_test_split(inputs, labels, stratify=labels, random_state=0)
    scaler = StandardScaler().fit(splits[0])
    inputs, test_inputs = (jnp.float32(scaler.transform(x)) for x in splits[:2])
    labels, test_labels = (jnp.array(y) for y in splits[2:])
    return [inputs, labels], [test_inputs, test_labels]


def score(params: Any, inputs: jax.Array, labels: jax.Array) -> tuple[Any, Any]:
    """The mean cross-entropy and the accuracy."""
    logits = NETWORK.apply({"params": params}, inputs)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return losses.mean(), jnp.mean(logits.argmax(-1) == labels)


@jax.jit
def train_step(state: TrainState, key: Any, inputs: Any, labels: Any) -> TrainState:
    """One step, on a minibatch that is a function of the step's number."""
    # So the state is all that a resumed run needs to go on with the same minibatches.
    key = jax.random.fold_in(key, state.step)
    rows = jax.random.randint(key, (BATCH_SIZE,), 0, len(labels))
    grads, _ = jax.grad(score, has_aux=True)(state.params, inputs[rows], labels[rows])
    return state.apply_gradients(grads=grads)


def bits(state: TrainState) -> list[tuple[np.dtype, bytes]]:
    """The bytes of all params and of all the optimizer holds: step, eta, mu and ax."""
    arrays = map(np.asarray, jax.tree.leaves((state.params, state.opt_state)))
    return [(array.dtype, array.tobytes()) for array in arrays]


def stamp(folder: Path, run: str) -> bytes:
    """Which run a checkpoint is of, and the checksum of its files."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    contents = b"".join(path.read_bytes() for path in files)
    return f"{run}\nsha256 {hashlib.sha256(contents).hexdigest()}\n".encode()


def save(folder: Path, state: TrainState, run: str) -> None:
    """Saves `state` in `folder`, under the number of its step."""
    step = int(state.step)
    with ocp.CheckpointManager(folder) as manager:
        manager.save(step, args=ocp.args.StandardSave(state))
    # Orbax reads a flipped bit without a word, and where a file is cut its threads
    # print pages of tracebacks: hence a stamp, made when all files are written.
    (folder / f"{step}.stamp").write_bytes(stamp(folder / str(step), run))


def resume(folder: Path, fresh: TrainState, run: str) -> TrainState:
    """The newest state saved in `folder`, `fresh` where the folder is empty."""
    names = [path.name for path in folder.iterdir()]
    if not names:
        return fresh
    step = max((int(name) for name in names if name.isdecimal()), default=0)
    mark = folder / f"{step}.stamp"
    if not mark.is_file() or mark.read_bytes() != stamp(folder / str(step), run):
        raise ValueError(
            f"{folder} is not empty, and its newest checkpoint is damaged or was made"
            " with another model, --rate, --t0 or --seed"
        )
    abstract = jax.tree.map(ocp.tree.to_shape_dtype_struct, fresh)
    with ocp.CheckpointManager(folder) as manager:
        return manager.restore(step, args=ocp.args.StandardRestore(abstract))


def parse(argv: Sequence[str] | None) -> tuple[Any, Callable[[str], NoReturn]]:
    """The options, and what ends the program with an error in one of them."""
    # Without the usage, an error is one line.
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS,
        description="Train with ASGD; interrupt and resume; compare, bit for bit.",
    )
    numbers = (
        ("steps", int, 1000, "steps in all", lambda n: n >= 2, "2 or more"),
        ("rate", float, 0.3, "step size", lambda r: 0 < r < math.inf, "positive"),
        ("t0", float, 300.0, "averaging begins there", lambda t: t >= 0, "0 to inf"),
        ("seed", int, 0, "random seed", lambda s: 0 <= s < 2**32, "0 to 2**32 - 1"),
    )
    for name, kind, default, meaning, _, wanted in numbers:
        text = f"{meaning}; {wanted} (default: %(default)s)"
        parser.add_argument(f"--{name}", type=kind, default=default, help=text)
    parser.add_argument(
        "--checkpoint-dir",
        type=Path,
        help="keeps the checkpoints; a later start with the same options, or more"
        " --steps, resumes from the newest (default: a temporary folder)",
    )
    options = parser.parse_args(argv)
    for name, _, _, _, accepts, wanted in numbers:
        if not accepts(got := getattr(options, name)):
            parser.error(f"argument --{name}: must be {wanted}, not {got}")
    return options, parser.error


def main(argv: Sequence[str] | None = None) -> Results:
    """Trains with an interruption and without, compares, prints and returns that."""
    options, fail = parse(argv)
    data, test_data = load_splits()
    key = jax.random.key(options.seed)
    tx = optax.chain(
        optax.clip_by_global_norm(1.0), asgd(options.rate, lambd=0.0, t0=options.t0)
    )
    params = NETWORK.init(key, data[0][:1])["params"]
    fresh = TrainState.create(apply_fn=NETWORK.apply, params=params, tx=tx)
    shapes = jax.tree.map(lambda x: f"{x.dtype}{x.shape}", (params, fresh.opt_state))
    run = f"{options.rate} {options.t0} {options.seed} {shapes}"

    def train(state: TrainState, stop: int) -> TrainState:
        for _ in range(int(state.step), stop):
            state = train_step(state, key, *data)
        return state

    starts = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.checkpoint_dir or Path(temporary)).resolve()
        for stop in (options.steps // 2, options.steps):
            # Each turn knows no more than a new process would: what the folder holds.
            try:
                folder.mkdir(parents=True, exist_ok=True)
                tempfile.TemporaryFile(dir=folder).close()  # can we write there?
                state = resume(folder, fresh, run)
            except (OSError, ValueError) as error:
                fail(f"argument --checkpoint-dir: {error}")
            starts.append(int(state.step))
            if state.step > options.steps:
                fail(f"argument --steps: {folder} is at {state.step} already")
            if state.step < stop:
                state = train(state, stop)
                save(folder, state, run)
    bitwise = bits(state) == bits(train(fresh, options.steps))
    average = averaged_params(state.opt_state, state.params)
    last_scores, average_scores = (
        [float(value) for value in score(params, *test_data)]
        for params in (state.params, average)
    )
    print(f"started at step {starts[0]}, resumed at step {starts[1]}")
    print(f"ended in the same bits as an uninterrupted run: {bitwise}")
    print("test      loss    accuracy")
    print("last      {:.4f}  {:.2%}".format(*last_scores))
    print("averaged  {:.4f}  {:.2%}".format(*average_scores))
    return Results(starts, bitwise, *last_scores, *average_scores)


if __name__ == "__main__":
    main()
