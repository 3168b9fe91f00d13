# SPDX-License-Identifier: Apache-2.0
"""`benchmarks/online_inference.py`: what the step size does, and bad options."""

import numpy as np
import pytest

from benchmarks import online_inference
from tests.programs import assert_explained, error_of


def test_a_larger_step_is_biased_and_extrapolation_is_not(capsys):
    options = ["--observations", "20000", "--streams", "100", "--rate", "2", "10"]
    small, large = online_inference.main(options)
    assert small.covered.shape == large.covered.shape == (100, 2, 5)
    lines = capsys.readouterr().out.splitlines()[2:]
    biases, rows = {}, iter(lines)
    for c, study in (("2", small), ("10", large)):
        lower, upper = (ends[-1] for ends in study.intervals)
        middle = (lower + upper) / 2
        for k, estimate in enumerate(("one rate", "two rates")):
            bias = (middle[:, k].mean(axis=0) - study.truth) / middle[:, k].std(axis=0)
            biases[c, estimate] = np.sqrt(np.mean(bias**2))
            share = 100 * study.covered[:, k].mean()
            row = next(rows)
            assert row.startswith(f"| {c:3} | {estimate:9} | {share:.1f} ± ")
            assert f" | {biases[c, estimate]:.2f} | " in row
    assert biases["10", "one rate"] > 2 * biases["2", "one rate"]
    assert biases["10", "two rates"] < 0.4 * biases["10", "one rate"]
    shares = large.covered.mean(axis=2)
    error = np.hypot(*shares.std(axis=0)) / np.sqrt(100)
    assert np.subtract(*shares.mean(axis=0)[::-1]) > 4 * error


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
