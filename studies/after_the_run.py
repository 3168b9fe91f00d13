# SPDX-License-Identifier: Apache-2.0
"""One run at a constant learning rate, averaged afterwards, compared with schedules.

    python -m studies.after_the_run

Trains the transformer of `examples/after_the_run.py` in three ways for each seed:

- at a constant learning rate, with checkpoints;
- along a cosine to zero, with a new run for every horizon;
- with a linear cooldown to zero over the last fifth of the horizon, which resumes from
  the constant run's checkpoint.

All runs of a seed begin with the same weights and see the same batches. The validation
text chooses the start or the width of an average. All losses are measured on the test
text, which is used for nothing else.

Trainings whose results are in the folder of the runs are not repeated. Use another
folder for another text or dtype.
"""

import argparse
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

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
    combine_averages,
    gamma_from_width,
    posthoc_coefficients,
    power_weighting,
)
from asgd_optax.checkpoints import average_checkpoints, decay_coefficients
from examples import after_the_run as lesson
from tools import command_line, report

COOLDOWN = 0.2  # the last fraction of the horizon
VALIDATION, TEST = 16, 64  # batches of 16 pieces
ITERATE = "0"  # the model's part of a checkpoint
WINDOW = "constant rate, its best mean"
COSINE, LINEAR = "cosine to 0", "linear cooldown"
ROWS = {
    "constant rate, last iterate": "C0",
    "constant rate, mean of all": "C4",
    WINDOW: "C1",
    "constant rate, its best width": "C1",
    "constant rate, merged as by 1 - x": "C4",
    "constant rate, merged as by 1 - sqrt(x)": "C4",
    COSINE: "C2",
    LINEAR: "C5",
}


class Sizes(NamedTuple):
    """Sizes of the study.

    Attributes:
      horizons: steps of the scheduled runs; the constant run takes the longest.
      ends: steps between two points of the picture's curves.
    """

    horizons: tuple[int, ...]
    ends: int


FULL = Sizes((250, 500, 1000), 100)
QUICK = Sizes((125, 250), 125)
# Sizes of the network and the batches for `--quick`.
TINY = {"LAYERS": 1, "WIDTH": 16, "HEADS": 2, "CONTEXT": 16, "BATCH_SIZE": 4}


class Curves(NamedTuple):
    """Test losses of the constant run by step, and the start of the best mean."""

    iterate: dict[int, float]
    window: dict[int, float]
    start: dict[int, int]


def constant_rate() -> optax.Schedule:
    return optax.warmup_constant_schedule(0.0, lesson.RATE, lesson.WARMUP)


def branches(horizon: int) -> dict[str, tuple[int, optax.Schedule]]:
    """Return the step from which each scheduled run continues, and its schedule."""
    warmup, rate = lesson.WARMUP, lesson.RATE
    cosine = optax.warmup_cosine_decay_schedule(0.0, rate, warmup, horizon)
    length = round(COOLDOWN * horizon)
    down = optax.linear_schedule(rate, 0.0, length)
    first = horizon - length
    linear = optax.join_schedules([constant_rate(), down], [first])
    return {COSINE: (0, cosine), LINEAR: (first, linear)}


def train(
    text: np.ndarray,
    seed: int,
    schedule: optax.Schedule,
    steps: Sequence[int],
    run: Path | None = None,
    save: Callable[[int, Any], None] | None = None,
) -> Any:
    """Train for these steps, and return the model's parameters.

    Steps that do not begin at 1 resume from a checkpoint of `run`. `save` is called
    after every step with its number, and with the model and optimizer.
    """
    trained = lesson.create(schedule, seed)
    if steps[0] > 1 and run is not None:
        state = nnx.state(trained)
        abstract = jax.tree.map(ocp.tree.to_shape_dtype_struct, state)
        with ocp.CheckpointManager(run.absolute()) as manager:
            args = ocp.args.StandardRestore(abstract)
            nnx.update(trained, manager.restore(steps[0] - 1, args=args))
    for n in tqdm(steps, desc=f"seed {seed}", leave=False):
        lesson.train_step(*trained, lesson.draw_batch(text, (seed, n)))
        if save is not None:
            save(n, trained)
    return nnx.state(trained[0])


