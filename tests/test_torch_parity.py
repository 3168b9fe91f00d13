# SPDX-License-Identifier: Apache-2.0
"""`asgd` against recorded runs of `torch.optim.ASGD` and against an installed torch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from asgd_optax import asgd, averaged_params
from tests.support import precision_of, train_step
from tools.record_torch_fixtures import (
    CASES,
    CHECKPOINTS,
    DTYPES,
    FIXTURES,
    LONG_CASE,
    LONG_SHAPES,
    LONG_STEPS,
    RECIPE,
    RUNS,
    TORCH_CASES,
    Case,
    draw_problem,
    run_torch,
)

LIVE_CHECKPOINTS = tuple(range(50, 401, 50))

EPS = {dtype: float(np.finfo(dtype).eps) for dtype in DTYPES}
# Two correct programs drift apart at random by about half an eps per step. In single
# precision torch's for-loop also drifts in one direction: it rounds 1 - lambd eta to a
# multiple of eps / 2, an error of up to eps / 4 per step. An eps per step and at most
# 400 steps cover both.
TOLERANCES = {dtype: 400 * eps if eps > 1e-10 else 2e-14 for dtype, eps in EPS.items()}


def relative_difference(actual, expected):
    """Return max |actual - expected| / max |expected|, or 0 for empty arrays."""
    if expected.size == 0:
        return 0.0
    difference = actual.astype(np.complex128) - expected.astype(np.complex128)
    return np.max(np.abs(difference)) / np.max(np.abs(expected))


def learning_rate(case, steps):
    """Return the learning rate of `case`: for a scheduler, a schedule one step late.

    At the end of a step torch computes the eta of the next step. Only then does its
    scheduler set the next lr.
    """
    lr = case.arguments.get("lr", 1e-2)
    if case.scheduler is None:
        return lr
    _, options = case.scheduler
    # The products that torch forms: a power would be off by its exponent in eps.
    every = options.get("step_size", 1)
    factors = [1 if n % every else options["gamma"] for n in range(1, steps)]
    table = np.cumprod([lr, *factors])

    def schedule(n):
        return jnp.asarray(table)[n]

    return lambda n: schedule(jnp.maximum(n - 1, 0))


def transformation(case, steps, **options):
    arguments = {k: v for k, v in case.arguments.items() if k not in ("lr", "maximize")}
    sign = -1.0 if case.arguments.get("maximize") else 1.0
    tx = asgd(learning_rate(case, steps), **arguments, **options)
    return optax.chain(optax.scale(sign), tx)


def run_asgd(cases, params, gradients, checkpoints, **options):
    """Return what `run_torch` does for each case, by `asgd` with `options`.

    All cases share a program, which compiles in a fifth of the time.
    """
    txs = {
        name: transformation(case, max(checkpoints), **options)
        for name, case in cases.items()
    }

    @jax.jit
    def step_fn(runs, gradient):
        return {name: train_step(tx, *runs[name], gradient) for name, tx in txs.items()}

    rows = {name: {} for name in cases}
    with precision_of(next(iter(params.values())).dtype):
        runs = {name: (params, tx.init(params)) for name, tx in txs.items()}
        for step in range(1, max(checkpoints) + 1):
            runs = step_fn(runs, {name: g[step - 1] for name, g in gradients.items()})
            if step in checkpoints:
                for name, (weights, state) in runs.items():
                    append_row(rows[name], weights, state)
    return {
        case: {name: np.stack(row) for name, row in of_case.items()}
        for case, of_case in rows.items()
    }


def append_row(rows, params, state):
    for name, weight in params.items():
        rows.setdefault(f"params/{name}", []).append(weight)
    for name, average in averaged_params(state).items():
        rows.setdefault(f"ax/{name}", []).append(average)
    for name in ("eta", "mu", "step"):
        rows.setdefault(name, []).append(getattr(state[-1], name))


@functools.cache
def recorded():
    with np.load(FIXTURES) as arrays:
        return dict(arrays)


def assert_same_trajectory(actual, expected, dtype, foreach):
    assert actual.keys() == expected.keys()
    for name in expected:
        where = f"{name}, foreach={foreach}"
        if name in ("step", "mu"):
            np.testing.assert_array_equal(actual[name], expected[name], where)
            continue
        assert actual[name].dtype == expected[name].dtype, where
        assert actual[name].shape == expected[name].shape, where
        # Every step computes eta from its number: no error accumulates.
        tolerance = 2 * EPS[dtype] if name == "eta" else TOLERANCES[dtype]
        rows = zip(actual[name], expected[name], strict=True)
        differences = [relative_difference(ours, torchs) for ours, torchs in rows]
        assert np.max(differences) <= tolerance, where


def test_torch_fixtures_match_these_cases():
    assert recorded()["recipe"] == RECIPE, "run tools/record_torch_fixtures.py"


@functools.cache
def runs_of_all_cases(dtype, checkpoints):
    return run_asgd(CASES, *draw_problem(dtype, max(checkpoints)), checkpoints)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_asgd_reproduces_recorded_torch(name, dtype):
    actual = runs_of_all_cases(dtype, CHECKPOINTS)[name]
    for foreach in (False, True):
        run = RUNS.index((name, foreach))
        expected = {
            key.removeprefix(f"{dtype}/"): rows[run]
            for key, rows in recorded().items()
            if key.startswith(f"{dtype}/")
        }
        assert_same_trajectory(actual, expected, dtype, foreach)


def test_float32_average_is_as_accurate_as_torchs():
    params, gradients = draw_problem("float32", LONG_STEPS, LONG_SHAPES)
    exact = recorded()["long/ax"]

    def rms_error(**options):
        case = {"long": LONG_CASE}
        run = run_asgd(case, params, gradients, (LONG_STEPS,), **options)["long"]
        return np.sqrt(np.mean((run["ax/vector"][-1] - exact) ** 2))

    for_loop = recorded()["long/rms/for-loop"]
    foreach = recorded()["long/rms/foreach"]
    # foreach rounds as often as asgd. The ratio of two rms errors over n independent
    # elements has a standard error of n ** -0.5.
    assert rms_error() < min(for_loop, foreach * (1 + 3 * exact.size**-0.5))
    assert rms_error(compensated=True) < min(for_loop, foreach)


@pytest.mark.torch
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_asgd_reproduces_installed_torch(name, dtype):
    pytest.importorskip("torch")
    problem = draw_problem(dtype, max(LIVE_CHECKPOINTS))
    actual = runs_of_all_cases(dtype, LIVE_CHECKPOINTS)[name]
    for foreach in (False, True):
        expected = run_torch(
            CASES[name], *problem, foreach=foreach, checkpoints=LIVE_CHECKPOINTS
        )
        assert_same_trajectory(actual, expected, dtype, foreach)


@pytest.mark.torch
def test_cases_include_those_of_torchs_own_tests():
    pytest.importorskip("torch")
    pytest.importorskip("expecttest", reason="torch.testing._internal imports it")
    from torch.testing._internal import common_optimizers

    inputs = common_optimizers.optim_inputs_func_asgd("cpu")
    assert {i.desc: Case(i.kwargs) for i in inputs} == TORCH_CASES
