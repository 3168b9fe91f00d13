# SPDX-License-Identifier: Apache-2.0
"""`examples/online_inference.py` shows what it says, and refuses bad options."""

import numpy as np
from scipy import stats
from sklearn.datasets import load_diabetes
from sklearn.linear_model import LinearRegression

from examples import online_inference
from tests.programs import assert_lesson_refuses

# What statistics packages print for the data as it is bundled.
T_VALUES = [-0.168, -3.917, 7.813, 4.958, -1.901, 1.406, 0.475, 1.097, 4.370, 1.025]


def test_intervals_cover_and_shrink(tmp_path, capsys):
    figure = tmp_path / "figure.png"
    study = online_inference.main(figure, n=20_000)

    assert study.observations[-1] == 20_000
    lower, upper = study.intervals
    assert lower.shape == upper.shape == (len(study.observations), 100, 10)
    # Averaging begins after 200 observations; the second reading is at 200.
    assert np.isnan(lower[1]).all()
    assert np.isfinite(lower[2:]).all()
    assert np.all(lower[2:] < upper[2:])
    # A quarter of the observations is the reading where they are twice as long.
    lengths = (upper - lower).mean(axis=(1, 2))
    assert 1.8 < lengths[len(lengths) // 4 - 1] / lengths[-1] < 2.2

    covered = study.covered()
    assert covered.shape == (100, 10)
    assert 0.85 < covered.mean() < 0.97
    # Of the one stream that is shown, most intervals hold the least-squares solution.
    assert covered[0].mean() > 0.5
    # They are for the data set; the textbook's, for the population, are far longer.
    assert np.all(study.half_width > (upper - lower)[-1].mean(axis=0) / 2)

    assert figure.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert figure.stat().st_size < 150 * 1024
    printed = capsys.readouterr().out
    for j, name in enumerate(load_diabetes().feature_names):
        middle = (lower + upper)[-1, 0, j] / 2
        row = f"| {name:8} | {study.truth[j]:+.3f} ± {study.half_width[j]:.3f}"
        (line,) = (line for line in printed.splitlines() if line.startswith(row))
        assert f"| {middle:+.4f} ± " in line
        assert f"| {100 * covered[:, j].mean():.0f} % " in line
    error = covered.mean(axis=1).std() / 10
    assert f"{100 * covered.mean():.1f} ± {100 * error:.1f} % of the" in printed


def test_least_squares_are_the_textbooks(tmp_path):
    study = online_inference.main(tmp_path / "figure.svg", n=200, streams=1)
    data = load_diabetes()
    standard = LinearRegression().fit(
        data["data"] / data["data"].std(axis=0),
        data["target"] / data["target"].std(),
    )
    np.testing.assert_allclose(study.truth, standard.coef_, rtol=1e-8)
    standard_error = study.half_width / stats.t.ppf(0.975, 442 - 11)
    np.testing.assert_allclose(study.truth / standard_error, T_VALUES, atol=5.1e-4)
    assert study.covered().shape == (1, 10)


def test_a_bad_option_is_refused_in_one_line(tmp_path, monkeypatch, capsys):
    assert_lesson_refuses("online_inference", tmp_path, monkeypatch, capsys)
