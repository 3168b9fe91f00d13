# SPDX-License-Identifier: Apache-2.0
"""NT-ASGD on a small AWD-LSTM language model: averaging is triggered automatically.

    python -m examples.language_model

A word-level LSTM learns the texts of Python's `help()` at a constant learning rate.
`nt_asgd` runs SGD until the validation loss stops improving, then starts averaging.
"""

import re
from argparse import ArgumentParser
from collections import Counter
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import linen as nn
from tqdm import trange

from asgd_optax import averaged_params, nt_asgd

LEARNING_RATE = 30.0
NONMONO = 2  # epochs
MAX_GRADIENT_NORM = 0.25
BATCH_SIZE = 20  # parallel streams
BPTT = 35  # words per window of backpropagation
DROPOUT = 0.3
OUTPUT = Path("out/language_model.png")


def load() -> tuple[int, list[Any]]:
    """Return the number of words, and windows of training and validation text."""
    # Drop tables and repeated paragraphs, or validation would repeat training text.
    paragraphs = dict.fromkeys(re.split(r"\n\s*\n", "\n\n".join(topics.values())))
    texts = [text for text in paragraphs if not re.search(r"[-=+|]{3}|== ", text)]
    parts: list[list[str]] = [[], []]
    windows: list[Any] = []
    for i, paragraph in enumerate(texts):  # ten paragraphs in a row per part
        parts[i // 10 % 10 == 9] += re.findall(r"\w+|[^\w\s]", paragraph)
    counted = enumerate(Counter(parts[0]).most_common(), 1)
    index = {word: i for i, (word, n) in counted if n >= 3}  # 0: all other words
    for part in parts:
        text = np.array([index.get(word, 0) for word in part])
        n = (len(text) - 1) // (BATCH_SIZE * BPTT) * BPTT * BATCH_SIZE
        xs = (text, text[1:], np.ones(n, np.float32))  # words, next words, weights
        windows += [[x[:n].reshape(BATCH_SIZE, -1, BPTT).swapaxes(0, 1) for x in xs]]
    return 1 + len(index), windows


class LanguageModel(nn.Module):
    """An LSTM whose embedding and softmax share one matrix."""

    words: int
    hidden: int

    @nn.compact
    def __call__(self, inputs: Any, carry: Any = None, training: bool = False) -> Any:
        """Return logits and carry, with one dropout mask per window."""
        initial = nn.initializers.truncated_normal(0.05)
        embed = nn.Embed(self.words, self.hidden, embedding_init=initial)
        bias = self.param("bias", nn.initializers.zeros, (self.words,))
        lstm = nn.RNN(nn.OptimizedLSTMCell(self.hidden), return_carry=True)
        embedded = nn.Dropout(DROPOUT, (1,))(embed(inputs), not training)
        carry, outputs = lstm(embedded, initial_carry=carry)
        outputs = nn.Dropout(DROPOUT, (1,))(outputs, not training)
        return embed.attend(outputs) + bias, carry

    def losses(self, params: Any, window: Any, carry: Any, key: Any = None) -> Any:
        """Return cross-entropies by word, with dropout if there is a key, and carry."""
        inputs, targets, weights = window
        rngs = None if key is None else {"dropout": key}
        logits, carry = self.apply(params, inputs, carry, key is not None, rngs=rngs)
        cross_entropy = optax.softmax_cross_entropy_with_integer_labels
        return weights * cross_entropy(logits, targets), carry

    def start(self) -> Any:
        return (jnp.zeros((BATCH_SIZE, self.hidden)),) * 2


def train_epoch(model: Any, tx: Any, text: Any, key: Any, state: Any, loss: Any) -> Any:
    """Train for one epoch, given the last validation loss; return params and state."""

    def step(loop: Any, inputs: Any) -> Any:
        (params, opt_state, carry), (n, window) = loop, inputs

        def mean_loss(params: Any) -> Any:
            each, new = model.losses(params, window, carry, jax.random.fold_in(key, n))
            return each.mean(), new

        grads, carry = jax.grad(mean_loss, has_aux=True)(params)
        news = jnp.where(n == 0, loss, jnp.nan)  # NaN: no loss was measured
        updates, opt_state = tx.update(grads, opt_state, params, validation_loss=news)
        return (optax.apply_updates(params, updates), opt_state, carry), None

    numbered = (jnp.arange(len(text[0])), text)
    return jax.lax.scan(step, (*state, model.start()), numbered)[0][:2]


def mean_cross_entropy(model: LanguageModel, text: Any, params: Any) -> jax.Array:
    def step(carry: Any, window: Any) -> Any:
        losses, carry = model.losses(params, window, carry)
        return carry, losses.sum()

    return jax.lax.scan(step, model.start(), text)[1].sum() / text[2].sum()


def main(output: Path = OUTPUT, epochs: int = 30, hidden: int = 128) -> Any:
    """Train, save the figure, print and return the perplexities."""
    words, (training, validation) = load()
    model = LanguageModel(words, hidden)
    key = jax.random.key(0)
    clip = optax.clip_by_global_norm(MAX_GRADIENT_NORM)
    tx = optax.chain(clip, nt_asgd(LEARNING_RATE, nonmono=NONMONO))
    train = jax.jit(lambda *args: train_epoch(model, tx, training, *args))
    measure = jax.jit(lambda params: mean_cross_entropy(model, validation, params))
    params = model.init(key, training[0][0])
    state = (params, tx.init(params))
    loss, curves, began = jnp.nan, [], epochs
    for epoch in trange(epochs, unit="epoch"):
        params, opt_state = state = train(jax.random.fold_in(key, epoch), state, loss)
        began = min(began, epoch if opt_state[1].triggered else epochs)
        loss = measure(params)  # also the average's, until averaging starts
        curves.append(np.exp([loss, measure(averaged_params(opt_state, params))]))
    iterate, average = np.transpose(curves)
    print(f"nt_asgd averages after epoch {began} of {epochs}; validation perplexity:")
    print(f"last iterate {iterate[-1]:.2f}, average {average[-1]:.2f}")
    plt.style.use(Path(__file__).with_name("style.mplstyle"))
    figure, axes = plt.subplots(figsize=(7, 4))
    when = np.arange(1, epochs + 1)
    axes.plot(when, iterate, color="C0", label="last iterate")
    axes.plot(when[began - 1 :], average[began - 1 :], color="C1", label="average")
    axes.axvline(began, color="C1", linestyle=":", label="averaging starts")
    limits = (None, 2 * average[-1])  # the first epochs are far above
    axes.set(xlabel="epoch", ylabel="validation perplexity", ylim=limits)
    axes.legend()
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output)
    return {"iterate": iterate, "average": average, "began": began}


if __name__ == "__main__":
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=OUTPUT, help=f"default {OUTPUT}")
    main(parser.parse_args().output)
