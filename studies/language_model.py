# SPDX-License-Identifier: Apache-2.0
"""Five ways to end a run of the language model, over several seeds.

    python -m studies.language_model [--data FILE_OR_FOLDER]

Trains the model of `examples/language_model.py` on the text of Python's `help()`, or on
other English text (Penn Treebank, WikiText-2). One run of SGD at a constant learning
rate gives four of the models: its last iterate, its best iterate on the validation set,
the average of `nt_asgd`, which begins when the validation loss stops improving, and an
EMA. (With `lambd=0`, `nt_asgd` takes the same steps as SGD.) A second run divides its
learning rate by 4 whenever the validation loss is above its lowest.

The loss of the average is well below that of the iterates it averages, and below that
of the best iterate. No schedule and no start had to be chosen. But other methods do as
well: a learning rate that is divided in time, and an EMA, which is slightly better.
"""

import functools
import math
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from matplotlib.ticker import MaxNLocator
from tqdm import tqdm

from asgd_optax import (
    average_iterates,
    averaged_params,
    exponential_weighting,
    nt_asgd,
)
from examples import language_model as lesson
from examples.language_model import BATCH_SIZE, BPTT, LanguageModel
from tools import command_line, report

EMA_DECAY = 0.999
WEIGHT_DECAY = 1.2e-6

# The text.
UNKNOWN, LINE_END = "<unk>", "<eos>"
PARTS = ("train", "valid", "test")
BLOCK = 10  # consecutive paragraphs that stay in one part
MIN_COUNT = 3  # rarer words are unknown, unless the text has its own vocabulary

# The models compared, and their colours.
LABELS = {
    "last": "SGD, last iterate",
    "best": "SGD, best iterate",
    "average": "NT-ASGD, average",
    "ema": f"SGD, EMA {EMA_DECAY:g}",
    "divided": "SGD, rate / 4 on plateau",
}
COLORS = {"last": "C0", "best": "C5", "average": "C1", "ema": "C2", "divided": "C4"}


class Corpus(NamedTuple):
    """A text in three parts, with words as indices into `words`."""

    words: list[str]
    training: np.ndarray
    validation: np.ndarray
    test: np.ndarray


class Windows(NamedTuple):
    """A text in consecutive windows. Shapes (windows, batch, BPTT).

    Attributes:
      inputs: words.
      targets: the word after each input.
      weights: 1, or 0 after the end of the text.
    """

    inputs: np.ndarray
    targets: np.ndarray
    weights: np.ndarray


class State(NamedTuple):
    """The state of one seed's training.

    Attributes:
      params: the iterate of SGD at a constant learning rate.
      opt_state: its optimizer's state, with the averages.
      best: the iterate with the lowest validation loss so far.
      divided: the iterate of the second run.
      rate: the learning rate of the second run.
      losses: validation losses after each epoch, infinite for epochs to come; the keys
        are those of `LABELS` without "best". Each of shape (epochs,).
      triggered: whether NT-ASGD averaged in each epoch. Shape (epochs,).
    """

    params: Any
    opt_state: Any
    best: Any
    divided: Any
    rate: jax.Array
    losses: dict[str, jax.Array]
    triggered: jax.Array


class Results(NamedTuple):
    """The results; the keys of the dictionaries are those of `LABELS`.

    Attributes:
      curves: validation perplexities after each epoch, each of shape (epochs, seeds).
      test: test perplexities after the last epoch, each of shape (seeds,).
      triggers: the epochs after which NT-ASGD began to average, infinite if it never
        did. Shape (seeds,).
    """

    curves: dict[str, np.ndarray]
    test: dict[str, np.ndarray]
    triggers: np.ndarray


def split(text: str) -> list[str]:
    """Split a text into training, validation and test parts, 8:1:1."""
    # Manuals repeat themselves. Repeated paragraphs, and tables, which are all alike,
    # would leak from training into the test part.
    paragraphs: dict[str, list[str]] = {}
    for paragraph in re.split(r"\n\s*\n", text):
        # Drop lines without words, such as a heading's underline.
        lines = [line for line in paragraph.split("\n") if re.search(r"\w", line)]
        is_table = re.search(r"^\s*(\+[-=+]{3,}|\||={2,} +=)", paragraph, re.MULTILINE)
        if lines and not is_table:
            paragraphs.setdefault(" ".join(paragraph.split()), lines)
    parts: list[list[str]] = [[], [], []]
    for i, lines in enumerate(paragraphs.values()):
        block = i // BLOCK % 10
        parts[max(0, block - 7)] += lines
    return ["\n".join(lines) for lines in parts]


