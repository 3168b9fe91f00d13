# SPDX-License-Identifier: Apache-2.0
"""Five ways to end a run of the language-model lesson, over several seeds.

    python -m benchmarks.language_model [--data FILE_OR_FOLDER]

The model and its training are the lesson's (`examples/language_model.py`); the text is
that of Python's `help()`, or any other English (Penn Treebank, WikiText-2). One
trajectory of SGD at a constant rate gives four of the models compared: its last
iterate, its best one on the validation set, the average that `nt_asgd` begins when the
validation loss stops improving, and an exponential moving average. (With `lambd=0`,
`nt_asgd` changes nothing about the iterate.) A second trajectory divides its rate by 4
whenever the validation loss is above its lowest.

What it shows: the average is well below the iterates that it averages, and below the
best of them, without a schedule to tune and without knowing beforehand when to begin.
What it does not show: that nothing else does as well. A rate divided in time does,
and an exponential moving average is a little better.

With `--checkpoint-dir` a run that was killed goes on from its last whole epoch, to
the same table.
"""

import functools
import hashlib
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import orbax.checkpoint as ocp
from matplotlib.ticker import MaxNLocator
from tqdm import tqdm

from asgd_optax import (
    average_iterates,
    averaged_params,
    exponential_weighting,
    nt_asgd,
)
from benchmarks import command_line
from examples import language_model as lesson
from examples.language_model import BATCH_SIZE, BPTT, LanguageModel
from examples.linen_train_state import KEEP, attempt, resume, save

EMA_DECAY = 0.999
SAMPLE_LENGTH = 120  # words

# The text.
UNKNOWN, LINE_END = "<unk>", "<eos>"
PARTS = ("train", "valid", "test")
BLOCK = 10  # paragraphs that stay together in one part
MIN_COUNT = 3  # rarer words of a text that comes without a vocabulary are unknown

# The models compared, and how each is drawn.
LABELS = {
    "last": "SGD, last iterate",
    "best": "SGD, best iterate",
    "average": "NT-ASGD, average",
    "ema": f"SGD, EMA {EMA_DECAY:g}",
    "divided": "SGD, rate / 4 on plateau",
}
COLORS = {"last": "C0", "best": "C5", "average": "C1", "ema": "C2", "divided": "C4"}


class Corpus(NamedTuple):
    """A text in three parts, every word its index in `words`."""

    words: list[str]
    training: np.ndarray
    validation: np.ndarray
    test: np.ndarray


class Windows(NamedTuple):
    """A text in windows, which follow each other. Shapes (windows, batch, BPTT).

    Attributes:
      inputs: words.
      targets: the word after each of them.
      weights: 1, or 0 where the text has ended.
    """

    inputs: np.ndarray
    targets: np.ndarray
    weights: np.ndarray


class State(NamedTuple):
    """All that the rest of one seed's run depends on.

    Attributes:
      params: the iterate of SGD at a constant rate.
      opt_state: its optimizer's, with the averages.
      best: the iterate with the lowest validation loss so far.
      divided: the iterate of the second trajectory.
      rate: its rate.
      losses: on the validation set at the end of each epoch, infinite where that is
        still to come; the keys are those of `LABELS`, without the best iterate's.
        Each of shape (epochs,).
      triggered: whether NT-ASGD was averaging in that epoch. Shape (epochs,).
    """

    params: Any
    opt_state: Any
    best: Any
    divided: Any
    rate: jax.Array
    losses: dict[str, jax.Array]
    triggered: jax.Array


class Results(NamedTuple):
    """What a run measured; the keys of the dictionaries are those of `LABELS`.

    Attributes:
      curves: validation perplexities after each epoch, each of shape (epochs, seeds).
      test: test perplexities after the last epoch, each of shape (seeds,).
      triggers: the epochs after which NT-ASGD began to average, infinite where it
        did not. Shape (seeds,).
      sample: text that the first seed's average wrote.
    """

    curves: dict[str, np.ndarray]
    test: dict[str, np.ndarray]
    triggers: np.ndarray
    sample: str


