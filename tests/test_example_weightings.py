# SPDX-License-Identifier: Apache-2.0
"""`examples/weightings.py` shows what it says, and refuses bad options in one line."""

import numpy as np
import pytest

from examples import weightings
from tests.programs import assert_refuses_outputs, error_of

AVERAGES = ("uniform", "polynomial", "exponential")


def test_each_weighting_does_what_it_is_for(tmp_path, capsys):
    figure = tmp_path / "new" / "figure.png"
    options = ["--steps", "400", "--seeds", "5", "--output", str(figure)]
    results = weightings.main(options)

    assert results.curves.keys() == results.test.keys() == weightings.COLORS.keys()
    assert {losses.shape for losses in results.test.values()} == {(5,)}
    assert results.steps[0] == 1
    assert results.steps[-1] == 400
    shapes = {curve.shape for curve in results.curves.values()}
    assert shapes == {(len(results.steps), 5)}

    # Only the uniform one still drags the start along.
    test = {name: losses.mean() for name, losses in results.test.items()}
    assert test["polynomial"] < 0.9 * test["last iterate"]
    assert test["exponential"] < 0.95 * test["last iterate"]
    assert test["polynomial"] < 0.9 * test["uniform"]
    assert test["exponential"] < 0.9 * test["uniform"]
    # The first iterate is every average.
    first = {name: curve[0] for name, curve in results.curves.items()}
    for name in AVERAGES:
        np.testing.assert_allclose(first[name], first["last iterate"], rtol=1e-5)

    assert figure.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert figure.stat().st_size < 150 * 1024
    printed = capsys.readouterr().out
    for mean in test.values():
        assert f"{mean:.4f} ±" in printed
    assert "start 0, decay 0.99, gamma 3, steps 400, seeds 5" in printed
    assert str(figure) in printed


def test_without_averaging_all_are_the_last_iterate(tmp_path):
    figure = tmp_path / "figure.png"
    options = ["--steps", "2", "--seeds", "1", "--start", "inf", "--rate", "0.1"]
    results = weightings.main([*options, "--output", str(figure)])
    for name in AVERAGES:
        np.testing.assert_allclose(
            results.curves[name], results.curves["last iterate"], rtol=1e-6
        )
    assert figure.exists()


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--rate", "0"),
        ("--rate", "nan"),
        ("--rate", "fast"),
        ("--start", "-1"),
        ("--start", "2.5"),
        ("--start", "nan"),
        ("--decay", "1"),
        ("--decay", "-0.1"),
        ("--decay", "nan"),
        ("--gamma", "-1"),
        ("--gamma", "inf"),
        ("--steps", "0"),
        ("--steps", "1.5"),
        ("--seeds", "0"),
        ("--speed", "1"),
    ],
)
def test_a_bad_option_is_refused_in_one_line(option, value, tmp_path, capsys):
    figure = tmp_path / "new" / "figure.png"
    argv = [option, value, "--output", str(figure)]
    assert option in error_of(weightings.main, argv, capsys)
    # Nor is a folder made for a figure that will not be drawn.
    assert not figure.parent.exists()


def test_an_output_that_cannot_be_written_is_refused(tmp_path, capsys):
    assert_refuses_outputs(weightings.main, tmp_path, capsys)
