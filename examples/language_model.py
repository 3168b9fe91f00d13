# SPDX-License-Identifier: Apache-2.0
"""Averaging that starts by itself, on a language model: AWD-LSTM's recipe, cut to size.

    python examples/language_model.py [--data FILE_OR_FOLDER]

A word-level LSTM learns the texts of Python's own `help()`, or any other English
(Penn Treebank, WikiText-2). One trajectory of SGD at a constant rate gives four of
the models compared: its last iterate, its best one on the validation set, the average
that `nt_asgd` begins when the validation loss stops improving, and an exponential
moving average. (With `lambd=0`, `nt_asgd` changes nothing about the iterate.) A
second trajectory divides its rate by 4 whenever the validation loss is above its
lowest.

What it shows: the average is well below the iterates that it averages, and below the
best of them, without a schedule to tune and without knowing beforehand when to begin.
What it does not show: that nothing else does as well. A rate divided in time does,
and an exponential moving average is a little better.

With `--checkpoint-dir` a run that was killed goes on from its last whole epoch, to
the same table.
"""

import functools
import hashlib
import json
import math
import re
import shutil
import tempfile
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
from flax import linen as nn
from matplotlib.ticker import MaxNLocator
from tqdm import tqdm

from asgd_optax import (
    average_iterates,
    averaged_params,
    exponential_weighting,
    nt_asgd,
)

try:
    from examples import command_line
except ModuleNotFoundError:  # run as a script, with this folder on the path
    import command_line

# The recipe.
BATCH_SIZE = 20  # stretches of the text, read side by side
BPTT = 35  # words in a window; gradients do not reach further back
DROPOUT = 0.3
MAX_GRADIENT_NORM = 0.25
WEIGHT_DECAY = 1.2e-6
EMA_DECAY = 0.999

SAMPLE_LENGTH = 120  # words

# The text.
UNKNOWN, LINE_END = "<unk>", "<eos>"
PARTS = ("train", "valid", "test")
BLOCK = 10  # paragraphs that stay together in one part
MIN_COUNT = 3  # rarer words of a text that comes without a vocabulary are unknown

# The models compared, and line colours of Okabe & Ito, which every kind of colour
# vision tells apart.
LABELS = {
    "last": "SGD, last iterate",
    "best": "SGD, best iterate",
    "average": "NT-ASGD, average",
    "ema": f"SGD, EMA {EMA_DECAY:g}",
    "divided": "SGD, rate / 4 on plateau",
}
COLORS = {
    "last": "0.6",
    "best": "#E69F00",
    "average": "#0072B2",
    "ema": "#009E73",
    "divided": "#CC79A7",
}


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
    paragraphs = {}
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
        word, min_count, texts = r"\S+", 1, []
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
    for name, part in zip(PARTS, parts, strict=True):
        if len(part) <= BATCH_SIZE * BPTT:
            raise ValueError(
                f"too little text: {len(part)} words in the {name} part, and a batch"
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


class LanguageModel(nn.Module):
    """An LSTM between two uses of one matrix: as embedding and as softmax."""

    words: int
    hidden: int

    @nn.compact
    def __call__(
        self, inputs: jax.Array, carry: Any, *, training: bool
    ) -> tuple[jax.Array, Any]:
        """The next word's logits, and what is carried to the next window.

        `inputs` has the shape (batch, time), each array of `carry` (batch, hidden).
        """
        initial = nn.initializers.truncated_normal(0.05)
        embed = nn.Embed(self.words, self.hidden, embedding_init=initial)
        bias = self.param("bias", nn.initializers.zeros, (self.words,))
        lstm = nn.RNN(nn.OptimizedLSTMCell(self.hidden), return_carry=True)

        def locked_dropout(x: jax.Array) -> jax.Array:
            # One mask for all the times of a window.
            return nn.Dropout(DROPOUT, broadcast_dims=(1,))(x, not training)

        carry, outputs = lstm(locked_dropout(embed(inputs)), initial_carry=carry)
        return embed.attend(locked_dropout(outputs)) + bias, carry

    def start(self, batch: int) -> Any:
        """What is carried into the first window."""
        return (jnp.zeros((batch, self.hidden)),) * 2

    def losses(
        self, params: Any, window: Windows, carry: Any, key: Any = None
    ) -> tuple[jax.Array, Any]:
        """Each word's cross-entropy, with dropout where there is a key; the carry."""
        training = key is not None
        rngs = {"dropout": key} if training else {}
        logits, carry = self.apply(
            params, window.inputs, carry, training=training, rngs=rngs
        )
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, window.targets)
        return window.weights * losses, carry