def read(file: Path) -> str:
    """The text in a file."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        raise ValueError(f"{file} is not text in UTF-8")
    if not text.strip():
        raise ValueError(f"{file} is empty")
    return text


def split(text: str) -> list[str]:
    """The training, validation and test part of a text, 8:1:1."""
    # Manuals repeat themselves: a paragraph that is in two parts of the text, and
    # tables, which are all alike, would make the test part known from training.
    paragraphs: dict[str, list[str]] = {}
    for paragraph in re.split(r"\n\s*\n", text):
        # Nor is there a word in a heading's underline.
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
    """The text in a file or in a folder's three files, or else that of `help()`."""
    word, min_count = r"\w+|[^\w\s]", MIN_COUNT
    if data is None:
        texts = split("\n\n".join(topics[name] for name in sorted(topics)))
    elif data.is_dir():
        # Such files have their words set apart, and the rare ones replaced.
        word, min_count = r"\S+", 1
        texts = []
        for part in PARTS:
            files = [
                file
                for file in data.iterdir()
                if file.is_file() and [p for p in PARTS if p in file.name] == [part]
            ]
            if len(files) != 1:
                found = ", ".join(sorted(file.name for file in files)) or "none"
                raise ValueError(
                    f"{data} must have one file with {part!r} in its name, as in"
                    f" ptb.{part}.txt; found {found}"
                )
            texts.append(read(files[0]))
    elif data.is_file():
        texts = split(read(data))
    else:
        raise ValueError(f"there is no file or folder {str(data)!r}")
    parts = [
        [w for line in text.splitlines() for w in [*re.findall(word, line), LINE_END]]
        for text in texts
    ]
    for name, tokens in zip(PARTS, parts, strict=True):
        if len(tokens) <= BATCH_SIZE * BPTT:
            raise ValueError(
                f"too little text: {len(tokens)} words in the {name} part, and a batch"
                f" takes {BATCH_SIZE * BPTT + 1} (a file is split between paragraphs)"
            )
    counts = Counter(parts[0])
    del counts[UNKNOWN]  # which comes first, whether or not the text has it
    words = [UNKNOWN, *sorted(w for w, n in counts.items() if n >= min_count)]
    index = {w: i for i, w in enumerate(words)}
    return Corpus(words, *(np.array([index.get(w, 0) for w in p]) for p in parts))


def cut(tokens: np.ndarray) -> Windows:
    """The text as `BATCH_SIZE` long lines one under the other, cut into windows."""
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
    """What the training is compiled for."""

    model: LanguageModel
    rate: float
    nonmono: int
    epochs: int


def optimizer(setup: Setup) -> optax.GradientTransformationExtraArgs:
    """Constant-rate SGD, watched by two averages that change nothing about it."""
    return optax.named_chain(
        ("clip", optax.clip_by_global_norm(lesson.CLIP)),
        (
            "average",
            nt_asgd(
                setup.rate, nonmono=setup.nonmono, weight_decay=lesson.WEIGHT_DECAY
            ),
        ),
        ("ema", average_iterates(exponential_weighting(EMA_DECAY))),
    )


def sgd(rate: jax.Array) -> optax.GradientTransformationExtraArgs:
    """The same SGD, without averages and at any rate."""
    tx = optax.chain(
        optax.clip_by_global_norm(lesson.CLIP),
        optax.add_decayed_weights(lesson.WEIGHT_DECAY),
        optax.sgd(rate),
    )
    return optax.with_extra_args_support(tx)


def models(state: State) -> dict[str, Any]:
    """The params of the models compared."""
    return {
        "last": state.params,
        "best": state.best,
        # Two averages in one chain: each is read by the name of its link.
        "average": averaged_params(state.opt_state["average"], state.params),
        "ema": averaged_params(state.opt_state["ema"], state.params),
        "divided": state.divided,
    }


@functools.partial(jax.jit, static_argnames="setup")
def create(setup: Setup, seed: Any) -> State:
    """A seed's state before the first epoch."""
    word = jnp.zeros((1, 1), int)
    params = setup.model.init(jax.random.key(seed), word, start(setup.model))
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
    """Both trajectories of a seed through the text once, and their validation."""
    # All randomness is a function of seed, epoch and window: none is left to save.
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

    # Until its rate is first divided, the second trajectory is the first.
    divided = jax.lax.cond(state.rate == setup.rate, lambda: params, train_divided)

    state = state._replace(params=params, opt_state=opt_state, divided=divided)
    candidates = models(state)
    del candidates["best"]  # known from its own epoch
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
    """The mean cross-entropy of each of several params."""
    stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *candidates.values())
    losses = jax.lax.map(
        functools.partial(lesson.mean_cross_entropy, model, text), stacked
    )
    return dict(zip(candidates, losses, strict=True))


def start(model: LanguageModel) -> Any:
    """What is carried into the first window of one text alone."""
    return (jnp.zeros((1, model.hidden)),) * 2


