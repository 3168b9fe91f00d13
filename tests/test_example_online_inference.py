# SPDX-License-Identifier: Apache-2.0
"""`examples/online_inference.py` shows what it says, and refuses bad options."""

import numpy as np
import pytest

from examples import online_inference
from examples.online_inference import ESTIMATES, QUESTIONS
from tests.programs import assert_lesson_refuses


def test_extrapolation_covers_where_one_rate_does_not(tmp_path, capsys):
    figure = tmp_path / "figure.png"
    study = online_inference.main(figure, n=40_000, streams=200)

    assert study.observations[-1] == 40_000
    lower, upper = study.intervals
    assert lower.shape == upper.shape == (len(study.observations), 200, 2, 5)
    # Averaging begins after 400 observations; the second reading is at 400.
    assert np.isnan(lower[1]).all()
    assert np.isfinite(lower[2:]).all()
    assert np.all(lower[2:] < upper[2:])
    # A quarter of the observations is the reading where they are twice as long.
    lengths = (upper - lower).mean(axis=(1, 2, 3))
    assert 1.7 < lengths[len(lengths) // 4 - 1] / lengths[-1] < 2.3

    inside = (lower[-1] <= study.truth) & (study.truth <= upper[-1])
    np.testing.assert_array_equal(study.covered, inside)
    one, two = study.covered.mean(axis=(0, 2))
    error = study.covered.mean(axis=2).std(axis=0).max() / np.sqrt(200)
    assert one + 3 * error < two
    assert abs(two - 0.95) < 4 * error
    # The bias is what is gone: most of it, in every question that had one.
    middle = (lower + upper)[-1] / 2
    bias = (middle.mean(axis=0) - study.truth) / middle.std(axis=0)
    assert np.abs(bias[0]).max() > 0.8
    assert np.abs(bias[1]).max() < 0.3

    assert figure.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert figure.stat().st_size < 150 * 1024
    lines = capsys.readouterr().out.splitlines()
    assert len({len(line) for line in lines}) == 1
    for j, name in enumerate(QUESTIONS):
        for k, estimate in enumerate(ESTIMATES):
            begin = f"| {name:20} | {estimate:9} | "
            (line,) = (line for line in lines if line.startswith(begin))
            assert f"| {lower[-1, 0, k, j]:+.3f} to {upper[-1, 0, k, j]:+.3f} |" in line
            assert f"| {study.truth[j]:+.3f}  |" in line
            assert f"| {100 * study.covered[:, k, j].mean():.0f}% " in line


def test_the_truth_is_the_fit_to_all_the_data(tmp_path):
    """Where the gradient of the likelihood is zero; contrasts are of coefficients."""
    study = online_inference.main(tmp_path / "figure.svg", n=200, streams=1)
    assert study.covered.shape == (1, 2, 5)
    x, y = online_inference.tumours()
    assert x.shape == (569, 4)
    assert y.sum() == 212  # malignant ones
    np.testing.assert_allclose(x.mean(axis=0), [1, 0, 0, 0], atol=1e-12)
    np.testing.assert_allclose(x.std(axis=0), [0, 1, 1, 1], atol=1e-12)
    texture, smoothness, symmetry, contrast, log_odds = study.truth
    assert contrast == pytest.approx(smoothness - texture)
    intercept = log_odds - texture - smoothness - symmetry
    p = np.array([intercept, texture, smoothness, symmetry])
    gradient = x.T @ (1 / (1 + np.exp(-x @ p)) - y) / len(x)
    assert np.abs(gradient).max() < 1e-6


def test_a_bad_option_is_refused_in_one_line(tmp_path, monkeypatch, capsys):
    assert_lesson_refuses("online_inference", tmp_path, monkeypatch, capsys)
