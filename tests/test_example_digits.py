# SPDX-License-Identifier: Apache-2.0
"""`examples/digits.py` shows what it says, and refuses bad options."""

import os
import subprocess
import sys

import numpy as np
import pytest

from examples import digits
from tests.programs import EXAMPLES, assert_lesson_refuses

pytestmark = pytest.mark.flax


def test_the_average_is_better_than_the_last_iterate(tmp_path, monkeypatch, capsys):
    # A run this short shows the noise at a larger rate.
    monkeypatch.setattr(digits, "RATE", 0.8)
    figure = tmp_path / "figure.png"
    steps, curves, test = digits.main(figure, steps=800, seeds=4)

    last, average = test["last"], test["averaged"]
    assert last.loss.shape == average.loss.shape == (4,)
    assert average.loss.mean() < 0.85 * last.loss.mean()
    assert average.accuracy.mean() > 0.95

    assert steps[-1] == 800
    assert curves["last"].loss.shape == (len(steps), 4)
    # Up to step t0 + 1 the average is the iterate, afterwards it moves less.
    last_curve, average_curve = curves["last"].loss, curves["averaged"].loss
    before = steps <= 401
    np.testing.assert_array_equal(average_curve[before], last_curve[before])
    moves = [
        np.abs(np.diff(curve[~before], axis=0)).mean()
        for curve in (average_curve, last_curve)
    ]
    assert moves[0] < 0.5 * moves[1]

    assert figure.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert figure.stat().st_size < 150 * 1024
    printed = capsys.readouterr().out
    for scores in (last, average):
        assert f"{scores.loss.mean():.4f} ±" in printed
        assert f"{100 * scores.accuracy.mean():.2f} ±" in printed


def test_a_bad_option_is_refused_in_one_line(tmp_path, monkeypatch, capsys):
    assert_lesson_refuses("digits", tmp_path, monkeypatch, capsys)


@pytest.mark.parametrize("form", [["-m", "examples.digits"], ["examples/digits.py"]])
def test_it_runs_beside_another_package_called_examples(form, tmp_path):
    other = tmp_path / "examples"
    other.mkdir()
    (other / "__init__.py").write_text("raise ImportError('of another project')")
    root = EXAMPLES.parent
    # Refused for the output's sake alone: all that it imports is there.
    ended = subprocess.run(
        [sys.executable, *form, "--output", "figure.xyz"],
        cwd=root,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(root)])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 2, ended.stderr
    assert "--output" in ended.stderr
