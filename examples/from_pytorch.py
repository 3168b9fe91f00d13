# SPDX-License-Identifier: Apache-2.0
"""A training begun in PyTorch, taken over here: the same curve, and the same weights.

    pip install '.[examples,torch]'
    python examples/from_pytorch.py

A convolution, a normalisation and a linear layer learn scikit-learn's digits with
`torch.optim.ASGD`. At `--switch` the run is saved, as a checkpoint would be; torch
trains on, and so does the same network in Flax, from the checkpoint and on the same
minibatches. One function converts weights and averages, and its inverse what comes
out. The figure lays the two curves on each other and shows how far apart they are.
"""

import argparse
import contextlib
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx
from matplotlib.ticker import LogLocator
from tqdm import tqdm

from asgd_optax import asgd, averaged_params
from asgd_optax.interop import (
    hyperparams_from_torch,
    state_from_torch,
    state_to_torch,
)

try:
    import torch
except ModuleNotFoundError:  # said when the program is run
    torch = None

try:
    from examples import command_line, digits
except ModuleNotFoundError:  # run as a script, with this folder on the path
    import command_line
    import digits

CHANNELS, GROUPS, SIDE, CLASSES = 8, 4, 8, 10
EPSILON = 1e-5  # of the normalisation: torch's default, Flax has another
RATE, LAMBD, BATCH_SIZE, NOISE = 0.2, 1e-3, 16, 0.2
EVALUATIONS = 80  # along the curves

# Orange and blue of Okabe & Ito, which every kind of colour vision tells apart; pale
# for torch alone. In the order in which they are drawn.
COLORS = {"average": ("#A6CFE8", "#0072B2"), "iterate": ("#F8DFA6", "#B87700")}


class Losses(NamedTuple):
    """Cross-entropies on the validation set, of shape (evaluations,)."""

    iterate: np.ndarray
    average: np.ndarray


class Results(NamedTuple):
    """What a run measured.

    Attributes:
      steps: the steps after which torch was measured. Shape (evaluations,).
      in_torch: the losses there, torch alone.
      moved: the losses at those of `steps` that come after the switch, in JAX.
      weights_difference: the largest, absolute, of the two runs' last weights.
      averages_difference: the same of their averages.
    """

    steps: np.ndarray
    in_torch: Losses
    moved: Losses
    weights_difference: float
    averages_difference: float


class Network(nnx.Module):
    """The network of `torch_network`, on images whose last axis is the channel."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.conv = nnx.Conv(1, CHANNELS, kernel_size=(3, 3), rngs=rngs)
        self.norm = nnx.GroupNorm(
            CHANNELS, num_groups=GROUPS, epsilon=EPSILON, rngs=rngs
        )
        self.linear = nnx.Linear(CHANNELS * SIDE**2, CLASSES, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        images = images.reshape(-1, SIDE, SIDE, 1)
        # Not a ReLU: at its kink the roundings of two programs part for good.
        hidden = nnx.silu(self.norm(self.conv(images)))
        return self.linear(hidden.reshape(len(hidden), -1))


def torch_network() -> Any:
    """A freshly initialised network of torch, the same every time."""
    layers = {
        "unflatten": torch.nn.Unflatten(1, (1, SIDE, SIDE)),
        "conv": torch.nn.Conv2d(1, CHANNELS, kernel_size=3, padding=1),
        "norm": torch.nn.GroupNorm(GROUPS, CHANNELS, eps=EPSILON),
        "silu": torch.nn.SiLU(),
        "flatten": torch.nn.Flatten(),
        "linear": torch.nn.Linear(CHANNELS * SIDE**2, CLASSES),
    }
    network = torch.nn.Sequential()
    for name, layer in layers.items():
        network.add_module(name, layer)
    # Drawn by NumPy, so that torch's own generator is left alone.
    rng = np.random.default_rng(0)
    with torch.no_grad():
        for layer in (network.conv, network.linear):
            bound = layer.weight[0].numel() ** -0.5
            for parameter in layer.parameters():
                drawn = rng.uniform(-bound, bound, tuple(parameter.shape))
                parameter.copy_(torch.from_numpy(drawn))
    return network


def to_params(weights: Mapping[str, np.ndarray]) -> dict[str, dict[str, Any]]:
    """Torch's weights as the parameters of `Network`; its averages, too.

    Torch has the channels before the pixels, in a kernel and in what it flattens.
    """
    linear = weights["linear.weight"].reshape(CLASSES, CHANNELS, SIDE, SIDE)
    return {
        "conv": {
            "kernel": weights["conv.weight"].transpose(2, 3, 1, 0),
            "bias": weights["conv.bias"],
        },
        "norm": {"scale": weights["norm.weight"], "bias": weights["norm.bias"]},
        "linear": {
            "kernel": linear.transpose(2, 3, 1, 0).reshape(-1, CLASSES),
            "bias": weights["linear.bias"],
        },
    }


def from_params(params: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The inverse of `to_params`."""
    conv, norm, linear = params["conv"], params["norm"], params["linear"]
    kernel = linear["kernel"].reshape(SIDE, SIDE, CHANNELS, CLASSES)
    return {
        "conv.weight": conv["kernel"].transpose(3, 2, 0, 1),
        "conv.bias": conv["bias"],
        "norm.weight": norm["scale"],
        "norm.bias": norm["bias"],
        "linear.weight": kernel.transpose(3, 2, 0, 1).reshape(CLASSES, -1),
        "linear.bias": linear["bias"],
    }