class Setup(NamedTuple):
    """What the training is compiled for."""

    model: LanguageModel
    rate: float
    nonmono: int
    epochs: int


def optimizer(setup: Setup) -> optax.GradientTransformationExtraArgs:
    """Constant-rate SGD, watched by two averages that change nothing about it."""
    return optax.named_chain(
        ("clip", optax.clip_by_global_norm(MAX_GRADIENT_NORM)),
        (
            "average",
            nt_asgd(setup.rate, nonmono=setup.nonmono, weight_decay=WEIGHT_DECAY),
        ),
        ("ema", average_iterates(exponential_weighting(EMA_DECAY))),
    )


def sgd(rate: jax.Array) -> optax.GradientTransformationExtraArgs:
    """The same SGD, without averages and at any rate."""
    tx = optax.chain(
        optax.clip_by_global_norm(MAX_GRADIENT_NORM),
        optax.add_decayed_weights(WEIGHT_DECAY),
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
    model, word = setup.model, jnp.zeros((1, 1), int)
    params = model.init(jax.random.key(seed), word, model.start(1), training=False)
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
    model = setup.model

    def train(tx: Any, params: Any, opt_state: Any, validation_loss: Any) -> Any:
        def step(loop: Any, inputs: Any) -> Any:
            (params, opt_state, carry), (n, window) = loop, inputs

            def loss(params: Any) -> Any:
                window_key = jax.random.fold_in(key, n)
                losses, after = model.losses(params, window, carry, window_key)
                return losses.mean(), after

            grads, carry = jax.grad(loss, has_aux=True)(params)
            # The loss at the last epoch's end is news at the first update only.
            news = jnp.where(n == 0, validation_loss, jnp.nan)
            updates, opt_state = tx.update(
                grads, opt_state, params, validation_loss=news
            )
            return (optax.apply_updates(params, updates), opt_state, carry), None

        loop = (params, opt_state, model.start(BATCH_SIZE))
        numbered = (jnp.arange(len(training.inputs)), training)
        (params, opt_state, _), _ = jax.lax.scan(step, loop, numbered)
        return params, opt_state

    before = state.losses
    params, opt_state = train(
        optimizer(setup),
        state.params,
        state.opt_state,
        validation_loss=jnp.where(epoch == 0, jnp.nan, before["last"][epoch - 1]),
    )

    def train_divided() -> Any:
        tx = sgd(state.rate)
        return train(tx, state.divided, tx.init(state.divided), jnp.nan)[0]

    # Until its rate is first divided, the second trajectory is the first.
    divided = jax.lax.cond(state.rate == setup.rate, lambda: params, train_divided)

    state = state._replace(params=params, opt_state=opt_state, divided=divided)
    candidates = models(state)
    del candidates["best"]  # known from its own epoch
    losses = evaluate(model, candidates, validation)
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

    def loss(params: Any) -> jax.Array:
        def step(carry: Any, window: Windows) -> Any:
            losses, carry = model.losses(params, window, carry)
            return carry, losses.sum()

        _, sums = jax.lax.scan(step, model.start(BATCH_SIZE), text)
        return sums.sum() / text.weights.sum()

    stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *candidates.values())
    return dict(zip(candidates, jax.lax.map(loss, stacked), strict=True))


@functools.partial(jax.jit, static_argnames=("model", "length"))
def sample(
    model: LanguageModel, params: Any, first: jax.Array, key: Any, length: int
) -> jax.Array:
    """The `length` words that a model writes after the `first` one."""

    def step(loop: Any, key: Any) -> Any:
        word, carry = loop
        logits, carry = model.apply(params, word[None, None], carry, training=False)
        # No text has a word for the unknown ones.
        word = jax.random.categorical(key, logits[0, 0].at[0].set(-jnp.inf))
        return (word, carry), word

    keys = jax.random.split(key, length)
    return jax.lax.scan(step, (first, model.start(1)), keys)[1]


