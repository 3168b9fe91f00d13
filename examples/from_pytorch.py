# SPDX-License-Identifier: Apache-2.0
"""Move a PyTorch run to JAX in mid-run: same loss curve, same weights.

    python -m examples.from_pytorch  # after pip install '.[examples,torch]'

`torch.optim.ASGD` trains a network on digits. Halfway, a copy of the run moves to Flax.
"""

import copy
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

import jax
import matplotlib.pyplot as plt
import numpy as np
import optax
import torch
from flax import linen as nn
from sklearn.datasets import load_digits

from asgd_optax import asgd, averaged_params
from asgd_optax.torch import hyperparams_from_torch, state_from_torch

STEPS, EVERY, BATCH_SIZE = 2000, 25, 16  # checkpoints are `EVERY` steps apart
OUTPUT = Path("out/from_pytorch.png")


def torch_network() -> Any:
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Unflatten(1, (1, 8, 8)),
        torch.nn.Conv2d(1, 8, 3, padding=1),  # its weights are called "1.weight", …
        torch.nn.SiLU(),  # smooth: rounding errors stay small
        torch.nn.Flatten(),
        torch.nn.Linear(8 * 64, 10),  # "4.weight", …
    )


class Network(nn.Module):  # the same network in Flax
    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        hidden = nn.Conv(8, (3, 3), name="conv")(images.reshape(-1, 8, 8, 1))
        return nn.Dense(10, name="linear")(nn.silu(hidden).reshape(len(images), -1))


def to_params(weights: dict[str, np.ndarray]) -> dict[str, Any]:
    """Convert torch's weights, or their averages, to Flax: channels go last."""
    conv = weights["1.weight"].transpose(2, 3, 1, 0)
    linear = weights["4.weight"].reshape(10, 8, 8, 8).transpose(2, 3, 1, 0)
    return {
        "conv": {"kernel": conv, "bias": weights["1.bias"]},
        "linear": {"kernel": linear.reshape(-1, 10), "bias": weights["4.bias"]},
    }


def convert(weights: Any, state_dict: Any) -> tuple[Any, Any]:
    """Return a checkpoint of torch as parameters and the state of `asgd`."""
    names = list(weights)
    params = to_params({name: weights[name].numpy() for name in names})
    return jax.device_put(params), state_from_torch(state_dict, names, to_params)


def train_in_torch(batches: Any) -> list[Any]:
    """Train in PyTorch and return checkpoints, one for every `EVERY` steps."""
    network, checkpoints, t0 = torch_network(), [], len(batches) // 4
    optimizer = torch.optim.ASGD(network.parameters(), lr=0.2, lambd=1e-3, t0=t0)
    for step, (images, labels) in enumerate(batches, start=1):
        optimizer.zero_grad()
        logits = network(torch.from_numpy(images))
        torch.nn.functional.cross_entropy(logits, torch.from_numpy(labels)).backward()
        optimizer.step()
        if step % EVERY == 0:
            checkpoint = network.state_dict(), optimizer.state_dict()
            checkpoints.append(copy.deepcopy(checkpoint))
    return checkpoints


@jax.jit
def loss(params: Any, images: Any, labels: Any) -> jax.Array:
    logits = Network().apply({"params": params}, images)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def train_in_jax(batches: Any, checkpoint: Any) -> list[Any]:
    """Train on from a checkpoint; return parameters and averages on the way."""
    params, opt_state = convert(*checkpoint)
    hyperparams: dict[str, Any] = hyperparams_from_torch(checkpoint[1])
    tx = asgd(**hyperparams)

    @jax.jit
    def train_step(params: Any, opt_state: Any, batch: Any) -> Any:
        grads = jax.grad(loss)(params, *batch)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    pairs = []
    for step, batch in enumerate(batches, start=1):
        params, opt_state = train_step(params, opt_state, batch)
        if step % EVERY == 0:
            pairs.append((params, averaged_params(opt_state, params)))
    return pairs


def draw(alone: np.ndarray, moved: np.ndarray, output: Path) -> None:
    """Draw PyTorch's losses as lines and JAX's as circles."""
    plt.style.use(Path(__file__).with_name("style.mplstyle"))
    figure, axes = plt.subplots(figsize=(7, 3.6))
    steps = EVERY * np.arange(1, len(alone) + 1)
    after = steps[-len(moved) :]
    for i, name, color in [(1, "average", "C1"), (0, "last iterate", "C0")]:
        axes.plot(steps, alone[:, i], color, label=f"{name}, PyTorch")
        axes.plot(after, moved[:, i], color + "o", mfc="none", label=f"{name}, JAX")
    axes.axvline(after[0] - EVERY, color="0.4", linestyle=":")
    axes.set_title("A run moved to JAX (dotted line) follows PyTorch's curve")
    axes.set(xlabel="step", ylabel="validation loss", ylim=(0, 2 * moved.max()))
    axes.legend(ncols=2)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output)
    plt.close(figure)


def main(output: Path = OUTPUT, dtype: str = "float64", steps: int = STEPS) -> Any:
    """Train both ways, draw the losses, and print the largest differences."""
    torch.set_default_dtype(getattr(torch, dtype))  # torch's ASGD keeps eta in it
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype(dtype)
    picked = np.random.default_rng(0).integers(400, len(labels), (steps, BATCH_SIZE))
    batches = [(images[i], labels[i]) for i in picked]
    validation = images[:400], labels[:400]
    with jax.enable_x64(dtype == "float64"):
        checkpoints = train_in_torch(batches)
        half = len(checkpoints) // 2
        in_jax = train_in_jax(batches[half * EVERY :], checkpoints[half - 1])
        in_torch = [(p, state.ax) for p, state in (convert(*c) for c in checkpoints)]
        alone = np.array([[loss(p, *validation) for p in pair] for pair in in_torch])
        moved = np.array([[loss(p, *validation) for p in pair] for pair in in_jax])
        apart = jax.tree.map(lambda a, b: abs(a - b).max(), in_torch[-1], in_jax[-1])
    weights, averages = (float(max(jax.tree.leaves(tree))) for tree in apart)
    print(f"after {len(moved) * EVERY} steps in JAX instead of PyTorch")
    print(f"weights differ by at most {weights:.2g}, averages by {averages:.2g}")
    draw(alone, moved, output)
    return {"alone": alone, "moved": moved, "largest": (weights, averages)}


if __name__ == "__main__":
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=OUTPUT, help=f"default {OUTPUT}")
    parser.add_argument("--dtype", choices=("float64", "float32"), default="float64")
    main(**vars(parser.parse_args()))