def train_in_torch(
    batches: Iterator[digits.Data],
    validation: digits.Data,
    steps: int,
    switch: int,
    checkpoint: Path,
    measured: Callable[[int], bool],
    bar: tqdm,
) -> tuple[list[Losses], Any, Any]:
    """Trains in torch alone; leaves a checkpoint of step `switch` behind."""
    network = torch_network()
    optimizer = torch.optim.ASGD(
        network.parameters(), lr=RATE, lambd=LAMBD, t0=steps // 4
    )
    cross_entropy = torch.nn.functional.cross_entropy
    curve = []
    for step in range(1, steps + 1):
        images, labels = map(torch.from_numpy, next(batches))
        optimizer.zero_grad()
        cross_entropy(network(images), labels).backward()
        optimizer.step()
        if step == switch:
            contents = {
                "names": [name for name, _ in network.named_parameters()],
                "network": network.state_dict(),
                "optimizer": optimizer.state_dict(),
            }
            torch.save(contents, checkpoint)
        if measured(step):
            images, labels = map(torch.from_numpy, validation)
            averages = {
                name: optimizer.state[parameter]["ax"]
                for name, parameter in network.named_parameters()
            }
            with torch.no_grad():
                last = network(images)
                average = torch.func.functional_call(network, averages, (images,))
                pair = [float(cross_entropy(x, labels)) for x in (last, average)]
            curve.append(Losses(*pair))
        bar.update()
    return curve, network.state_dict(), optimizer.state_dict()


def train_in_jax(
    batches: Iterator[digits.Data],
    validation: digits.Data,
    steps: int,
    switch: int,
    checkpoint: Path,
    measured: Callable[[int], bool],
    bar: tqdm,
) -> tuple[list[Losses], dict[str, Any], dict[str, Any]]:
    """Goes on from the checkpoint; returns weights and state as torch has them."""
    contents = torch.load(checkpoint, weights_only=True)
    names = contents["names"]
    weights = {name: contents["network"][name].numpy() for name in names}
    params = jax.tree.map(jnp.array, to_params(weights))
    hyperparams = hyperparams_from_torch(contents["optimizer"])
    tx = asgd(**hyperparams)
    opt_state = state_from_torch(contents["optimizer"], names, to_params)

    graphdef, _ = nnx.split(nnx.eval_shape(lambda: Network(nnx.Rngs(0))))

    @jax.jit
    def loss(params: Any, data: digits.Data) -> jax.Array:
        logits = nnx.merge(graphdef, params)(data.images)
        return jnp.mean(
            optax.softmax_cross_entropy_with_integer_labels(logits, data.labels)
        )

    @jax.jit
    def train_step(params: Any, opt_state: Any, batch: digits.Data) -> Any:
        grads = jax.grad(loss)(params, batch)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    curve = []
    for step in range(switch + 1, steps + 1):
        params, opt_state = train_step(params, opt_state, next(batches))
        if measured(step):
            average = averaged_params(opt_state, params)
            pair = [float(loss(p, validation)) for p in (params, average)]
            curve.append(Losses(*pair))
        bar.update()
    # Torch could go on from here: load_state_dict takes both.
    handed_back = state_to_torch(opt_state, names, from_params, **hyperparams)
    weights = {n: torch.tensor(np.asarray(x)) for n, x in from_params(params).items()}
    return curve, weights, handed_back


