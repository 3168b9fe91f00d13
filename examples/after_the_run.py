# SPDX-License-Identifier: Apache-2.0
"""Train once at a constant learning rate, then choose the average from checkpoints.

    python -m examples.after_the_run

A small transformer in Flax NNX learns Python's sources. Checkpoints hold three
averages: they give the mean of any window exactly, and any width approximately.
"""

import sysconfig
import tempfile
from argparse import ArgumentParser
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from tqdm import tqdm

from asgd_optax import (
    AverageProfile,
    average_iterates,
    combine_averages,
    gamma_from_width,
    posthoc_coefficients,
    power_weighting,
)
from asgd_optax.checkpoints import average_checkpoints

STEPS, EVERY = 800, 25  # EVERY: steps between checkpoints
RATE, WARMUP = 3e-3, 50  # the learning rate and the steps in which it rises to that
LAYERS, WIDTH, HEADS, CONTEXT, BATCH_SIZE, DTYPE = 4, 128, 4, 128, 16, "float32"
TEXT, OUTPUT = Path(sysconfig.get_path("stdlib")), Path("out/after_the_run.png")
UNIFORM, *POWERS = (f"1/opt_state/{n}/average" for n in (2, 3, 4))  # in checkpoints
NARROW, WIDE = (power_weighting(gamma_from_width(width)) for width in (0.05, 0.1))
KEPT = {UNIFORM: None, POWERS[0]: NARROW, POWERS[1]: WIDE}
TRIED = (0.02, 0.03, 0.04, 0.05, 0.06, 0.08, 0.1, 0.13, 0.17, 0.22)  # other widths


def load(folder: Path) -> list[np.ndarray]:
    """Load bytes for training, validation and test: 8, 1 and 1 of ten files."""
    left_out = {"site-packages", "test", "tests"}
    paths = (path.relative_to(folder) for path in sorted(folder.rglob("*.py")))
    files = [folder / path for path in paths if left_out.isdisjoint(path.parts)]
    training = [file for n, file in enumerate(files) if n % 10 < 8]
    parts = training, files[8::10], files[9::10]
    texts = (b"".join(file.read_bytes() for file in part) for part in parts)
    return [np.frombuffer(text, np.uint8) for text in texts]


def draw_batch(text: np.ndarray, seed: Any) -> np.ndarray:
    """Draw pieces of the text, each one byte longer than the context."""
    starts = np.random.default_rng(seed).integers(len(text) - CONTEXT, size=BATCH_SIZE)
    return text[starts[:, None] + np.arange(CONTEXT + 1)].astype(np.int32)


class Residual(nnx.Sequential):
    def __call__(self, *inputs: Any, **_: Any) -> Any:
        return inputs[0] + super().__call__(*inputs)


def create(rate: Any, seed: int) -> tuple[nnx.Module, nnx.Optimizer[Any]]:
    """Create a transformer, and its optimizer with three averages in the chain."""
    options: Any = {"dtype": DTYPE, "rngs": nnx.Rngs(seed)}
    norm = partial(nnx.RMSNorm, WIDTH, **options)
    attend = partial(jax.nn.dot_product_attention, is_causal=True)
    heads = {"attention_fn": lambda *qkv, **_: attend(*qkv), "decode": False, **options}
    layers: list[Any] = [nnx.Embed(256, WIDTH, **options)]
    places = nnx.Embed(CONTEXT, WIDTH, **options)
    layers += [Residual(lambda x: jnp.arange(x.shape[1]), places)]
    for _ in range(LAYERS):
        attention = nnx.MultiHeadAttention(HEADS, WIDTH, **heads)
        up = nnx.Linear(WIDTH, 4 * WIDTH, **options)
        down = nnx.Linear(4 * WIDTH, WIDTH, **options)
        layers += [Residual(norm(), attention), Residual(norm(), up, nnx.gelu, down)]
    model = nnx.Sequential(*layers, norm(), nnx.Linear(WIDTH, 256, **options))
    first = optax.clip_by_global_norm(1.0), optax.adamw(rate, b2=0.95, weight_decay=0.1)
    tx = optax.chain(*first, *map(average_iterates, KEPT.values()))
    return model, nnx.Optimizer(model, tx, wrt=nnx.Param)


def loss(model: nnx.Module, batch: jax.Array) -> jax.Array:
    logits, targets = model(batch[:, :-1]).astype(jnp.float32), batch[:, 1:]
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()


@nnx.jit
def train_step(model: nnx.Module, optimizer: nnx.Optimizer[Any], batch: Any) -> None:
    optimizer.update(model, nnx.grad(loss)(model, batch))


def average(kept: dict[Any, Any], target: AverageProfile) -> Any:
    """Compute another average of the run from those in its checkpoints."""
    profiles = [AverageProfile(step, KEPT[part]) for part, step in kept]
    fit = posthoc_coefficients(profiles, target)
    return combine_averages([*kept.values()], fit.coefficients)


def main(output: Path = OUTPUT) -> Any:
    """Return losses of the last iterate, of means by their start, and by width."""
    training, validation, _ = load(TEXT)
    model, optimizer = create(optax.warmup_constant_schedule(0, RATE, WARMUP), seed=0)
    saved = range(EVERY, STEPS + 1, EVERY)
    with tempfile.TemporaryDirectory() as run, ocp.CheckpointManager(run) as saver:
        for n in tqdm(range(1, STEPS + 1), desc="training"):
            train_step(model, optimizer, draw_batch(training, (0, n)))
            if n in saved:
                saver.save(n, args=ocp.args.StandardSave(nnx.state((model, optimizer))))
        saver.wait_until_finished()
        read = partial(average_checkpoints, like=nnx.state(model))
        kept = {(p, n): read([f"{run}/{n}"], part=p) for p in KEPT for n in saved}
    pieces = np.stack([draw_batch(validation, n) for n in range(16)])
    score = nnx.jit(lambda model: jax.lax.map(partial(loss, model), pieces).mean())
    iterate, means, widths = float(score(model)), {}, {}
    for start in tqdm(range(0, STEPS, EVERY), desc="starts"):
        nnx.update(model, average(kept, AverageProfile(STEPS, start=start)))
        means[start] = float(score(model))
    for width in tqdm(TRIED, desc="widths"):
        weighting = power_weighting(gamma_from_width(width))
        nnx.update(model, average(kept, AverageProfile(STEPS, weighting)))
        widths[width] = float(score(model))
    plt.style.use(Path(__file__).with_name("style.mplstyle"))
    figure, axes = plt.subplots(1, 2, figsize=(8, 3.4), sharey=True)
    axes[0].set(title="Mean of the last steps", xlabel="start of the mean (step)")
    axes[1].set(title="Power-function average", xlabel="relative width")
    axes[0].set_ylabel("validation loss (nats per byte)")
    for panel, losses in zip(axes, (means, widths), strict=True):
        x = min(losses, key=losses.__getitem__)
        panel.plot(list(losses), list(losses.values()), "C1.-")
        panel.axhline(iterate, color="C0")
        panel.margins(y=0.12)
        line, best = f"last iterate: {iterate:.3f}\n", f"\nbest: {losses[x]:.3f}"
        panel.text(x, iterate, line, color="C0", ha="center", va="center")
        panel.text(x, losses[x], best, color="C1", ha="center", va="center")
        print(f"{panel.get_title()}: best {losses[x]:.3f}, {panel.get_xlabel()} {x}")
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output)
    return iterate, means, widths


if __name__ == "__main__":
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=OUTPUT, help=f"default {OUTPUT}")
    main(parser.parse_args().output)
