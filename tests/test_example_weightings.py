# SPDX-License-Identifier: Apache-2.0
"""`examples/weightings.py` shows what it says; `benchmarks/weightings.py` varies it."""

import numpy as np
import pytest

from benchmarks import weightings as study
from examples import weightings
from tests.programs import assert_explained, assert_lesson_refuses, error_of

AVERAGES = ("uniform", "polynomial", "exponential")


def test_each_weighting_does_what_it_is_for(tmp_path, capsys):
    figure = tmp_path / "figure.png"
    results = weightings.main(figure, steps=400, seeds=5)

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


def test_a_bad_option_is_refused_in_one_line(tmp_path, monkeypatch, capsys):
    assert_lesson_refuses("weightings", tmp_path, monkeypatch, capsys)


def test_the_study_is_the_lesson_at_another_rate(monkeypatch, capsys):
    def train(*settings):
        assert settings == (0.02, 3, 2)
        losses = {
            name: np.array([n, n + 0.5]) for n, name in enumerate(weightings.COLORS)
        }
        return weightings.Results(None, None, losses)

    monkeypatch.setattr(weightings, "train", train)
    study.main(["--rate", "0.02", "--steps", "3", "--seeds", "2"])
    printed = capsys.readouterr().out
    assert "| uniform      | 1.2500 ± 0.3536 |" in printed
    assert "rate 0.02, steps 3, seeds 2" in printed


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
