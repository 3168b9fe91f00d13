# SPDX-License-Identifier: Apache-2.0
"""`examples/digits.py` shows what it says, and refuses bad options in one line."""

import numpy as np
import pytest

from examples import digits
from tests.programs import assert_explained, assert_refuses_outputs, error_of

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def test_the_average_is_better_than_the_last_iterate(tmp_path, capsys):
    # The rate is above the default: a run this short shows the noise sooner.
    figure = tmp_path / "new" / "figure.png"
    options = ["--rate", "0.8", "--steps", "800", "--t0", "400", "--seeds", "4"]
    results = digits.main([*options, "--output", str(figure)])

    assert results.last.loss.shape == results.average.loss.shape == (4,)
    assert results.steps[-1] == 800
    assert results.last_curve.loss.shape == (len(results.steps), 4)
    assert results.average.loss.mean() < 0.85 * results.last.loss.mean()
    assert results.average.accuracy.mean() > 0.95

    # Up to step t0 + 1 the average is the iterate, afterwards it moves less.
    before = results.steps <= 401
    last, average = results.last_curve.loss, results.average_curve.loss
    np.testing.assert_array_equal(average[before], last[before])
    moves = [np.abs(np.diff(loss[~before], axis=0)).mean() for loss in (average, last)]
    assert moves[0] < 0.5 * moves[1]

    assert figure.read_bytes().startswith(PNG_SIGNATURE)
    assert figure.stat().st_size < 150 * 1024
    printed = capsys.readouterr().out
    assert f"{results.last.loss.mean():.4f} ±" in printed
    assert f"{results.average.loss.mean():.4f} ±" in printed
    assert "rate 0.8, schedule constant, t0 400, steps 800, batch size 16" in printed
    assert str(figure) in printed


@pytest.mark.parametrize("t0", ["inf", "2"])
def test_without_averaging_both_rows_are_equal(t0, tmp_path):
    figure = tmp_path / "figure.png"
    options = ["--steps", "3", "--seeds", "1", "--batch-size", "997", "--t0", t0]
    results = digits.main([*options, "--output", str(figure)])
    assert results.last == results.average
    assert figure.read_bytes().startswith(PNG_SIGNATURE)


def test_a_training_that_diverges_is_shown_as_such(tmp_path, capsys):
    options = ["--steps", "3", "--seeds", "1", "--rate", "3e38"]
    results = digits.main([*options, "--output", str(tmp_path / "figure.png")])
    assert np.isnan(results.last.loss).all()
    assert "nan" in capsys.readouterr().out


def test_a_seed_gives_the_same_whatever_else_is_trained(tmp_path):
    options = ["--steps", "5", "--output", str(tmp_path / "figure.png"), "--seeds"]
    one, two = digits.main([*options, "1"]), digits.main([*options, "2"])
    np.testing.assert_allclose(one.last.loss[0], two.last.loss[0], rtol=1e-4)
    assert two.last.loss[0] != two.last.loss[1]


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--rate", "0"),
        ("--rate", "-0.1"),
        ("--rate", "nan"),
        ("--rate", "inf"),
        ("--rate", "fast"),
        ("--t0", "-1"),
        ("--t0", "nan"),
        ("--steps", "0"),
        ("--steps", "1.5"),
        ("--batch-size", "0"),
        ("--noise", "-0.1"),
        ("--noise", "nan"),
        ("--schedule", "random"),
        ("--batch-size", "998"),
        ("--seeds", "0"),
        ("--speed", "1"),
    ],
)
def test_a_bad_option_is_refused_in_one_line(option, value, tmp_path, capsys):
    figure = tmp_path / "figure.png"
    figure.write_bytes(b"an older figure")
    # Nor is a folder made for a figure that will not be drawn.
    for output in (figure, tmp_path / "new" / "figure.png"):
        argv = [option, value, "--output", str(output)]
        assert option in error_of(digits.main, argv, capsys)
    assert figure.read_bytes() == b"an older figure"
    assert list(tmp_path.iterdir()) == [figure]


def test_an_output_that_cannot_be_written_is_refused(tmp_path, capsys):
    assert_refuses_outputs(digits.main, tmp_path, capsys)


def test_help_explains_every_option_with_its_default(capsys):
    options = ("--rate", "--t0", "--steps", "--batch-size", "--seeds", "--output")
    assert_explained(digits.main, options, capsys)
