# SPDX-License-Identifier: Apache-2.0
"""`benchmarks/batch_norm.py` varies the lesson, and refuses bad options."""

import numpy as np
import pytest

from benchmarks import batch_norm as study
from examples import batch_norm
from tests.programs import assert_study_options

pytestmark = pytest.mark.flax


def test_the_study_is_the_lesson_at_another_rate(capsys):
    results = study.main(["--rate", "0.3", "--steps", "10", "--seeds", "2"])
    lesson = batch_norm.main(0.3, steps=10, seeds=2)
    np.testing.assert_array_equal(results.updated.loss, lesson.updated.loss)
    assert "rate 0.3, steps 10, seeds 2" in capsys.readouterr().out


def test_a_bad_option_is_refused_and_every_one_explained(capsys):
    assert_study_options(study.main, capsys)
