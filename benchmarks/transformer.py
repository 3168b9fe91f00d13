# SPDX-License-Identifier: Apache-2.0
"""Cost of averaging in the training step of a transformer.

    python -m benchmarks.transformer

A decoder-only transformer like GPT-2 (6 layers of 256 with 4 heads, a context of 256
bytes, 4.9 M parameters) reads batches of 8 x 256 bytes from the texts of Python's
`help()`. AdamW with clipping by the global norm runs in one jitted step with a donated
carry. Each of our averages is compared with the same rule written by hand.

Two things are timed: the whole step, and the update alone (clipping, AdamW,
`apply_updates` and the average, with constant gradients). Averaging adds less to the
whole step than two repetitions differ by, so its cost is read from the update. All
repetitions run in a random order, so a machine that slows down slows all of them alike.
Medians and quartiles are reported.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from jax.typing import DTypeLike
from matplotlib.patches import Patch

from asgd_optax import average_iterates
from benchmarks import harness
from benchmarks.by_hand import DECAY, RULES, ByHand, average
from tools import command_line, report

RATE = 3e-4
EVERY = 10
VOCABULARY = 256  # bytes
NONE = "none"
NARROW = "bfloat16: "
HAND, OURS = ", by hand", ", average_iterates"

Params = dict[str, Any]


class Sizes(NamedTuple):
    """Sizes of the network, the batch and the measurement.

    Attributes:
      step_calls: whole steps per repetition.
      update_calls: updates per repetition, a multiple of `EVERY`.
    """

    layers: int
    width: int
    heads: int
    context: int
    batch: int
    step_calls: int
    update_calls: int
    repetitions: int


FULL = Sizes(6, 256, 4, 256, 8, step_calls=1, update_calls=20, repetitions=11)
QUICK = Sizes(1, 16, 2, 16, 4, step_calls=1, update_calls=10, repetitions=2)


class Training(NamedTuple):
    """A training: params -> carry, and (carry, gradients) -> carry.

    The carry holds the parameters, the optimizer's state and the average by hand.
    """

    init: Callable[[Params], Any]
    update: Callable[[Any, Params], Any]


class Row(NamedTuple):
    """Seconds of the whole step and of the update alone."""

    step: harness.Time
    update: harness.Time


def draw_params(sizes: Sizes, dtype: DTypeLike) -> Params:
    """Draw weights as GPT-2: normal with 0.02, less before residuals; gains of one."""
    rng = np.random.default_rng(0)
    width = sizes.width

    def normal(rows: int, columns: int, scale: float = 0.02) -> jax.Array:
        return jnp.array(rng.normal(0, scale, (rows, columns)), dtype)

    def layer() -> Params:
        written = 0.02 / np.sqrt(2 * sizes.layers)
        return {
            "attention_gain": jnp.ones(width, dtype),
            "attention_in": normal(width, 3 * width),
            "attention_out": normal(width, width, written),
            "mlp_gain": jnp.ones(width, dtype),
            "mlp_in": normal(width, 4 * width),
            "mlp_out": normal(4 * width, width, written),
        }

    return {
        "bytes": normal(VOCABULARY, width),
        "positions": normal(sizes.context, width),
        "layers": [layer() for _ in range(sizes.layers)],
        "gain": jnp.ones(width, dtype),
    }


def draw_batch(sizes: Sizes) -> np.ndarray:
    """Draw pieces of the text, each a byte longer than the context."""
    text = np.frombuffer("\n".join(topics.values()).encode(), np.uint8)
    length = sizes.context + 1
    starts = np.random.default_rng(0).integers(len(text) - length, size=sizes.batch)
    return np.stack([text[start : start + length] for start in starts]).astype(np.int32)


def logits(params: Params, inputs: jax.Array, heads: int) -> jax.Array:
    """Return the logits of the byte that follows each input."""
    x = params["bytes"][inputs] + params["positions"]
    for layer in params["layers"]:
        y = normalized(x, layer["attention_gain"]) @ layer["attention_in"]
        split = y.reshape(*y.shape[:-1], 3, heads, -1)
        q, k, v = (split[..., n, :, :] for n in range(3))
        y = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        x += y.reshape(x.shape) @ layer["attention_out"]
        y = jax.nn.gelu(normalized(x, layer["mlp_gain"]) @ layer["mlp_in"])
        x += y @ layer["mlp_out"]
    return normalized(x, params["gain"]) @ params["bytes"].T


def loss(params: Params, batch: jax.Array, heads: int) -> jax.Array:
    """Return the mean cross-entropy of the next byte."""
    inputs, targets = batch[:, :-1], batch[:, 1:]
    y = widened(logits(params, inputs, heads))
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(y, targets))


def widened(x: jax.Array) -> jax.Array:
    """Convert to float32 if narrower."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def normalized(x: jax.Array, gain: jax.Array) -> jax.Array:
    """Scale to a root mean square of one, times the gain."""
    wide = widened(x)
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + 1e-6)
    return (wide * scale).astype(x.dtype) * gain