@functools.partial(jax.jit, static_argnames=("model", "length"))
def sample(
    model: LanguageModel, params: Any, first: jax.Array, key: Any, length: int
) -> jax.Array:
    """The `length` words that a model writes after the `first` one."""

    def step(loop: Any, key: Any) -> Any:
        word, carry = loop
        logits, carry = model.apply(params, word[None, None], carry)
        # No text has a word for the unknown ones.
        word = jax.random.categorical(key, logits[0, 0].at[0].set(-jnp.inf))
        return (word, carry), word

    keys = jax.random.split(key, length)
    return jax.lax.scan(step, (first, start(model)), keys)[1]


def identity(setup: Setup, corpus: Corpus, fresh: list[State]) -> dict[str, Any]:
    """What has to be the same for a run to go on from a checkpoint."""

    def digest(*parts: Any) -> str:
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:12]

    recipe = (BATCH_SIZE, BPTT, lesson.DROPOUT, lesson.CLIP, lesson.WEIGHT_DECAY)
    return {
        "rate": setup.rate,
        "nonmono": setup.nonmono,
        "epochs": setup.epochs,
        "seeds": len(fresh),
        "hidden": setup.model.hidden,
        "vocabulary": digest(corpus.words),
        "text": digest(*(part.tolist() for part in corpus[1:])),
        "model": digest(
            recipe, EMA_DECAY, jax.tree.map(lambda x: f"{x.dtype}{x.shape}", fresh)
        ),
    }


def perplexity(loss: Any) -> np.ndarray:
    """What the mean cross-entropy says about a model: as if of so many words."""
    with np.errstate(over="ignore"):
        return np.exp(np.asarray(loss, float))


def train(
    setup: Setup,
    corpus: Corpus,
    states: list[State],
    epochs_done: int,
    keep: Callable[[int, list[State]], None] = lambda epoch, states: None,
) -> list[State]:
    """Trains all seeds to the last epoch; hands their states to `keep` after each."""
    training, validation = cut(corpus.training), cut(corpus.validation)
    states, seeds = list(states), len(states)
    with tqdm(
        desc="training",
        unit="epoch",
        initial=epochs_done * seeds,
        total=setup.epochs * seeds,
    ) as bar:
        for epoch in range(epochs_done, setup.epochs):
            for seed in range(seeds):
                states[seed] = train_epoch(
                    setup, states[seed], seed, epoch, training, validation
                )
                now = {k: perplexity(v[epoch]) for k, v in states[seed].losses.items()}
                bar.set_postfix_str(
                    f"perplexity: last {now['last']:.1f}, average {now['average']:.1f}"
                )
                bar.update()
            keep(epoch + 1, states)
    return states


def measure(setup: Setup, corpus: Corpus, states: list[State]) -> Results:
    """The curves of trained seeds, their perplexities on the test part, a sample."""
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
    first = jnp.array(corpus.words.index(LINE_END))
    average = models(states[0])["average"]
    written = sample(model, average, first, jax.random.key(0), SAMPLE_LENGTH)
    words = [corpus.words[i] for i in written.tolist()]
    return Results(
        curves={name: curves[name] for name in LABELS},
        test={name: perplexity([loss[name] for loss in losses]) for name in LABELS},
        triggers=np.array(triggers, float),
        sample=" ".join(words).replace(f" {LINE_END} ", "\n"),
    )


def table(results: Results) -> str:
    """The perplexities, mean ± standard deviation over the seeds; those of each."""
    final = {name: curve[-1] for name, curve in results.curves.items()}
    rows = [["", "validation perplexity", "test perplexity"]]
    for name, label in LABELS.items():
        cells = [command_line.spread(x[name], 2) for x in (final, results.test)]
        rows.append([label, *cells])
    below = [
        f"in {np.sum(x['average'] < x['last'])} of {len(x['last'])} seeds"
        for x in (final, results.test)
    ]
    rows.append(["NT-ASGD below SGD's last", *below])
    seeds = [["seed", "averages after", "validation: last, average", "test: the same"]]
    for seed, trigger in enumerate(results.triggers):
        cells = [
            f"{x['last'][seed]:.2f}, {x['average'][seed]:.2f}"
            for x in (final, results.test)
        ]
        when = f"epoch {trigger:g}" if trigger < math.inf else "never"
        seeds.append([str(seed), when, *cells])
    return f"{_markdown(rows)}\n\n{_markdown(seeds)}"