def compare(steps: int, switch: int, dtype: str) -> Results:
    """Trains in torch alone, and in JAX from the checkpoint on."""
    splits = digits.load_splits()
    training, validation = (
        data._replace(images=data.images.astype(dtype)) for data in splits[:2]
    )

    def batches(first: int) -> Iterator[digits.Data]:
        stream = digits.minibatches(training, BATCH_SIZE, NOISE, seed=0)
        for _ in range(first):
            next(stream)
        return stream

    every = math.ceil(steps / EVALUATIONS)

    def measured(step: int) -> bool:
        return step % every == 0 or step == steps

    with (
        tempfile.TemporaryDirectory() as folder,
        _settings_of_torch(dtype),
        jax.enable_x64(dtype == "float64"),
        tqdm(total=2 * steps - switch, desc="training", unit="step") as bar,
    ):
        where = Path(folder) / "run.pt"
        shared = {
            "validation": validation,
            "steps": steps,
            "switch": switch,
            "checkpoint": where,
            "measured": measured,
            "bar": bar,
        }
        in_torch, weights, state = train_in_torch(batches(0), **shared)
        moved, moved_weights, moved_state = train_in_jax(batches(switch), **shared)

    def largest(pairs: Any) -> float:
        return max(float((a - b).abs().max()) for a, b in pairs)

    ids = state["state"]
    return Results(
        np.array([step for step in range(1, steps + 1) if measured(step)]),
        Losses(*map(np.array, zip(*in_torch, strict=True))),
        Losses(*map(np.array, zip(*moved, strict=True))),
        largest((weights[name], moved_weights[name]) for name in weights),
        largest((ids[id_]["ax"], moved_state["state"][id_]["ax"]) for id_ in ids),
    )


@contextlib.contextmanager
def _settings_of_torch(dtype: str) -> Iterator[None]:
    """Torch's default dtype, in which its ASGD keeps its rates; one thread.

    On batches this small a second thread costs more than it brings.
    """
    before = torch.get_default_dtype(), torch.get_num_threads()
    torch.set_default_dtype(getattr(torch, dtype))
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_default_dtype(before[0])
        torch.set_num_threads(before[1])


def draw(results: Results, options: argparse.Namespace) -> None:
    """Draws the losses, and under them how far apart those of the two runs are."""
    figure, (upper, lower) = plt.subplots(
        2,
        sharex=True,
        figsize=(7, 5.2),
        height_ratios=(3, 1),
        layout="constrained",
    )
    after = results.steps > options.switch
    for name, (pale, dark) in COLORS.items():
        alone, moved = (getattr(r, name) for r in (results.in_torch, results.moved))
        label = f"{name}, torch alone"
        upper.plot(results.steps, alone, color=pale, linewidth=5, label=label)
        label = f"{name}, moved to JAX"
        upper.plot(results.steps[after], moved, "--", color=dark, label=label)
        # Points, for a difference of zero has no place on a logarithmic axis.
        lower.plot(results.steps[after], np.abs(moved - alone[after]), ".", color=dark)
    for axes in (upper, lower):
        axes.axvline(options.switch, color="0.4", linestyle=":", label="the move")
        # A logarithmic axis has no ticks where all that it shows is zero.
        if any(line.get_ydata().max() > 0 for line in axes.lines[:-1]):
            axes.set_yscale("log")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    upper.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    upper.yaxis.set_major_formatter("{x:g}")
    upper.yaxis.set_minor_formatter("")
    upper.set(
        title=f"Digits: torch alone, and moved to JAX on the way ({options.dtype})",
        ylabel="validation loss (cross-entropy)",
        xlim=(0, options.steps),
    )
    upper.legend(loc="upper right", ncols=2, edgecolor="none", framealpha=1)
    lower.set(xlabel="step", ylabel="|difference|")
    figure.savefig(options.output, dpi=120)
    plt.close(figure)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command_line.Parser(
        "Train in torch, move to JAX on the way; compare with torch alone."
    )
    parser.add_argument(
        "--steps",
        type=command_line.number(int, lambda n: n >= 2, "a whole number, 2 or more"),
        default=2000,
        help="minibatches to train on (default: %(default)s)",
    )
    parser.add_argument(
        "--switch",
        type=command_line.count,
        help="step after which the run moves to JAX (default: half of them)",
    )
    parser.add_argument(
        "--dtype",
        choices=("float64", "float32"),
        default="float64",
        help="of weights, images and rates (default: %(default)s)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("out/from_pytorch.png"),
        help="where to save the figure (default: %(default)s)",
    )
    options = parser.parse_args(argv)
    if options.switch is None:
        options.switch = options.steps // 2
    if options.switch >= options.steps:
        parser.error(
            f"argument --switch: must be less than --steps {options.steps}, not"
            f" {options.switch}"
        )
    if torch is None:
        parser.error("this example needs PyTorch: pip install '.[examples,torch]'")
    command_line.check_output(parser, options.output)
    return options


def main(argv: Sequence[str] | None = None) -> Results:
    """Trains both ways, saves the figure, prints and returns the differences."""
    options = _parse(argv)
    results = compare(options.steps, options.switch, options.dtype)
    draw(results, options)
    trained = options.steps - options.switch
    print(f"Largest difference after {trained} steps in JAX instead of torch")
    print(f"  weights   {results.weights_difference:.2g}")
    print(f"  averages  {results.averages_difference:.2g}")
    for name, loss in results.in_torch._asdict().items():
        moved = getattr(results.moved, name)
        print(f"Validation loss of the {name}: {loss[-1]:.6f}, moved {moved[-1]:.6f}")
    print(f"Figure: {options.output}")
    return results


if __name__ == "__main__":
    main()
