# SPDX-License-Identifier: Apache-2.0
"""`examples/batch_norm.py` shows what it says, and refuses bad options in one line."""

import numpy as np
import pytest

from examples import batch_norm
from tests.programs import assert_explained, error_of

pytestmark = pytest.mark.flax


def test_statistics_estimated_anew_are_better_than_stale_ones(capsys):
    results = batch_norm.main(["--steps", "300", "--start", "50", "--seeds", "4"])
    assert results.updated.loss.shape == results.last.accuracy.shape == (4,)
    assert results.updated.loss.mean() < 0.85 * results.stale.loss.mean()
    assert results.updated.loss.mean() < 0.85 * results.last.loss.mean()
    assert results.updated.accuracy.mean() > results.stale.accuracy.mean()
    assert results.updated.accuracy.mean() > 0.96

    printed = capsys.readouterr().out
    for scores in results:
        assert f"{scores.loss.mean():.4f} ±" in printed
        assert f"{100 * scores.accuracy.mean():.2f} ±" in printed
    assert "rate 3, start 50, steps 300, seeds 4" in printed


def test_without_averaging_the_stale_statistics_are_the_iterates():
    results = batch_norm.main(["--steps", "3", "--seeds", "1", "--start", "inf"])
    assert results.last == results.stale
    assert results.last != results.updated


def test_a_seed_gives_the_same_whatever_else_is_trained():
    one, two = (batch_norm.main(["--steps", "5", "--seeds", n]) for n in "12")
    np.testing.assert_allclose(one.updated.loss[0], two.updated.loss[0], rtol=1e-4)
    assert two.updated.loss[0] != two.updated.loss[1]


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--rate", "0"),
        ("--rate", "-0.1"),
        ("--rate", "nan"),
        ("--rate", "inf"),
        ("--rate", "fast"),
        ("--start", "-1"),
        ("--start", "0.5"),
        ("--start", "nan"),
        ("--steps", "0"),
        ("--steps", "1.5"),
        ("--seeds", "0"),
        ("--speed", "1"),
    ],
)
def test_a_bad_option_is_refused_in_one_line(option, value, monkeypatch, capsys):
    monkeypatch.setattr(batch_norm, "train", None)
    assert option in error_of(batch_norm.main, [f"{option}={value}"], capsys)


def test_help_explains_every_option_with_its_default(capsys):
    options = ("--rate", "--start", "--steps", "--seeds")
    assert_explained(batch_norm.main, options, capsys)