def load(data: Path | None) -> Corpus:
    """Load the text of a file, of a folder's three files, or of Python's `help()`."""
    word, min_count = r"\w+|[^\w\s]", MIN_COUNT
    if data is None:
        texts = split("\n\n".join(topics[name] for name in sorted(topics)))
    elif data.is_dir():
        # In such files words are separated by spaces, and rare ones are replaced.
        word, min_count, texts = r"\S+", 1, []
        for part in PARTS:
            (file,) = data.glob(f"*{part}*")
            texts.append(file.read_text(encoding="utf-8"))
    else:
        texts = split(data.read_text(encoding="utf-8-sig"))
    parts = [
        [w for line in text.splitlines() for w in [*re.findall(word, line), LINE_END]]
        for text in texts
    ]
    counts = Counter(parts[0])
    del counts[UNKNOWN]  # comes first, whether or not the text has it
    words = [UNKNOWN, *sorted(w for w, n in counts.items() if n >= min_count)]
    index = {w: i for i, w in enumerate(words)}
    return Corpus(words, *(np.array([index.get(w, 0) for w in p]) for p in parts))


def cut(tokens: np.ndarray) -> Windows:
    """Arrange a text as `BATCH_SIZE` parallel lines, cut into windows."""
    length = math.ceil((len(tokens) - 1) / BATCH_SIZE)
    windows = math.ceil(length / BPTT)

    def arrange(values: np.ndarray) -> np.ndarray:
        values = np.pad(values, (0, BATCH_SIZE * length - len(values)))
        lines = values.reshape(BATCH_SIZE, length)
        lines = np.pad(lines, ((0, 0), (0, windows * BPTT - length)))
        return lines.reshape(BATCH_SIZE, windows, BPTT).swapaxes(0, 1)

    weights = np.ones(len(tokens) - 1, np.float32)
    return Windows(arrange(tokens[:-1]), arrange(tokens[1:]), arrange(weights))


class Setup(NamedTuple):
    """The static arguments of the compiled training."""

    model: LanguageModel
    rate: float
    nonmono: int
    epochs: int


def optimizer(setup: Setup) -> optax.GradientTransformationExtraArgs:
    """Return SGD at a constant learning rate, with two averages of its iterates."""
    return optax.named_chain(
        ("clip", optax.clip_by_global_norm(lesson.MAX_GRADIENT_NORM)),
        (
            "average",
            nt_asgd(setup.rate, nonmono=setup.nonmono, weight_decay=WEIGHT_DECAY),
        ),
        ("ema", average_iterates(exponential_weighting(EMA_DECAY))),
    )


def sgd(rate: jax.Array) -> optax.GradientTransformationExtraArgs:
    """Return the same SGD, without averages and at any learning rate."""
    tx = optax.chain(
        optax.clip_by_global_norm(lesson.MAX_GRADIENT_NORM),
        optax.add_decayed_weights(WEIGHT_DECAY),
        optax.sgd(rate),
    )
    return optax.with_extra_args_support(tx)


def models(state: State) -> dict[str, Any]:
    """Return the params of the models compared."""
    return {
        "last": state.params,
        "best": state.best,
        # With two averages in one chain, each is read by name.
        "average": averaged_params(state.opt_state["average"], state.params),
        "ema": averaged_params(state.opt_state["ema"], state.params),
        "divided": state.divided,
    }


@functools.partial(jax.jit, static_argnames="setup")
def create(setup: Setup, seed: Any) -> State:
    """Return a seed's state before the first epoch."""
    word, carry = jnp.zeros((1, 1), int), (jnp.zeros((1, setup.model.hidden)),) * 2
    params = setup.model.init(jax.random.key(seed), word, carry)
    return State(
        params,
        optimizer(setup).init(params),
        best=params,
        divided=params,
        rate=jnp.float32(setup.rate),
        losses={
            name: jnp.full(setup.epochs, jnp.inf) for name in LABELS if name != "best"
        },
        triggered=jnp.zeros(setup.epochs, bool),
    )