def _markdown(rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows = [rows[0], ["-" * width for width in widths], *rows[1:]]
    return "\n".join(f"| {' | '.join(map(str.ljust, row, widths))} |" for row in rows)


def draw(results: Results, output: Path) -> None:
    """Draws the validation perplexities: the seeds' median, and a band for them all."""
    plt.style.use(Path(lesson.__file__).with_name("style.mplstyle"))
    figure, axes = plt.subplots(figsize=(7, 4.5))
    epochs, seeds = results.curves["last"].shape
    when = np.arange(1, epochs + 1)
    for name, label in LABELS.items():
        curve = results.curves[name]
        if name == "average":
            # Until the first trigger the average is the iterate in every seed.
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
        # The first epochs are far above: the differences are at the end.
        lowest = curves[np.isfinite(curves)].min()
        axes.set_ylim(0.97 * lowest, 1.7 * lowest)
    axes.legend(loc="upper right")
    figure.savefig(output)
    plt.close(figure)


def train_and_keep(
    setup: Setup, corpus: Corpus, states: list[State], folder: Path
) -> list[State]:
    """Goes on from the newest epoch in a folder, and keeps the last two there."""
    run = identity(setup, corpus, states)
    what = f"keep checkpoints in {folder}"
    attempt(what, folder.mkdir, parents=True, exist_ok=True)
    with attempt(what, ocp.CheckpointManager, folder, options=KEEP) as manager:
        what = f"go on from {folder}/{manager.latest_step()}"
        epochs_done, states = attempt(what, resume, manager, states, run)
        print(
            f"{'resumed' if epochs_done else 'afresh'}: {folder}, epoch {epochs_done}"
        )

        def keep(epoch: int, states: list[State]) -> None:
            attempt(f"save in {folder}", save, manager, epoch, states, run)

        return train(setup, corpus, states, epochs_done, keep)


def _parser() -> command_line.Parser:
    count = command_line.count
    parser = command_line.Parser(
        "Train an LSTM language model; compare SGD, NT-ASGD, EMA and a divided rate."
    )
    parser.add_argument(
        "--data",
        type=Path,
        help="a text file, blank lines between its paragraphs; or a folder with one"
        " file each that has train, valid and test in its name, spaces between the"
        " words, as Penn Treebank and WikiText (default: the texts of Python's help())",
    )
    parser.add_argument(
        "--rate",
        type=command_line.positive,
        default=25.0,
        help="learning rate (default: %(default)s)",
    )
    parser.add_argument(
        "--nonmono",
        type=count,
        default=3,
        help="epochs whose validation losses a new one is not compared with"
        " (default: %(default)s)",
    )
    parser.add_argument(
        "--epochs",
        type=count,
        default=24,
        help="times through the text (default: %(default)s)",
    )
    parser.add_argument(
        "--hidden",
        type=count,
        default=128,
        help="units of the LSTM, and of the embedding (default: %(default)s)",
    )
    parser.add_argument(
        "--seeds",
        type=count,
        default=3,
        help="models to train; a seed sets the initial weights and the dropout"
        " (default: %(default)s)",
    )
    parser.add_argument(
        "--checkpoint-dir",
        type=Path,
        help="keeps the last two epochs' checkpoints; a later start with the same"
        " options resumes from the newest (default: none is kept)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("out/language_model.png"),
        help="where to save the figure (default: %(default)s)",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> Results:
    """Trains, saves the figure, prints the table and returns what was measured."""
    parser = _parser()
    options = parser.parse_args(argv)
    try:
        corpus = load(options.data)
    except (OSError, ValueError) as error:
        parser.error(f"argument --data: {error}")
    model = LanguageModel(len(corpus.words), options.hidden)
    setup = Setup(model, options.rate, options.nonmono, options.epochs)
    states = [create(setup, seed) for seed in range(options.seeds)]
    command_line.check_output(parser, options.output)
    if options.checkpoint_dir is None:
        states = train(setup, corpus, states, 0)
    else:
        states = train_and_keep(
            setup, corpus, states, options.checkpoint_dir.absolute()
        )
    results = measure(setup, corpus, states)
    draw(results, options.output)
    sizes = [
        f"{len(part)} ({part_name})"
        for part_name, part in zip(PARTS, corpus[1:], strict=True)
    ]
    print(f"{', '.join(sizes)} words, {len(corpus.words)} different ones\n")
    print(table(results))
    print(f"\nText by NT-ASGD's average, seed 0:\n{results.sample}")
    settings = {
        name: str(value) if isinstance(value, Path) else value
        for name, value in vars(options).items()
        if value is not None
    }
    print(command_line.describe(settings))
    return results


if __name__ == "__main__":
    main()
