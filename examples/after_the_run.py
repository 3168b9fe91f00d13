# SPDX-License-Identifier: Apache-2.0
"""Train once at a constant learning rate, then choose the average from checkpoints.

    python -m examples.after_the_run

A small transformer in Flax NNX learns Python's sources. Checkpoints hold three
averages: they give the mean of any window exactly, and any width approximately.
"""

import io
import sysconfig
import tempfile
from argparse import SUPPRESS, ArgumentParser
from functools import cache, partial
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
    AverageProfile as Profile,
    average_iterates,
    combine_averages,
    gamma_from_width as gamma,
    posthoc_coefficients,
    power_weighting as power,
)
from asgd_optax.checkpoints import average_checkpoints

STEPS, EVERY, RATE, WARMUP = 800, 25, 3e-3, 50  # EVERY: between checkpoints
LAYERS, WIDTH, HEADS, CONTEXT, BATCH_SIZE, DTYPE = 4, 128, 4, 128, 16, "float32"
UNIFORM, *POWERS = (f"1/opt_state/{n}/average" for n in (2, 3, 4))  # in checkpoints
KEPT = {UNIFORM: None, POWERS[0]: power(gamma(0.05)), POWERS[1]: power(gamma(0.1))}
TRIED = (0.02, 0.03, 0.04, 0.05, 0.06, 0.08, 0.1, 0.13, 0.17, 0.22)  # other widths
TEXT, OUTPUT = Path(sysconfig.get_path("stdlib")), Path("out/after_the_run.png")


def load(folder: Path) -> list[np.ndarray]:
    """Load bytes for training, validation and test: 8, 1 and 1 of ten files."""
    parts, left_out = [b"", b"", b""], {"site-packages", "test", "tests"}
    files = (file.relative_to(folder) for file in sorted(folder.rglob("*.py")))
    for n, file in enumerate(f for f in files if left_out.isdisjoint(f.parts)):
        parts[max(0, n % 10 - 7)] += (folder / file).read_bytes()
    return [np.frombuffer(part, np.uint8) for part in parts]


def draw_batch(text: np.ndarray, seed: Any) -> np.ndarray:
    """Draw pieces of the text, each one byte longer than the context."""
    starts = np.random.default_rng(seed).integers(len(text) - CONTEXT, size=BATCH_SIZE)
    return text[starts[:, None] + np.arange(CONTEXT + 1)].astype(np.int32)


class Residual(nnx.Sequential):
    def __call__(self, *inputs: Any, **_: Any) -> Any:
        return inputs[0] + super().__call__(*inputs)


def create(rate: Any, seed: int) -> tuple[nnx.Module, nnx.Optimizer[Any]]:
    """Create a decoder of bytes, and its optimizer with three averages in the chain."""
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


def average(run: Path, target: Profile, read: Any) -> Any:
    """Compute another average of the run from those in its checkpoints."""
    kept = [(UNIFORM, n) for n in (target.start, target.step) if n]  # exact
    if target.weighting:  # approximate
        kept = [(part, n) for part in POWERS for n in range(EVERY, STEPS + 1, EVERY)]
    profiles = [Profile(n, KEPT[part]) for part, n in kept]
    held = (read((run / str(n),), part=part) for part, n in kept)
    return combine_averages(held, posthoc_coefficients(profiles, target).coefficients)


def main(output: Path = OUTPUT) -> Any:
    """Return losses of the last iterate, of means by end and start, and by width."""
    training, validation, _ = load(TEXT)
    model, optimizer = create(optax.warmup_constant_schedule(0, RATE, WARMUP), seed=0)
    pieces = np.stack([draw_batch(validation, n) for n in range(16)])
    score = nnx.jit(lambda model: jax.lax.map(partial(loss, model), pieces).mean())
    with tempfile.TemporaryDirectory() as run, ocp.CheckpointManager(run) as saver:
        for n in tqdm(range(1, STEPS + 1), desc="training"):
            train_step(model, optimizer, draw_batch(training, (0, n)))
            if n % EVERY == 0:
                saver.save(n, args=ocp.args.StandardSave(nnx.state((model, optimizer))))
        saver.wait_until_finished()
        like, iterate, means = nnx.state(model), float(score(model)), {}
        read = cache(partial(average_checkpoints, like=like))  # small: keep all

        def tried(*profile: Any) -> float:
            nnx.update(model, average(Path(run), Profile(*profile), read))
            return float(score(model))

        for end in tqdm(range(8 * EVERY, STEPS + 1, 8 * EVERY), desc="means"):
            means[end] = {n: tried(end, None, n) for n in range(0, end, EVERY)}
        widths = {w: tried(STEPS, power(gamma(w))) for w in tqdm(TRIED, desc="widths")}
    plt.style.use(Path(__file__).with_name("style.mplstyle"))
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4), sharey=True)
    for end, losses in means.items():
        left.plot(losses.keys(), losses.values(), "C1.-", alpha=end / STEPS, label=end)
    right.plot(widths.keys(), widths.values(), ".-", color="C1")
    print(f"Losses at step {STEPS}: iterate {iterate:.3f}, mean {means[STEPS][0]:.3f}")
    tables = (left, "mean from step", means[STEPS]), (right, "width", widths)
    for axes, label, losses in tables:
        axes.axhline(iterate, color="C0", label="last iterate")
        axes.set(xlabel=label, ylabel="validation loss (nats a byte)")
        best = min(losses, key=losses.__getitem__)
        print(f"best {label} {best}: {losses[best]:.3f}")
    left.legend(title="mean up to step")
    figure.savefig(output)
    return iterate, means, widths


if __name__ == "__main__":
    parser = ArgumentParser(usage=SUPPRESS, description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, default=OUTPUT, help=f"default {OUTPUT}")
    output = parser.parse_args().output
    try:  # fail before training, and leave an existing figure as it is
        plt.savefig(io.BytesIO(), format=output.suffix[1:])
        output.parent.mkdir(parents=True, exist_ok=True)
        output.open("ab").close()
    except (OSError, ValueError) as error:
        parser.error(f"argument --output: {error}")
    main(output)