@functools.partial(jax.jit, static_argnames="setup")
def train_epoch(
    setup: Setup,
    state: State,
    seed: Any,
    epoch: Any,
    training: Windows,
    validation: Windows,
) -> State:
    """Train both runs of a seed for an epoch, and validate them."""
    key = jax.random.fold_in(jax.random.key(seed), epoch)
    train = functools.partial(lesson.train_epoch, setup.model)
    before = state.losses
    loss = jnp.where(epoch == 0, jnp.nan, before["last"][epoch - 1])
    params, opt_state = train(
        optimizer(setup), training, key, (state.params, state.opt_state), loss
    )

    def train_divided() -> Any:
        tx = sgd(state.rate)
        fresh = (state.divided, tx.init(state.divided))
        return train(tx, training, key, fresh, jnp.nan)[0]

    # Until its learning rate is divided, the second run is the first.
    divided = jax.lax.cond(state.rate == setup.rate, lambda: params, train_divided)

    state = state._replace(params=params, opt_state=opt_state, divided=divided)
    candidates = models(state)
    del candidates["best"]  # evaluated in its own epoch
    losses = evaluate(setup.model, candidates, validation)
    better = losses["last"] < before["last"].min()
    worse = losses["divided"] > before["divided"].min()
    return state._replace(
        best=jax.tree.map(lambda p, b: jnp.where(better, p, b), params, state.best),
        rate=jnp.where(worse, state.rate / 4, state.rate),
        losses={name: before[name].at[epoch].set(losses[name]) for name in before},
        triggered=state.triggered.at[epoch].set(opt_state["average"].triggered),
    )


@functools.partial(jax.jit, static_argnames="model")
def evaluate(
    model: LanguageModel, candidates: dict[str, Any], text: Windows
) -> dict[str, jax.Array]:
    """Return the mean cross-entropy of several params."""
    stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *candidates.values())
    losses = jax.lax.map(
        functools.partial(lesson.mean_cross_entropy, model, text), stacked
    )
    return dict(zip(candidates, losses, strict=True))


def perplexity(loss: Any) -> np.ndarray:
    """Return the perplexity, exp of the mean cross-entropy."""
    with np.errstate(over="ignore"):
        return np.exp(np.asarray(loss, float))


def train(setup: Setup, corpus: Corpus, seeds: int) -> list[State]:
    """Train all seeds to the last epoch."""
    training, validation = cut(corpus.training), cut(corpus.validation)
    states = []
    with tqdm(desc="training", unit="epoch", total=setup.epochs * seeds) as bar:
        for seed in range(seeds):
            state = create(setup, seed)
            for epoch in range(setup.epochs):
                state = train_epoch(setup, state, seed, epoch, training, validation)
                now = {k: perplexity(v[epoch]) for k, v in state.losses.items()}
                bar.set_postfix_str(
                    f"perplexity: last {now['last']:.1f}, average {now['average']:.1f}"
                )
                bar.update()
            states.append(state)
    return states


def measure(setup: Setup, corpus: Corpus, states: list[State]) -> Results:
    """Return the curves of trained seeds, and their test perplexities."""
    model, test = setup.model, cut(corpus.test)
    curves = {
        name: perplexity(np.stack([state.losses[name] for state in states], axis=-1))
        for name in states[0].losses
    }
    curves["best"] = np.fmin.accumulate(curves["last"])
    losses = [evaluate(model, models(state), test) for state in states]
    triggers = [
        np.argmax(state.triggered) if state.triggered.any() else math.inf
        for state in states
    ]
    return Results(
        curves={name: curves[name] for name in LABELS},
        test={name: perplexity([loss[name] for loss in losses]) for name in LABELS},
        triggers=np.array(triggers, float),
    )


