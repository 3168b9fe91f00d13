# SPDX-License-Identifier: Apache-2.0
"""`benchmarks/online_inference.py`: what the step size does, and bad options."""

import numpy as np
import pytest

from benchmarks import online_inference
from tests.programs import assert_explained, error_of


def test_a_small_step_covers_less(capsys):
    """In the direction of little curvature it has not come far enough."""
    options = ["--observations", "10000", "--rate", "0.5", "5"]
    small, large = online_inference.main(options)
    assert small.covered().shape == large.covered().shape == (100, 10)
    shares = [study.covered().mean(axis=1) for study in (small, large)]
    error = np.hypot(*(np.std(share) / 10 for share in shares))
    assert np.mean(shares[1]) - np.mean(shares[0]) > 4 * error
    printed = capsys.readouterr().out
    for c, share in zip(("0.5", "5"), shares, strict=True):
        assert f"| {c:4} | {100 * np.mean(share):.1f} ± " in printed


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--observations", "0"),
        ("--observations", "-200"),
        ("--observations", "1001"),
        ("--observations", "1e5"),
        ("--observations", "99999999999999999800"),
        ("--streams", "0"),
        ("--streams", "many"),
        ("--streams", "99999999999999999999"),
        ("--rate", "0"),
        ("--rate", "inf"),
        ("--rate", "nan"),
        ("--speed", "1"),
    ],
)
def test_a_bad_option_is_refused_in_one_line(option, value, capsys):
    assert option in error_of(online_inference.main, [option, value], capsys)


def test_help_explains_every_option_with_its_default(capsys):
    options = ("--rate", "--observations", "--streams")
    assert_explained(online_inference.main, options, capsys)
