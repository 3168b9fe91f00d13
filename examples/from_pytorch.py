# SPDX-License-Identifier: Apache-2.0
"""Continue a PyTorch run in JAX with the same loss curve and the same weights.

    python -m examples.from_pytorch  # after pip install '.[examples,torch]'

A network learns scikit-learn's digits by `torch.optim.ASGD`. The same network in Flax
continues from a checkpoint of halfway. One function converts weights and averages.
"""

import copy
import io
from argparse import SUPPRESS, ArgumentParser
from collections import OrderedDict
from pathlib import Path
from typing import Any

import jax
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import linen as nn
from sklearn.datasets import load_digits
from tqdm import tqdm

from asgd_optax import asgd, averaged_params
from asgd_optax.torch import hyperparams_from_torch, state_from_torch

try:
    import torch
except ModuleNotFoundError:
    raise SystemExit("this needs PyTorch: pip install '.[examples,torch]'") from None

STEPS, EVERY, BATCH_SIZE, RATE, LAMBD, CHANNELS = 2000, 25, 16, 0.2, 1e-3, 8
OUTPUT = Path("out/from_pytorch.png")


def torch_network() -> Any:
    torch.manual_seed(0)
    layers = {
        "unflatten": torch.nn.Unflatten(1, (1, 8, 8)),
        "conv": torch.nn.Conv2d(1, CHANNELS, 3, padding=1),
        "silu": torch.nn.SiLU(),  # smooth, or rounding errors would grow
        "flatten": torch.nn.Flatten(),
        "linear": torch.nn.Linear(CHANNELS * 64, 10),
    }
    return torch.nn.Sequential(OrderedDict(layers))


class Network(nn.Module):  # the same in Flax
    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        hidden = nn.Conv(CHANNELS, (3, 3), name="conv")(images.reshape(-1, 8, 8, 1))
        return nn.Dense(10, name="linear")(nn.silu(hidden).reshape(len(images), -1))


def to_params(weights: dict[str, np.ndarray]) -> dict[str, Any]:
    """Convert torch's weights or averages to Flax's params: channels come last."""
    conv = weights["conv.weight"].transpose(2, 3, 1, 0)
    linear = weights["linear.weight"].reshape(10, CHANNELS, 8, 8).transpose(2, 3, 1, 0)
    kernels = {"conv": conv, "linear": linear.reshape(-1, 10)}
    return {n: {"kernel": k, "bias": weights[f"{n}.bias"]} for n, k in kernels.items()}


def train_in_torch(batches: Any) -> list[Any]:
    """Return checkpoints of network and optimizer, one every `EVERY` steps."""
    network, checkpoints, t0 = torch_network(), [], len(batches) // 4
    asgd = torch.optim.ASGD(network.parameters(), lr=RATE, lambd=LAMBD, t0=t0)
    for step, batch in enumerate(tqdm(batches, desc="torch", unit="step"), 1):
        images, labels = map(torch.from_numpy, batch)
        asgd.zero_grad()
        torch.nn.functional.cross_entropy(network(images), labels).backward()
        asgd.step()
        if step % EVERY == 0:
            checkpoints.append(copy.deepcopy((network.state_dict(), asgd.state_dict())))
    return checkpoints


def move(weights: Any, state: Any) -> tuple[Any, Any]:
    """Convert torch's weights, all of them parameters, and its optimizer state."""
    params = to_params({name: weight.numpy() for name, weight in weights.items()})
    return jax.device_put(params), state_from_torch(state, list(weights), to_params)


@jax.jit
def loss(params: Any, images: Any, labels: Any) -> jax.Array:
    logits = Network().apply({"params": params}, images)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def train_in_jax(batches: Any, checkpoint: Any) -> list[Any]:
    """Train on from a torch checkpoint; return params and averages on the way."""
    (params, opt_state), pairs = move(*checkpoint), []
    tx = asgd(**dict[str, Any](hyperparams_from_torch(checkpoint[1])))

    @jax.jit
    def train_step(params: Any, state: Any, batch: Any) -> Any:
        updates, state = tx.update(jax.grad(loss)(params, *batch), state, params)
        return optax.apply_updates(params, updates), state

    for step, batch in enumerate(tqdm(batches, desc="jax", unit="step"), 1):
        params, opt_state = train_step(params, opt_state, batch)
        if step % EVERY == 0:
            pairs.append((params, averaged_params(opt_state, params)))
    return pairs


def main(output: Path = OUTPUT, dtype: str = "float64", steps: int = STEPS) -> Any:
    """Train both ways, save the figure, print and return the differences."""
    torch.set_default_dtype(getattr(torch, dtype))  # torch's ASGD keeps eta in it
    torch.set_num_threads(1)  # a second thread is slower on small batches
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype(dtype)
    picked = np.random.default_rng(0).integers(400, len(labels), (steps, BATCH_SIZE))
    batches, half = [(images[i], labels[i]) for i in picked], steps // EVERY // 2
    with jax.enable_x64(dtype == "float64"):
        checkpoints = train_in_torch(batches)
        in_jax = train_in_jax(batches[half * EVERY :], checkpoints[half - 1])
        in_torch = [(p, state.ax) for p, state in (move(*c) for c in checkpoints)]
        evaluate = jax.jit(lambda ps: [loss(p, images[:400], labels[:400]) for p in ps])
        alone, moved = (np.array(list(map(evaluate, x))) for x in (in_torch, in_jax))
        apart = jax.tree.map(lambda a, b: abs(a - b).max(), in_torch[-1], in_jax[-1])
    largest = [float(max(jax.tree.leaves(tree))) for tree in apart]
    print(f"after {len(moved) * EVERY} steps in JAX instead of torch the largest")
    print("difference of weights is {:.2g}, of averages {:.2g}".format(*largest))
    plt.style.use(Path(__file__).with_name("style.mplstyle"))
    figure, axes = plt.subplots(figsize=(7, 4))
    when = EVERY * np.arange(1, len(alone) + 1)
    for i, name in enumerate(("iterate", "average")):
        axes.plot(when, alone[:, i], "C3", lw=5, alpha=0.5, label=f"{name} in torch")
        axes.plot(when[half:], moved[:, i], f"C{i}--", label=f"{name}, moved to JAX")
    axes.axvline(half * EVERY, color="0.4", linestyle=":", label="the move")
    axes.set(xlabel="step", ylabel="validation loss (cross-entropy)", yscale="log")
    axes.legend()
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output)
    return {"alone": alone, "moved": moved, "largest": largest}


if __name__ == "__main__":
    parser = ArgumentParser(usage=SUPPRESS, description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, default=OUTPUT, help=f"default {OUTPUT}")
    parser.add_argument("--dtype", choices=("float64", "float32"), default="float64")
    options = parser.parse_args()
    try:  # fail before training, and leave an existing figure as it is
        plt.savefig(io.BytesIO(), format=options.output.suffix[1:])
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.open("ab").close()
    except (OSError, ValueError) as error:
        parser.error(f"argument --output: {error}")
    main(**vars(options))
