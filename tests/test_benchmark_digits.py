# SPDX-License-Identifier: Apache-2.0
"""`benchmarks/digits.py` varies the lesson, and refuses bad options."""

import numpy as np
import pytest

from benchmarks import digits as study
from examples import digits
from tests.programs import assert_study_options

pytestmark = pytest.mark.flax


def test_the_study_is_the_lesson_at_other_rates_schedules_and_noise(capsys):
    argv = ["--steps", "40", "--seeds", "3"]
    low, high = study.main([*argv, "--rate", "0.3", "0.6"])
    (quiet,) = study.main([*argv, "--schedule", "linear", "--noise", "0"])
    losses = [run.test["last"].loss for run in (low, high, quiet)]
    assert len({float(loss) for run in losses for loss in run}) == 9
    # A seed gives the same whatever else is trained.
    lesson = digits.train(0.6, 0.2, steps=40, seeds=2).test["last"].loss
    np.testing.assert_allclose(losses[1][:2], lesson, rtol=1e-4)
    printed = capsys.readouterr().out
    for loss in losses:
        assert f"{loss.mean():.4f} ± {loss.std(ddof=1):.4f}" in printed
    assert "schedule linear, noise 0, steps 40, seeds 3" in printed


def test_a_bad_option_is_refused_and_every_one_explained(capsys):
    others = [
        *(("--rate", value) for value in ("-0.1", "inf")),
        ("--schedule", "random"),
        *(("--noise", value) for value in ("-0.1", "nan")),
        *(("--steps", value) for value in ("39", "40.5", str(2**31))),
    ]
    assert_study_options(study.main, capsys, others)