def train_constant(text: np.ndarray, seed: int, steps: int, run: Path) -> None:
    """Train at the constant learning rate, with checkpoints."""
    finished = run / f"finished_{steps}"
    if finished.exists():
        return
    shutil.rmtree(run, ignore_errors=True)  # an interrupted run
    with ocp.CheckpointManager(run.absolute()) as manager:

        def save(n: int, trained: Any) -> None:
            if n % lesson.EVERY == 0:
                manager.save(n, args=ocp.args.StandardSave(nnx.state(trained)))

        train(text, seed, constant_rate(), range(1, steps + 1), save=save)
    finished.touch()


def train_scheduled(
    text: np.ndarray, seed: int, name: str, horizon: int, folder: Path
) -> Path:
    """Train along a schedule, and return the path of the model's checkpoint."""
    path = folder.absolute() / f"{name.split()[0]}_{horizon}"
    if not path.exists():
        first, schedule = branches(horizon)[name]
        steps = range(first + 1, horizon + 1)
        params = train(text, seed, schedule, steps, folder / "constant")
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(path, params)
    return path


class Run:
    """The run at the constant learning rate: its averages and their losses."""

    def __init__(self, folder: Path, steps: int, score: Callable[..., float]) -> None:
        self.steps = range(lesson.EVERY, steps + 1, lesson.EVERY)
        self.like = nnx.state(lesson.create(0.0, 0)[0])
        self.score = score
        # The model is small, so each average is read only once.
        self.kept = {
            (part, n): average_checkpoints([folder / str(n)], part=part, like=self.like)
            for part in (ITERATE, *lesson.KEPT)
            for n in self.steps
        }

    def average(self, parts: Sequence[str], steps: Any, target: AverageProfile) -> Any:
        """Reconstruct an average from the kept ones."""
        kept = [(part, n) for part in parts for n in steps]
        profiles = [AverageProfile(n, lesson.KEPT[part]) for part, n in kept]
        fit = posthoc_coefficients(profiles, target)
        return combine_averages([self.kept[key] for key in kept], fit.coefficients)

    def mean(self, start: int, end: int) -> Any:
        steps = [n for n in (start, end) if n]
        target = AverageProfile(end, start=start)
        return self.average([lesson.UNIFORM], steps, target)

    def power(self, width: float, end: int) -> Any:
        weighting = power_weighting(gamma_from_width(width))
        steps = range(lesson.EVERY, end + 1, lesson.EVERY)
        return self.average(lesson.POWERS, steps, AverageProfile(end, weighting))

    def merged(self, schedule: str, end: int) -> Any:
        """Merge the checkpoints of the cooldown's steps as this decay would."""
        first = end - round(COOLDOWN * end)
        iterates = [self.kept[ITERATE, n] for n in self.steps if first <= n <= end]
        coefficients = decay_coefficients(len(iterates), schedule)
        return combine_averages(iterates, coefficients)

    def best_start(self, end: int) -> int:
        """Choose the start of the mean up to `end` by the validation text."""
        starts = range(0, end, lesson.EVERY)
        return min(starts, key=lambda n: self.score(self.mean(n, end), validate=True))

    def best_width(self, end: int) -> float:
        return min(
            lesson.TRIED,
            key=lambda width: self.score(self.power(width, end), validate=True),
        )


def scorer(validation: np.ndarray, test: np.ndarray) -> Callable[..., float]:
    """Return a function that measures the loss of parameters in either text."""
    graphdef = nnx.graphdef(lesson.create(0.0, 0)[0])

    def stacked(text: np.ndarray, batches: int) -> jax.Array:
        return jnp.stack([lesson.draw_batch(text, n) for n in range(batches)])

    @jax.jit
    def measure(params: Any, pieces: jax.Array) -> jax.Array:
        model = nnx.merge(graphdef, params)
        return jax.lax.map(partial(lesson.loss, model), pieces).mean()

    texts = stacked(validation, VALIDATION), stacked(test, TEST)

    def score(params: Any, *, validate: bool = False) -> float:
        return float(measure(params, texts[not validate]))

    return score


