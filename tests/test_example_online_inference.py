# SPDX-License-Identifier: Apache-2.0
"""`examples/online_inference.py` shows what it says, and refuses bad options."""

import numpy as np
import pytest
from scipy import stats
from sklearn.datasets import load_diabetes
from sklearn.linear_model import LinearRegression

from examples import online_inference
from tests.programs import assert_refuses_outputs, error_of

# What statistics packages print for the data as it is bundled.
T_VALUES = [-0.168, -3.917, 7.813, 4.958, -1.901, 1.406, 0.475, 1.097, 4.370, 1.025]


def test_intervals_cover_and_shrink(tmp_path, capsys):
    figure = tmp_path / "new" / "figure.png"
    options = ["--observations", "20000", "--replications", "100"]
    results = online_inference.main([*options, "--output", str(figure)])

    for study in results[1:]:
        assert study.observations[-1] == 20_000
        shape = (len(study.observations), 100, len(study.truth))
        assert study.lower.shape == study.upper.shape == shape
        # Averaging begins after 200 observations; the second reading is at 200.
        assert np.isnan(study.lower[1]).all()
        assert np.isfinite(study.lower[2:]).all()
        assert np.all(study.lower[2:] < study.upper[2:])
        # A quarter of the observations is the reading where they are twice as long.
        quarter = len(study.observations) // 4 - 1
        assert 1.8 < study.lengths()[quarter] / study.lengths()[-1] < 2.2
        np.testing.assert_allclose(
            study.average, (study.lower[-1] + study.upper[-1]) / 2, rtol=1e-4, atol=1e-6
        )

    covered = results.linear.coverage()
    error = covered.std() / np.sqrt(len(covered))
    assert abs(covered.mean() - 0.95) < 4 * error
    # Intervals a third shorter would cover 0.85 of the time: that would be noticed.
    assert 8 * error < 0.95 - 0.85
    # The two others get there more slowly.
    assert 0.85 < results.logistic.coverage().mean() < 0.97
    assert 0.85 < results.diabetes.coverage().mean() < 0.97
    # Of the one stream that is shown, most intervals hold the least-squares solution.
    assert results.diabetes.coverage()[0] > 0.5

    assert figure.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert figure.stat().st_size < 150 * 1024
    printed = capsys.readouterr().out
    for name, coefficient in zip(
        results.least_squares.names, results.least_squares.coefficients, strict=True
    ):
        assert f"| {name:8} | {coefficient:+.3f} ± " in printed
    for average in results.diabetes.average[0]:
        assert f"| {average:+.4f} ± " in printed
    assert f"linear: {100 * covered.mean():.1f} ± {100 * error:.1f} %" in printed
    assert "observations 20000, replications 100, rate 5." in printed
    assert str(figure) in printed


def test_least_squares_are_the_textbooks():
    textbook, stream = online_inference.diabetes(5.0)
    data = load_diabetes()
    standard = LinearRegression().fit(
        data["data"] / data["data"].std(axis=0),
        data["target"] / data["target"].std(),
    )
    np.testing.assert_allclose(textbook.coefficients, standard.coef_, rtol=1e-8)
    np.testing.assert_array_equal(stream.truth, textbook.coefficients)
    standard_error = textbook.half_width / stats.t.ppf(0.975, 442 - 11)
    np.testing.assert_allclose(
        textbook.coefficients / standard_error, T_VALUES, atol=5.1e-4
    )


def test_the_shortest_run(tmp_path):
    options = ["--observations", "200", "--replications", "1"]
    figure = tmp_path / "figure.svg"
    results = online_inference.main([*options, "--output", str(figure)])
    assert results.linear.average.shape == (1, 5)
    assert figure.exists()


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--observations", "0"),
        ("--observations", "-200"),
        ("--observations", "1001"),
        ("--observations", "1e5"),
        ("--replications", "0"),
        ("--replications", "many"),
        ("--rate", "0"),
        ("--rate", "inf"),
        ("--rate", "nan"),
        ("--speed", "1"),
    ],
)
def test_a_bad_option_is_refused_in_one_line(option, value, tmp_path, capsys):
    figure = tmp_path / "new" / "figure.png"
    argv = [option, value, "--output", str(figure)]
    assert option in error_of(online_inference.main, argv, capsys)
    # Nor is a folder made for a figure that will not be drawn.
    assert not figure.parent.exists()


def test_an_output_that_cannot_be_written_is_refused(tmp_path, capsys):
    assert_refuses_outputs(online_inference.main, tmp_path, capsys)