def adamw(*last: optax.GradientTransformation) -> optax.GradientTransformation:
    optimizer = optax.adamw(RATE, b1=0.9, b2=0.95, weight_decay=0.1)
    return optax.chain(optax.clip_by_global_norm(1.0), optimizer, *last)


def train_with(
    tx: optax.GradientTransformation, by_hand: ByHand | None = None
) -> Training:
    """Return the usual update, followed by an average by hand if given."""

    def init(params: Params) -> Any:
        # Copy, because the steps donate their carry.
        params = jax.tree.map(jnp.array, params)
        carry = params, tx.init(params)
        return (*carry, by_hand.init(params)) if by_hand else carry

    def update(carry: Any, grads: Params) -> Any:
        params, state, *averages = carry
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        if by_hand:
            averages = [by_hand.update(averages[0], params)]
        return params, state, *averages

    return Training(init, update)


def trainings() -> dict[str, Training]:
    """Return the rows; those named so have parameters in bfloat16."""

    def pair(name: str, rule: str, **options: Any) -> dict[str, Training]:
        ours = average_iterates(RULES[rule].weighting, **options)
        return {
            name + HAND: train_with(adamw(), average(RULES[rule], **options)),
            name + OURS: train_with(adamw(ours)),
        }

    return {
        NONE: train_with(adamw()),
        **pair("EMA", "EMA"),
        **pair("power", "power"),
        **pair(f"uniform, every={EVERY}", "uniform", every=EVERY),
        **pair("uniform, compensated", "uniform", compensated=True),
        NARROW + NONE: train_with(adamw()),
        **pair(f"{NARROW}EMA", "EMA"),
    }


def base_of(name: str) -> str:
    """Return the row without an average that a row is compared with."""
    return NARROW + NONE if name.startswith(NARROW) else NONE


def same_by_hand(name: str) -> str | None:
    """Return the row by hand that one of ours is compared with."""
    return name.removesuffix(OURS) + HAND if name.endswith(OURS) else None


def whole_step(sizes: Sizes, training: Training) -> Callable[[Any, jax.Array], Any]:
    """Return (carry, batch) -> carry as one compiled step."""

    @partial(jax.jit, donate_argnums=0)
    def step(carry: Any, batch: jax.Array) -> Any:
        return training.update(carry, jax.grad(loss)(carry[0], batch, sizes.heads))

    return step


def contestants(
    sizes: Sizes, trained: Mapping[str, Training]
) -> dict[str, harness.Contestant]:
    """Return the whole step and the update alone of every row."""
    batch = jnp.array(draw_batch(sizes))
    params = {
        base: draw_params(sizes, dtype)
        for base, dtype in ((NONE, "float32"), (NARROW + NONE, "bfloat16"))
    }

    def setup(
        init: Callable[[], Any], step: Callable[[Any, Any], Any], given: Any
    ) -> Callable[[], None]:
        carry = init()

        def call() -> None:
            nonlocal carry
            carry = jax.block_until_ready(step(carry, given))

        return call

    timed = {}
    for name, training in trained.items():
        start = params[base_of(name)]
        init = partial(training.init, start)
        step = whole_step(sizes, training)
        update = jax.jit(training.update, donate_argnums=0)
        # The parameters serve as gradients, because clipping makes them small.
        timed[f"{name} step"] = harness.Contestant(
            partial(setup, init, step, batch), sizes.step_calls
        )
        timed[f"{name} update"] = harness.Contestant(
            partial(setup, init, update, start), sizes.update_calls
        )
    return timed


def measure(sizes: Sizes) -> dict[str, Row]:
    """Time all rows in one run."""
    trained = trainings()
    times = harness.measure(contestants(sizes, trained), sizes.repetitions)
    return {
        name: Row(times[f"{name} step"], times[f"{name} update"]) for name in trained
    }


def added(rows: Mapping[str, Row], name: str) -> harness.Time:
    """Return what the average adds, in percent of the step without one."""
    base = rows[base_of(name)]
    return harness.Time(
        *(
            100 * (seconds - base.update.median) / base.step.median
            for seconds in rows[name].update
        )
    )


