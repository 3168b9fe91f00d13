# SPDX-License-Identifier: Apache-2.0
"""Confidence intervals that may be read repeatedly (`looks`)."""

import csv
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from asgd_optax import confidence_interval, running_random_scaling
from asgd_optax._accessors.critical_value import (
    critical_value,
    critical_value_of_looks,
)

DATA = Path(__file__).with_name("looks")


def simulated(file, column):
    """Return level, R, the simulated critical value and its standard error."""
    with (DATA / file).open() as lines:
        rows = [
            [float(row[name]) for name in ("level", "R", column, "standard_error")]
            for row in csv.DictReader(lines)
        ]
    return [row for row in rows if row[1] <= 1_000]


@pytest.mark.parametrize(
    ("file", "column"), [("looks.csv", "c"), ("check.csv", "simulated")]
)
def test_critical_values_agree_with_simulated_paths(file, column):
    rows = simulated(file, column)
    assert len(rows) > 200
    for level, ratio, value, error in rows:
        c = critical_value_of_looks(level, ratio)
        assert abs(c - value) <= 0.005 * value + 4 * error, (level, ratio)


def test_critical_values_increase_with_level_and_ratio():
    levels = np.linspace(0.5, 0.999, 30)
    ratios = np.geomspace(1, 1_000, 30)
    table = np.array([[critical_value_of_looks(p, r) for r in ratios] for p in levels])
    assert (np.diff(table, axis=0) > 0).all()
    assert (np.diff(table, axis=1) > 0).all()
    assert table[7, 0] == critical_value(levels[7])


@pytest.mark.flax
def test_simulation_reproduces_the_formula():
    from studies import looks

    values = looks.simulated(paths=20_000)[:3, :2]
    expected = [
        [critical_value_of_looks(p, r) for p in looks.LEVELS[:2]]
        for r in looks.RATIOS[:3]
    ]
    # Five standard errors of quantiles of 20,000 paths.
    np.testing.assert_allclose(values, expected, rtol=0.06)


def stream_state(n):
    statistic = running_random_scaling(start=3)
    values = 5.0 + jax.random.normal(jax.random.key(0), (n + 3, 2))
    state = statistic.init(values[0])
    return jax.lax.scan(lambda s, v: (statistic.update(s, v), None), state, values)[0]


def test_looks_widen_the_interval_by_the_critical_value():
    state = stream_state(50)
    lower, upper = confidence_interval(state)
    wide_lower, wide_upper = confidence_interval(state, looks=(20, 200))
    factor = critical_value_of_looks(0.95, 10) / critical_value(0.95)
    np.testing.assert_allclose(
        wide_upper - wide_lower, factor * (upper - lower), rtol=1e-5
    )
    for same, end in zip(
        confidence_interval(state, looks=(50, 50)), (lower, upper), strict=True
    ):
        np.testing.assert_array_equal(same, end)


@pytest.mark.parametrize(
    ("looks", "inside"),
    [((50, 50), True), ((2, 49), False), ((51, 60), False), ((20, 200), True)],
)
def test_intervals_are_nan_outside_the_looks(looks, inside):
    state = stream_state(50)
    read = jax.jit(lambda s: confidence_interval(s, looks=looks))
    several = jax.tree.map(lambda x: jnp.stack([x, x]), state)
    for ends in (read(state), read(several), jax.vmap(read)(several)):
        assert all(bool(np.isfinite(end).all()) == inside for end in ends)
        assert inside or all(np.isnan(end).all() for end in ends)


@pytest.mark.parametrize(
    "looks",
    [
        5,
        (5,),
        (5, 6, 7),
        (1, 10),
        (10, 9),
        (2, 2_001),
        (2.5, 9),
        ("2", "9"),
        (2, np.inf),
    ],
)
def test_wrong_looks_are_named(looks):
    with pytest.raises(ValueError, match="^looks must be two concrete whole numbers"):
        confidence_interval(stream_state(4), looks=looks)


def test_traced_looks_and_low_levels_are_named():
    state = stream_state(4)
    with pytest.raises(ValueError, match="^looks"):
        jax.jit(lambda last: confidence_interval(state, looks=(2, last)))(9)
    with pytest.raises(ValueError, match="^level must be at least 0.5"):
        confidence_interval(state, 0.4, looks=(2, 9))