def study(
    texts: Sequence[np.ndarray], seed: int, sizes: Sizes, folder: Path
) -> tuple[dict[int, dict[str, float]], Curves]:
    """Return a seed's losses by horizon and row, and its curves."""
    training, validation, test = texts
    steps = max(sizes.horizons)
    train_constant(training, seed, steps, folder / "constant")
    scheduled = {
        (name, horizon): train_scheduled(training, seed, name, horizon, folder)
        for horizon in sizes.horizons
        for name in (COSINE, LINEAR)
    }
    score = scorer(validation, test)
    run = Run(folder / "constant", steps, score)
    ends = sorted({*range(sizes.ends, steps + 1, sizes.ends), *sizes.horizons})
    curves = Curves({}, {}, {})
    for end in tqdm(ends, desc=f"seed {seed}, means", leave=False):
        curves.iterate[end] = score(run.kept[ITERATE, end])
        curves.start[end] = run.best_start(end)
        curves.window[end] = score(run.mean(curves.start[end], end))
    rows = {}
    for end in sizes.horizons:
        losses = [
            curves.iterate[end],
            score(run.mean(0, end)),
            curves.window[end],
            score(run.power(run.best_width(end), end)),
            score(run.merged("linear", end)),
            score(run.merged("minus_sqrt", end)),
            *(
                score(average_checkpoints([scheduled[name, end]], like=run.like))
                for name in (COSINE, LINEAR)
            ),
        ]
        rows[end] = dict(zip(ROWS, losses, strict=True))
    return rows, curves


PAGE = """\
# One run at a constant learning rate compared with schedules

A decoder-only transformer in Flax NNX ({parameters} parameters: {layers} layers of
{width}, a context of {context} bytes, batches of {batch}, {dtype}) learns
{megabytes:.1f} MB of Python's standard library by bytes: AdamW at {rate:g} (b2 0.95,
weight decay 0.1) after a warm-up of {warmup} steps, with clipped gradients. Test losses
in nats per byte, mean ± standard deviation over {seeds} seeds; all choices are made on
the validation text. In brackets: the mean difference from the linear cooldown.

{table}

- *best mean*: of the parameters after some step, reconstructed by
  `posthoc_coefficients` from two uniform averages in checkpoints {every} steps apart.
  The best were the last {lengths} steps of {horizons}.
- *best width*: a power-function average, reconstructed from widths 0.05 and 0.10.
- *merged*: the parameters in the checkpoints of the last {percent:g} %, weighted by
  `decay_coefficients` (WSM, Tian et al. 2025); 1 - x gives their mean.
- *cosine*, *linear cooldown* (of the last {percent:g} %): each is trained for its own
  horizon; the cooldown resumes from a checkpoint of the constant run. All share one
  peak learning rate, which was not tuned for any of them.

![Losses by steps](after_the_run.png)
"""


def format_page(
    rows: Sequence[Mapping[int, Mapping[str, float]]],
    curves: Sequence[Curves],
    sizes: Sizes,
    bytes_read: int,
) -> str:
    def cell(horizon: int, name: str) -> str:
        losses = np.array([of_seed[horizon][name] for of_seed in rows])
        over = losses - [of_seed[horizon][LINEAR] for of_seed in rows]
        text = report.spread(losses, 3)
        return text if name == LINEAR else f"{text} ({np.mean(over):+.3f})"

    header = ["", *(f"{horizon:,} steps" for horizon in sizes.horizons)]
    table = [[name, *(cell(n, name) for n in sizes.horizons)] for name in ROWS]
    lengths = [
        " / ".join(str(end - of_seed.start[end]) for of_seed in curves)
        for end in sizes.horizons
    ]
    parameters = jax.tree.leaves(nnx.state(lesson.create(0.0, 0)[0]))
    return PAGE.format(
        parameters=f"{sum(leaf.size for leaf in parameters):,}",
        layers=lesson.LAYERS,
        width=lesson.WIDTH,
        context=lesson.CONTEXT,
        batch=lesson.BATCH_SIZE,
        dtype=lesson.DTYPE,
        megabytes=bytes_read / 1e6,
        rate=lesson.RATE,
        warmup=lesson.WARMUP,
        seeds=len(rows),
        table=report.table(header, table),
        every=lesson.EVERY,
        lengths=", ".join(lengths),
        horizons=", ".join(f"{horizon:,}" for horizon in sizes.horizons),
        percent=100 * COOLDOWN,
    )