def format_rows(rows: Mapping[str, Row]) -> str:
    """Format the table: ratios to the row without an average and to the one by hand."""

    def spread(time: harness.Time, digits: int) -> str:
        median, *quartiles = (f"{1e3 * seconds:.{digits}f}" for seconds in time)
        return f"{median} ({' to '.join(quartiles)})"

    lines = []
    for name, row in rows.items():
        over, share, ratio = "", "", ""
        if (base := base_of(name)) != name:
            over = f"{100 * (row.step.median / rows[base].step.median - 1):+.1f}"
            share = f"{added(rows, name).median:.2f}"
        if same := same_by_hand(name):
            ratio = f"{row.update.median / rows[same].update.median:.2f}"
        step, update = spread(row.step, 0), spread(row.update, 1)
        lines.append([name, step, over, update, share, ratio])
    header = ["", "step (ms)", "over none (%)", "update alone (ms)"]
    return report.table([*header, "average, of a step (%)", "update / by hand"], lines)


PAGE = """\
# Cost of averaging in a transformer's training step

A decoder-only transformer of {parameters} parameters ({layers} layers of {width},
{heads} heads, a context of {context} bytes) reads batches of {batch} x {context} bytes.
The optimizer is AdamW with clipping. One compiled step is timed on the {device}, in
float32 unless stated otherwise. Medians (and quartiles) of {repetitions} repetitions.

{table}

- *step*: forward, backward, update and average. *over none*: the median relative to the
  row without an average. That row's own quartiles are {noise:.1f} % apart, so smaller
  differences mean nothing.
- *update alone*: clipping, AdamW, `apply_updates` and the average, with the gradients
  given; {calls} per repetition. *average, of a step*: what the average adds to the
  update, in percent of the whole step without an average. The share shrinks as batches
  grow, because the cost of an average does not depend on the batch.
- *by hand*: the same rule as a `tree_map` after `apply_updates` (`by_hand.py`);
  *update / by hand*: our update over that one. Decay of the EMAs: {decay}.
- *every={every}*: the whole steps that are timed do not average; one in {every} of the
  updates does.
- *bfloat16*: parameters, gradients, moments and the network's computation; the average
  is in float32.
"""


def format_page(rows: Mapping[str, Row], sizes: Sizes) -> str:
    """Format the table and its explanation."""
    parameters = jax.tree.leaves(draw_params(sizes, "float32"))
    step = rows[NONE].step
    return PAGE.format(
        **sizes._asdict(),
        parameters=f"{sum(leaf.size for leaf in parameters):,}",
        device=jax.devices()[0].device_kind.replace("cpu", "CPU"),
        table=format_rows(rows),
        noise=100 * (step.high - step.low) / step.median,
        calls=sizes.update_calls,
        decay=DECAY,
        every=EVERY,
    )


def draw(rows: Mapping[str, Row], output: Path) -> None:
    """Draw a bar for what each average adds, with its quartiles."""
    plt.style.use(report.STYLE)
    figure, axes = plt.subplots(figsize=(8, 4.6))
    for name in rows:
        if name == base_of(name):
            continue
        median, low, high = added(rows, name)
        bar = axes.barh(
            name,
            median,
            color="C1" if name.endswith(OURS) else "C2",
            xerr=([median - low], [high - median]),
            error_kw={"ecolor": "0.4", "elinewidth": 1},
        )
        axes.bar_label(bar, fmt="{:.2f}", padding=3, fontsize=8)
    axes.invert_yaxis()
    figure.suptitle("Cost of averaging in the training step of a transformer")
    step = rows[NONE].step.median
    axes.set_xlabel(f"% of a step without ({step:.2g} s): median and quartiles")
    axes.grid(visible=False, axis="y")
    axes.set_axisbelow(True)
    axes.margins(x=0.1)
    colors = {"this library": "C1", "by hand": "C2"}
    handles = [Patch(color=color, label=label) for label, color in colors.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=2)
    figure.savefig(output)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> None:
    """Time, and write the table and the picture."""
    parser = command_line.report_parser("Cost of averaging in a transformer's step.")
    options = parser.parse_args(argv)
    sizes = QUICK if options.quick else FULL
    rows = measure(sizes)
    report.write("benchmarks.transformer", format_page(rows, sizes), options.output)
    draw(rows, options.output / "transformer.png")


if __name__ == "__main__":
    main()
