# SPDX-License-Identifier: Apache-2.0
"""`benchmarks/coverage.py`: rows of its page, the page, and bad options."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import coverage
from tests.programs import error_of

KINDS = [coverage.linear, coverage.logistic, partial(coverage.quantile, 0.5)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", [coverage.one_run, coverage.two_runs])
def test_the_rule_covers(kind, method):
    study = method(kind(5), 20_000, 200)
    study = study._replace(starts=[study.start])
    ((row,),), seconds = coverage.measure(study, seed=0)
    # Intervals a third shorter would cover 0.85 of the time: that would be noticed.
    assert 8 * row.error < 0.95 - 0.85
    assert -0.03 - 4 * row.error < row.coverage - 0.95 < 4 * row.error
    assert 1.0 < row.length < 1.6
    assert 0.8 < row.rmse < 1.3
    assert seconds > 0


@pytest.mark.parametrize(
    ("study", "cell"),
    [
        (coverage.one_run(coverage.linear(5), 20_000, 32), "min(0.2, 0.5 t^-0.505)"),
        (coverage.two_runs(coverage.linear(5), 20_000, 32), "min(0.1, 1 t^-0.505)"),
        (coverage.two_runs(coverage.logistic(5), 20_000, 32), "min(0.4, 4 t^-0.505)"),
        (coverage.two_runs(KINDS[2](5), 20_000, 32), "min(0.2, 2 t^-0.505)"),
    ],
)
def test_the_rule_stands_in_bold(study, cell):
    row = coverage.Row(0.95, 0.003, 0.94, 1.3, 1.0, 0.03)
    line = coverage.format_row(study, study.rate, study.start, row, 1.0)
    assert f"| 20,000 | **{cell}**, the rule | 200 | 0.9500 ± 0.0030 | 0.940 |" in line
    line = coverage.format_row(study, study.rate, 0, row, 1.0)
    assert f"| {cell} | 0 |" in line
    other = coverage.Rate(1.0, 0.667)
    line = coverage.format_row(study, other, study.start, row, 1.0)
    assert "| 1 t^-0.667 | 200 |" in line


def test_extrapolation_takes_the_bias_away():
    rate = coverage.Rate(4.0, 0.505, 0.4)
    once, twice = coverage.ONE_RUN, coverage.EXTRAPOLATED
    study = coverage.two_runs(coverage.logistic(5), 20_000, 200)
    biases = {}
    for method in (once, twice):
        tried = study._replace(method=method, tried=[rate])
        ((row,),), _ = coverage.measure(tried, seed=1)
        biases[method] = row.bias
    # Noise alone is 0.07.
    assert biases[once] > 0.7
    assert biases[twice] < 0.3


def test_extrapolation_keeps_the_mean_and_loses_the_slope():
    multiples, weights = map(np.array, coverage.EXTRAPOLATED)
    assert weights.sum() == 1
    assert weights @ multiples == 0


@pytest.mark.parametrize("tau", [0.5, 0.9])
def test_the_quantile_is_what_its_name_says(tau):
    design = coverage.quantile(tau, 5)
    x, y = coverage.draw(design, 1000, jax.random.key(0))
    np.testing.assert_array_equal(x[:, 0], 1)
    prediction = jnp.einsum("d, tdr -> tr", design.coefficients, x)
    assert abs(np.mean(y <= prediction) - tau) < 4 * np.sqrt(tau * (1 - tau) / y.size)
    slope = jax.vmap(jax.grad(design.loss))
    predictions = jnp.array([0.0, 1.0, 2.0])
    slopes = slope(predictions, jnp.ones(3))
    np.testing.assert_allclose(slopes, [-tau, 1 - tau, 1 - tau], rtol=1e-6)


def test_the_page_has_a_table_under_every_heading(monkeypatch, tmp_path):
    def sections(n, replications):
        one = coverage.one_run(coverage.linear(5), n, replications)
        two = coverage.two_runs(coverage.logistic(5), n, replications, 1)
        return [[one], [two], [one], [two]]

    monkeypatch.setattr(coverage, "sections", sections)
    output = tmp_path / "page.md"
    options = ["--observations", "1000", "--replications", "32"]
    coverage.main([*options, "--output", str(output)])
    page = output.read_text()
    rows = [
        sum(line.startswith("| l") for line in part.splitlines())
        for part in page.split("\n## ")[1:]
    ]
    assert rows == [3, 2, 3, 2]
    # The same design and length see the same stream: the same row again.
    rules = [line for line in page.splitlines() if "the rule | 50 |" in line]
    first, _, again, _ = (line.rsplit("|", 2)[0] for line in rules)
    assert first == again


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--observations", "0"),
        ("--observations", "1500"),
        ("--replications", "31"),
        ("--seed", "-1"),
        ("--output", "missing/page.md"),
        ("--speed", "1"),
    ],
)
def test_a_bad_option_is_refused_in_one_line(option, value, capsys):
    assert option in error_of(coverage.main, [option, value], capsys)