def tables(results: Results) -> str:
    """Format the perplexities: mean ± standard deviation, and those of each seed."""
    final = {name: curve[-1] for name, curve in results.curves.items()}
    header, rows = ["", "validation perplexity", "test perplexity"], []
    for name, label in LABELS.items():
        cells = [report.spread(x[name], 2) for x in (final, results.test)]
        rows.append([label, *cells])
    below = [
        f"in {np.sum(x['average'] < x['last'])} of {len(x['last'])} seeds"
        for x in (final, results.test)
    ]
    rows.append(["NT-ASGD below SGD's last", *below])
    of_seeds = []
    for seed, trigger in enumerate(results.triggers):
        cells = [
            f"{x['last'][seed]:.2f}, {x['average'][seed]:.2f}"
            for x in (final, results.test)
        ]
        when = f"epoch {trigger:g}" if trigger < math.inf else "never"
        of_seeds.append([str(seed), when, *cells])
    columns = ["seed", "averages after", "validation: last, average", "test: the same"]
    return f"{report.table(header, rows)}\n\n{report.table(columns, of_seeds)}"


def draw(results: Results, output: Path) -> None:
    """Draw the validation perplexities: the median and the range over the seeds."""
    plt.style.use(report.STYLE)
    figure, axes = plt.subplots(figsize=(7, 4.5))
    epochs, seeds = results.curves["last"].shape
    when = np.arange(1, epochs + 1)
    for name, label in LABELS.items():
        curve = results.curves[name]
        if name == "average":
            # Until the first trigger, the average is the iterate in every seed.
            began = when >= results.triggers.min()
            curve = np.where(began[:, None], curve, np.nan)
        color, dashed = COLORS[name], "--" if name == "best" else "-"
        low, middle, high = np.quantile(curve, [0, 0.5, 1], axis=-1)
        axes.fill_between(when, low, high, color=color, alpha=0.15, linewidth=0)
        axes.plot(when, middle, dashed, color=color, label=label)
    triggers = results.triggers[results.triggers < math.inf]
    if len(triggers):
        axes.axvspan(
            triggers.min(), triggers.max(), color="C1", alpha=0.08, linewidth=0
        )
        axes.axvline(
            np.median(triggers), color="C1", linestyle=":", label="NT-ASGD triggers"
        )
    axes.set(
        title=f"Word-level LSTM, {seeds} seeds: median and range",
        xlabel="epoch",
        ylabel="validation perplexity",
        xlim=(1, max(2, epochs)),
    )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    curves = np.stack(list(results.curves.values()))
    if np.isfinite(curves).any():
        # Leave the first epochs out, which are far above.
        lowest = curves[np.isfinite(curves)].min()
        axes.set_ylim(0.97 * lowest, 1.7 * lowest)
    axes.legend(loc="upper right")
    figure.savefig(output)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> Results:
    """Train, save the figure, print the tables and return the perplexities."""
    parser = command_line.Parser(
        "Train an LSTM language model; compare SGD, NT-ASGD, EMA and a decayed rate."
    )
    parser.add_argument(
        "--data",
        type=Path,
        help="a text file with blank lines between paragraphs, or a folder with one"
        " file each named train, valid and test and spaces between words, such as Penn"
        " Treebank or WikiText (default: the texts of Python's help())",
    )
    parser.add_argument(
        "--rate",
        type=command_line.positive,
        default=25.0,
        help="learning rate (default: %(default)s)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("out/language_model.png"),
        help="where to save the figure (default: %(default)s)",
    )
    for name, default, meaning in (
        ("--nonmono", 3, "latest epochs that a validation loss is not compared with"),
        ("--epochs", 24, "passes over the text"),
        ("--hidden", 128, "units of the LSTM, and of the embedding"),
        ("--seeds", 3, "models to train, with different initial weights and dropout"),
    ):
        parser.add_argument(
            name,
            type=command_line.whole_number(),
            default=default,
            help=f"{meaning} (default: %(default)s)",
        )
    options = parser.parse_args(argv)
    corpus = load(options.data)
    model = LanguageModel(len(corpus.words), options.hidden)
    setup = Setup(model, options.rate, options.nonmono, options.epochs)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    results = measure(setup, corpus, train(setup, corpus, options.seeds))
    draw(results, options.output)
    sizes = [
        f"{len(part)} ({part_name})"
        for part_name, part in zip(PARTS, corpus[1:], strict=True)
    ]
    print(f"{', '.join(sizes)} words, {len(corpus.words)} different ones\n")
    print(tables(results))
    settings = {
        name: str(value) if isinstance(value, Path) else value
        for name, value in vars(options).items()
        if value is not None
    }
    print(report.describe(settings))
    return results


if __name__ == "__main__":
    main()
