# SPDX-License-Identifier: Apache-2.0
"""`examples/language_model.py` shows what it says, and refuses bad options."""

import numpy as np

from examples import language_model as lesson
from tests.programs import assert_lesson_refuses

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def test_the_lesson_begins_to_average_by_itself(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(lesson, "RATE", 30.0)
    monkeypatch.setattr(lesson, "NONMONO", 1)
    figure = tmp_path / "new" / "figure.png"
    # Long enough that the margin holds on machines that round otherwise.
    results = lesson.main(figure, epochs=24, hidden=32)
    began, iterate, average = (results[x] for x in ("began", "iterate", "average"))
    assert 1 < began < 16
    np.testing.assert_array_equal(average[:began], iterate[:began])
    assert average[-1] < 0.9 * iterate[-1]
    assert figure.read_bytes().startswith(PNG_SIGNATURE)
    printed = capsys.readouterr().out
    assert f"after epoch {began} of 24" in printed
    assert f"last iterate {iterate[-1]:.2f}, average {average[-1]:.2f}" in printed


def test_a_bad_option_is_refused_in_one_line(tmp_path, monkeypatch, capsys):
    assert_lesson_refuses("language_model", tmp_path, monkeypatch, capsys)
