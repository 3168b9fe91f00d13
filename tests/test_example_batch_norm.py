# SPDX-License-Identifier: Apache-2.0
"""`examples/batch_norm.py` shows what it says; `benchmarks/batch_norm.py` varies it."""

import jax
import numpy as np
import pytest
from flax import nnx

from benchmarks import batch_norm as study
from examples import batch_norm
from tests.programs import assert_explained, command_line_of, error_of

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


def test_the_study_is_the_lesson_at_another_rate(capsys):
    results = study.main(["--rate", "0.3", "--steps", "10", "--seeds", "2"])
    lesson = batch_norm.main(0.3, steps=10, seeds=2)
    np.testing.assert_array_equal(results.updated.loss, lesson.updated.loss)
    assert "rate 0.3, steps 10, seeds 2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--rate", "0"),
        ("--rate", "nan"),
        ("--rate", "fast"),
        ("--steps", "0"),
        ("--steps", "1.5"),
        ("--steps", "9" * 20),
        ("--seeds", "1"),
        ("--seeds", "9" * 20),
        ("--speed", "1"),
    ],
)
def test_the_study_refuses_a_bad_option_in_one_line(option, value, capsys):
    assert option in error_of(study.main, [f"{option}={value}"], capsys)


def test_the_study_explains_every_option_with_its_default(capsys):
    assert_explained(study.main, ("--rate", "--steps", "--seeds"), capsys)
