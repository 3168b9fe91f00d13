# SPDX-License-Identifier: Apache-2.0
"""`examples/batch_norm.py` shows what it says, and refuses bad options."""

import jax
import numpy as np
import pytest
from flax import nnx

from examples import batch_norm
from tests.programs import command_line_of, error_of

pytestmark = pytest.mark.flax


def test_statistics_estimated_anew_are_better_than_stale_ones(capsys):
    results = batch_norm.main(steps=300, seeds=4)
    assert results.updated.loss.shape == results.last.accuracy.shape == (4,)
    assert results.updated.loss.mean() < 0.85 * results.stale.loss.mean()
    assert results.updated.loss.mean() < 0.85 * results.last.loss.mean()
    assert results.updated.accuracy.mean() > results.stale.accuracy.mean()
    assert results.updated.accuracy.mean() > 0.96

    printed = capsys.readouterr().out
    for scores in results:
        assert f"{scores.loss.mean():.4f} ±" in printed
        assert f"{100 * scores.accuracy.mean():.2f} ±" in printed


def test_the_model_goes_on_training_after_the_comparison():
    training, test = batch_norm.load_splits()
    model, optimizer = batch_norm.train(training, rate=3.0, steps=30, seeds=2)
    graph, state = nnx.split(model)
    before = jax.tree.map(np.array, state)
    results = batch_norm.compare(model, optimizer, training, test)
    # The average is another point, and has other statistics.
    assert (results.last.loss != results.stale.loss).all()
    assert (results.stale.loss != results.updated.loss).all()
    after_graph, after = nnx.split(model)
    assert after_graph == graph  # in training mode, too
    jax.tree.map(np.testing.assert_array_equal, before, after)

    batches = [next(batch_norm.minibatches(training, seed)) for seed in (0, 1)]
    batch = jax.tree.map(lambda *xs: np.stack(xs), *batches)
    batch_norm.train_step(model, optimizer, batch)
    assert optimizer.step[...].tolist() == [31, 31]
    with pytest.raises(AssertionError):
        jax.tree.map(np.testing.assert_array_equal, before, nnx.state(model))


def test_a_bad_option_is_refused_in_one_line(monkeypatch, capsys):
    run = command_line_of("batch_norm", monkeypatch)
    assert "--speed" in error_of(run, ["--speed", "1"], capsys)
