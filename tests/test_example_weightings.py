# SPDX-License-Identifier: Apache-2.0
"""`examples/weightings.py` shows what it says, and refuses bad options."""

import numpy as np

from examples import weightings
from tests.programs import assert_lesson_refuses

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