def checksum(folder: Path) -> str:
    """Of all files that Orbax has written into a checkpoint."""
    digest = hashlib.sha256()
    for file in sorted(f for f in (folder / "states").rglob("*") if f.is_file()):
        digest.update(f"{file.relative_to(folder)} {file.stat().st_size}\n".encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()


def checkpoints(folder: Path) -> dict[int, Path]:
    """A folder's checkpoints by the number of epochs done, ascending."""
    found = {}
    for path in folder.glob("epoch-*"):
        if path.name[6:].isdecimal():
            found[int(path.name[6:])] = path
    return dict(sorted(found.items()))


def save(folder: Path, epoch: int, states: list[State], settings: Any) -> None:
    """Saves the states after an epoch, and keeps the checkpoint before."""
    unfinished = folder / ".unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(unfinished / "states", states)
    # Orbax restores a flipped bit without a word, and prints pages of tracebacks
    # where a file is cut: hence a checksum.
    stamp = {"settings": settings, "sha256": checksum(unfinished)}
    (unfinished / "stamp.json").write_text(json.dumps(stamp, indent=1))
    # Killed before this line, the process leaves the older checkpoints; after it, a
    # whole new one.
    unfinished.rename(folder / f"epoch-{epoch}")
    for old in list(checkpoints(folder).values())[:-2]:
        shutil.rmtree(old)


def resume(folder: Path, fresh: list[State], settings: Any) -> tuple[int, list[State]]:
    """The newest states saved in a folder and their epoch; none in an empty one."""
    found = checkpoints(folder)
    if not found:
        if strange := [p.name for p in folder.iterdir() if p.name != ".unfinished"]:
            raise ValueError(f"{folder} has {strange[0]!r} in it, and no checkpoint")
        return 0, fresh
    epoch, newest = found.popitem()
    try:
        stamp = json.loads((newest / "stamp.json").read_bytes())
        whole = stamp["sha256"] == checksum(newest)
        theirs = dict(stamp["settings"])
    except (OSError, ValueError, KeyError, TypeError):
        whole = False
    if not whole:
        raise ValueError(f"{newest} is damaged, or no checkpoint of this program")
    for name, ours in settings.items():
        if theirs.get(name) != ours:
            raise ValueError(
                f"{newest} is a checkpoint of another run: {name}"
                f" {theirs.get(name)}, not {ours}"
            )
    abstract = jax.tree.map(ocp.tree.to_shape_dtype_struct, fresh)
    with ocp.StandardCheckpointer() as checkpointer:
        return epoch, checkpointer.restore(newest / "states", abstract)


def identity(setup: Setup, corpus: Corpus, fresh: list[State]) -> dict[str, Any]:
    """What has to be the same for a run to go on from a checkpoint."""

    def digest(*parts: Any) -> str:
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:12]

    recipe = (BATCH_SIZE, BPTT, DROPOUT, MAX_GRADIENT_NORM, WEIGHT_DECAY, EMA_DECAY)
    return {
        "rate": setup.rate,
        "nonmono": setup.nonmono,
        "epochs": setup.epochs,
        "seeds": len(fresh),
        "hidden": setup.model.hidden,
        "vocabulary": digest(corpus.words),
        "text": digest(*(part.tolist() for part in corpus[1:])),
        "model": digest(recipe, jax.tree.map(lambda x: f"{x.dtype}{x.shape}", fresh)),
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
    keep: Callable[[int, list[State]], None],
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
    """Draws the validation perplexities, a line a seed, and NT-ASGD's triggers."""
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    epochs, seeds = results.curves["last"].shape
    when = np.arange(1, epochs + 1)
    # Until the trigger the average is the iterate, whose line is not to be hidden.
    averaged = when[:, None] >= results.triggers
    shown = dict(results.curves)
    shown["average"] = np.where(averaged, shown["average"], np.nan)
    for name, label in LABELS.items():
        lines = axes.plot(
            when,
            shown[name],
            color=COLORS[name],
            linestyle="--" if name == "best" else "-",
            linewidth=1.3,
            zorder=1.9 if name == "divided" else 2,
        )
        lines[0].set_label(label)
    for seed in np.flatnonzero(results.triggers < math.inf):
        trigger = int(results.triggers[seed])
        height = results.curves["last"][trigger - 1, seed]
        axes.plot(trigger, height, "v", color=COLORS["average"], markersize=8, zorder=3)
        axes.vlines(trigger, 0, height, color="0.3", linestyle=":", linewidth=1)
    axes.plot([], [], "v", color=COLORS["average"], label="NT-ASGD begins to average")
    axes.set(
        title=f"Word-level LSTM, {f'{seeds} seeds' if seeds > 1 else 'one seed'}",
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
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper right", framealpha=1, edgecolor="none")
    figure.savefig(output, dpi=120)
    plt.close(figure)


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
    run = identity(setup, corpus, states)
    epochs_done, folder = 0, options.checkpoint_dir
    if folder is not None:
        folder = folder.absolute()  # which Orbax asks for
        try:
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()  # can we write there?
            epochs_done, states = resume(folder, states, run)
        except (OSError, ValueError) as error:
            parser.error(f"argument --checkpoint-dir: {error}")
    command_line.check_output(parser, options.output)

    def keep(epoch: int, states: list[State]) -> None:
        if folder is not None:
            save(folder, epoch, states, run)

    states = train(setup, corpus, states, epochs_done, keep)
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
