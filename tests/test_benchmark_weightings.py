# SPDX-License-Identifier: Apache-2.0
"""`benchmarks/weightings.py` varies the lesson, and refuses bad options."""

import numpy as np

from benchmarks import weightings as study
from examples import weightings
from tests.programs import assert_study_options


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


def test_a_bad_option_is_refused_and_every_one_explained(capsys):
    assert_study_options(study.main, capsys)
