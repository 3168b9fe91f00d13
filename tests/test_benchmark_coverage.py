# SPDX-License-Identifier: Apache-2.0
"""`benchmarks/coverage.py`: one row of its page, and bad options."""

import pytest

from benchmarks import coverage
from tests.programs import error_of


@pytest.mark.parametrize("kind", [coverage.linear, coverage.logistic])
def test_the_rule_covers(kind):
    design, rule = kind(5), coverage.rates(5)[-1]
    ((row,),), seconds = coverage.measure(
        design, [rule], [200], observations=20_000, replications=200, seed=0
    )
    # Intervals a third shorter would cover 0.85 of the time: that would be noticed.
    assert 8 * row.error < 0.95 - 0.85
    assert -0.03 - 4 * row.error < row.coverage - 0.95 < 4 * row.error
    assert 1.0 < row.length < 1.4
    assert 0.8 < row.rmse < 1.2
    line = coverage.format_row(design, 20_000, rule, 200, row)
    assert f"**min(0.2, 0.5 t^-0.505)**, the rule | 200 | {row.coverage:.4f} ±" in line
    assert seconds > 0


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--observations", "0"),
        ("--observations", "150"),
        ("--replications", "31"),
        ("--seed", "-1"),
        ("--output", "missing/page.md"),
        ("--speed", "1"),
    ],
)
def test_a_bad_option_is_refused_in_one_line(option, value, capsys):
    assert option in error_of(coverage.main, [option, value], capsys)