def draw(
    rows: Sequence[Mapping[int, Mapping[str, float]]],
    curves: Sequence[Curves],
    output: Path,
) -> None:
    """Draw the constant run's curves, and a point for every scheduled run."""
    plt.style.use(report.STYLE)
    figure, axes = plt.subplots(figsize=(7, 4.4))
    shown = {
        "constant rate: last iterate": ("C0", [c.iterate for c in curves]),
        "constant rate: best mean": ("C1", [c.window for c in curves]),
    }
    for label, (color, of_seeds) in shown.items():
        losses = np.array([list(losses.values()) for losses in of_seeds])
        steps = list(of_seeds[0])
        axes.fill_between(steps, losses.min(0), losses.max(0), fc=color, alpha=0.2)
        axes.plot(steps, losses.mean(0), ".-", color=color, label=label)
    for name, marker in (COSINE, "s"), (LINEAR, "v"):
        horizons = list(rows[0])
        losses = np.array([[of_seed[n][name] for n in horizons] for of_seed in rows])
        label = f"{name}, trained for its horizon"
        axes.plot(horizons, losses.mean(0), marker, color=ROWS[name], label=label, ms=8)
    axes.set(xlabel="steps", ylabel="test loss (nats per byte)", yscale="log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.set_title(f"Mean and range of {len(rows)} seeds")
    axes.legend()
    figure.savefig(output)
    plt.close(figure)


def parser_of(
    name: str, description: str, seeds: str, kept: str
) -> command_line.Parser:
    """Return a parser of the options of a study of the example's transformer.

    Args:
      name: module of the study.
      description: its description.
      seeds: meaning of `--seeds`.
      kept: what the folder of the runs is for.
    """
    parser = command_line.report_parser(description)
    parser.add_argument(
        "--seeds",
        type=command_line.whole_number(1, 100),
        default=3,
        help=f"{seeds} (default: %(default)s)",
    )
    parser.add_argument(
        "--text",
        type=Path,
        default=lesson.TEXT,
        help="folder of Python files to read (default: the standard library)",
    )
    parser.add_argument(
        "--runs",
        type=Path,
        default=Path("out") / name,
        help=f"folder for {kept} (default: %(default)s)",
    )
    return parser


def runs_of(options: argparse.Namespace) -> Path:
    """Return the folder of the runs. With `--quick`, make the transformer tiny."""
    if not options.quick:
        return options.runs
    for name, value in TINY.items():
        setattr(lesson, name, value)
    return options.runs / "quick"


def main(argv: Sequence[str] | None = None) -> None:
    """Train what is missing, measure, and write the table and the picture."""
    parser = parser_of(
        "after_the_run",
        "One averaged run compared with schedules.",
        "trainings of each kind",
        "the checkpoints, 1 GB per seed",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="dtype of the network's computation (default: %(default)s)",
    )
    options = parser.parse_args(argv)
    sizes, runs = QUICK if options.quick else FULL, runs_of(options)
    lesson.DTYPE = options.dtype
    texts = lesson.load(options.text)
    rows, curves = [], []
    for seed in range(options.seeds):
        row, curve = study(texts, seed, sizes, runs / f"seed_{seed}")
        rows.append(row)
        curves.append(curve)
    page = format_page(rows, curves, sizes, sum(map(len, texts)))
    report.write("studies.after_the_run", page, options.output)
    draw(rows, curves, options.output / "after_the_run.png")


if __name__ == "__main__":
    main()
