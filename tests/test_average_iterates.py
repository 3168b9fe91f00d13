# SPDX-License-Identifier: Apache-2.0
"""`average_iterates`: direct sums, counting, pass-through of updates, cost."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from asgd_optax import (
    asgd,
    average_iterates,
    averaged_params,
    exponential_weighting,
    power_weighting,
    uniform_weighting,
)
from tests import reference
from tests.support import (
    INT32_MAX,
    WEIGHTINGS,
    bits,
    enable_x64,
    make_weighting,
    train_step,
)

EPS = float(np.finfo(np.float32).eps)
STARTS, EVERIES = [0, 1, 5, 7.0, np.inf], [1, 2, 3]
UPDATES = np.random.default_rng(0).standard_normal((20, 3))
ITERATES = 1 + np.cumsum(UPDATES, axis=0)  # from params of ones


def run(tx):
    """Return the average and the number of averaged iterates after each update."""

    def body(carry, updates):
        params, state = train_step(tx, *carry, updates)
        return (params, state), (averaged_params(state), state.averaged)

    params = jnp.ones(3)
    return jax.lax.scan(body, (params, tx.init(params)), jnp.asarray(UPDATES))[1]


def averages(name, value, start, every, compensated=False):
    weighting = make_weighting(name, value)
    tx = average_iterates(weighting, start=start, every=every, compensated=compensated)
    return run(tx)[0]


def assert_direct_sums(found, name, value, start, every):
    np.testing.assert_allclose(
        found,
        list(reference.average_iterates(ITERATES, name, value, start, every)),
        rtol=1e-13,
        atol=1e-13 * np.abs(ITERATES).max(),
        err_msg=f"{name} {value}, start {start}, every {every}",
    )


def test_average_equals_direct_sums_when_arguments_are_traced():
    @jax.jit
    def all_averages(values, start, every):
        return [
            averages(name, value, start, every, compensated)
            for (name, _), value in zip(WEIGHTINGS, values, strict=True)
            for compensated in (False, True)
        ]

    values = [value for _, value in WEIGHTINGS]
    with enable_x64(True):
        for start, every in itertools.product(STARTS, EVERIES):
            found = all_averages(values, float(start), every)
            for i, (name, value) in enumerate(WEIGHTINGS):
                for one in found[2 * i : 2 * i + 2]:
                    assert_direct_sums(one, name, value, start, every)


def test_average_equals_direct_sums_when_vmapped_over_starts():
    with enable_x64(True):
        mapped = jax.vmap(lambda start: averages("uniform", None, start, 2))
        found = mapped(jnp.asarray(STARTS))
        for start, one in zip(STARTS, found, strict=True):
            assert_direct_sums(one, "uniform", None, start, 2)


@pytest.mark.parametrize("start", STARTS)
def test_average_equals_direct_sums_when_arguments_are_concrete(start):
    cases = []
    for every, compensated in itertools.product(EVERIES, [False, True]):
        # All weightings in turn, rather than every one at every start.
        turn = 3 * STARTS.index(start) + every + compensated
        cases.append((*WEIGHTINGS[turn % len(WEIGHTINGS)], start, every, compensated))
    with enable_x64(True):
        found = jax.jit(lambda: [averages(*case) for case in cases])()
        for (*case, _), one in zip(cases, found, strict=True):
            assert_direct_sums(one, *case)


@pytest.mark.parametrize("compiled", [False, True])
def test_average_iterates_accepts_numpy_and_jax_scalars(compiled):
    """Inside a traced function they are still concrete."""
    kinds = [np.int32, np.float32, jnp.asarray]
    with enable_x64(True):
        cases = [
            *(("polynomial", kind(3), kind(5), kind(2)) for kind in kinds),
            ("exponential", jnp.asarray(0.5), 5, 2),
        ]
        run_all = lambda: [averages(*case) for case in cases]  # noqa: E731
        found = jax.jit(run_all)() if compiled else run_all()
        for case, one in zip(cases, found, strict=True):
            name, value, start, every = case
            assert_direct_sums(one, name, float(value), float(start), int(every))


def warm(n):
    return (1 + n) / (10 + n)


# A weighting, and the weight of the n-th iterate by its formula.
FORMULAS = {
    "uniform": (uniform_weighting(), lambda n: 1 / n),
    "power 0": (power_weighting(0), lambda n: 1 / n),
    "power 6.94": (power_weighting(6.94), lambda n: 1 - (1 - 1 / n) ** 7.94),
    "plain EMA": (exponential_weighting(0.9, debias=False), lambda n: 1 - 0.9),
    "warm EMA": (
        exponential_weighting(0.4, warmup=warm),
        lambda n: max(1 - 0.4, 1 - warm(n)),
    ),
    "custom": (lambda n: 2 / (3 + n), lambda n: 2 / (3 + n)),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_average_has_the_weights_of_the_formula(name):
    """Exactly in float64: n must be int64, or 1 / n would have float32's precision."""
    weighting, formula = FORMULAS[name]
    cases = list(itertools.product([0, 1, 5], [1, 3], [False, True]))

    def run_case(start, every, include_start):
        return run(
            average_iterates(
                weighting, start=start, every=every, include_start=include_start
            )
        )

    with enable_x64(True):
        found = jax.jit(lambda: [run_case(*case) for case in cases])()
    path = np.concatenate([np.ones((1, 3)), ITERATES])
    for case, (average, counts) in zip(cases, found, strict=True):
        start, every, include_start = case
        for step in (1, 2, 5, 6, 20):
            weights = reference.average_shares(formula, step, *case)
            expected = weights @ path[: step + 1]
            np.testing.assert_allclose(
                average[step - 1], expected, rtol=0, atol=2e-15, err_msg=f"{case}"
            )
        steps = range(1, len(UPDATES) + 1)
        expected = [max(0, n - start) // every for n in steps]
        if include_start:
            expected = [c + (n >= start) for n, c in zip(steps, expected, strict=True)]
        assert counts.tolist() == expected, case


@pytest.mark.parametrize("every", [1, 2])
def test_average_includes_a_traced_start(every):
    @jax.jit
    def train(start):
        tx = average_iterates(start=start, every=every, include_start=True)
        state = tx.init(jnp.float32(0))
        counts = [state.averaged]
        for n in range(4):
            _, state = tx.update(jnp.float32(1), state, jnp.float32(n))
            counts.append(state.averaged)
        return counts, state.average

    for start in (0, 1, 3):
        counts, average = train(start)
        averaged = [start, *range(start + every, 5, every)]
        assert counts == [sum(t <= n for t in averaged) for n in range(5)]
        np.testing.assert_allclose(average, np.mean(averaged), rtol=1e-6)


@pytest.mark.parametrize("every", [1, 2])
def test_weighting_is_evaluated_in_every_trace(every):
    """The transformation keeps no value, and no tracer, of an earlier trace."""
    names = {}
    tx = average_iterates(lambda n: names["weight"], every=every)

    def average(weight):
        names["weight"] = weight
        params = jnp.zeros(())
        state = tx.init(params)
        for _ in range(4):
            params, state = train_step(tx, params, state, jnp.ones(()))
        return state.average

    def exact(weight):
        found = every - 1  # the average equals the iterate until it begins
        for iterate in range(every, 5, every):
            found += weight * (iterate - found)
        return found

    for weight in (0.25, 0.5):
        for function in (average, jax.jit(lambda w: average(w))):
            np.testing.assert_allclose(function(weight), exact(weight), rtol=1e-6)
        slope = (exact(weight + 1e-6) - exact(weight - 1e-6)) / 2e-6
        np.testing.assert_allclose(jax.grad(average)(weight), slope, rtol=1e-5)


@pytest.mark.flax  # scikit-learn is installed where flax is
def test_average_equals_scikit_learns_averaged_sgd_regression():
    from sklearn.datasets import load_diabetes
    from sklearn.linear_model import SGDRegressor

    x, y = load_diabetes(return_X_y=True)
    x, y = x / x.std(axis=0), (y - y.mean()) / y.std()
    options = {"learning_rate": "constant", "eta0": 0.01, "penalty": None}
    options |= {"shuffle": False, "tol": None, "max_iter": 2}
    sklearns = SGDRegressor(average=True, **options).fit(x, y)

    tx = optax.chain(optax.sgd(0.01), average_iterates())
    loss = lambda w, x, y: (y - x @ w) ** 2 / 2  # noqa: E731

    def body(carry, sample):
        grads = jax.grad(loss)(carry[0], *sample)
        return train_step(tx, *carry, grads), None

    with enable_x64(True):
        samples = np.tile(np.c_[x, np.ones(len(x))], (2, 1)), np.tile(y, 2)
        params = jnp.zeros(x.shape[1] + 1)  # the last one is the intercept
        (_, state), _ = jax.lax.scan(body, (params, tx.init(params)), samples)
        ours = averaged_params(state)
    expected = np.append(sklearns.coef_, sklearns.intercept_)
    np.testing.assert_allclose(ours, expected, rtol=1e-12)


def special_numbers(dtype):
    """Return zeros, infinities, NaN, extremes and subnormal numbers of `dtype`."""
    info = jnp.finfo(dtype)
    numbers = [0.0, -0.0, np.inf, -np.inf, np.nan, 1.5, -1 / 3]
    numbers += [float(info.max), float(info.tiny), -float(info.eps)]
    numbers += [k * float(info.smallest_subnormal) for k in range(-5, 5)]
    if not np.issubdtype(jnp.dtype(dtype), np.complexfloating):
        return np.array(numbers).astype(jnp.dtype(dtype))
    array = np.zeros(len(numbers), dtype)
    array.real, array.imag = numbers, numbers[::-1]
    return array


@pytest.mark.parametrize("compiled", [False, True])
def test_updates_pass_through_bitwise(compiled):
    dtypes = ["float32", "bfloat16", "float16", "float64", "complex64"]
    with enable_x64(True):
        updates = {dtype: special_numbers(dtype) for dtype in dtypes}
        tx, params = average_iterates(), jax.tree.map(np.ones_like, updates)
        update = jax.jit(tx.update) if compiled else tx.update
        found, _ = update(jax.tree.map(jnp.asarray, updates), tx.init(params), params)
    assert bits(found) == bits(updates)


def test_counters_saturate_at_the_largest_int32():
    tx = average_iterates(start=5)
    params = jnp.ones(3)
    last = jnp.asarray(INT32_MAX - 1, jnp.int32)
    state = tx.init(params)._replace(step=last, averaged=last)
    for _ in range(3):
        _, state = tx.update(params, state, params)
        for counter in (state.step, state.averaged):
            assert counter.dtype == jnp.int32
            assert int(counter) == INT32_MAX
    moved = 3 / INT32_MAX  # too little for float32
    np.testing.assert_allclose(state.average, 1 + moved, rtol=EPS)


def test_averaged_iterates_keep_their_weights_when_start_or_every_changes():
    """The state counts the averaged iterates: n does not follow from the step."""
    injected = optax.inject_hyperparams(average_iterates)(start=0, every=1)
    update = jax.jit(injected.update)
    for starts, everies in (
        ([2] * 9, [1, 1, 1, 1, 1, 3, 3, 3, 3]),
        ([2] * 9, [3] * 5 + [1] * 4),
        ([1] * 5 + [3] * 4, [1] * 9),
        ([1] * 5 + [99] * 4, [1] * 9),  # averaging stops: the average is kept
        ([1] * 5 + [99] * 4, [2] * 9),
        ([99] * 5 + [0] * 4, [2] * 9),  # averaging begins by a change of `start`
    ):
        params, state, averaged = jnp.zeros(3), injected.init(jnp.zeros(3)), []
        for n, (start, every) in enumerate(zip(starts, everies, strict=True), 1):
            values = {"start": jnp.asarray(start), "every": jnp.asarray(every)}
            state = state._replace(hyperparams=values)
            updates, state = update(jnp.full(3, float(n)), state, params)
            params = optax.apply_updates(params, updates)
            since = n - start
            if since >= every and since % every == 0:
                averaged.append(float(params[0]))
            expected = np.mean(averaged) if averaged else float(params[0])
            np.testing.assert_allclose(averaged_params(state), expected, rtol=4 * EPS)
            assert int(state.inner_state.averaged) == len(averaged)


def test_average_is_kept_when_a_concrete_start_moves_past_the_step():
    params, tx = jnp.ones(3), average_iterates()
    _, state = train_step(tx, params, tx.init(params), params)
    _, kept = average_iterates(start=9).update(3 * params, state, params)
    assert bits(kept.average) == bits(state.average) == bits(2 * params)
    assert kept.averaged == 1


SIZE = 2**20


def compiled_step(tx, dtype):
    params = jax.ShapeDtypeStruct((SIZE,), dtype)
    state = jax.eval_shape(tx.init, params)
    step = jax.jit(lambda *carry_and_grads: train_step(tx, *carry_and_grads))
    return step.lower(params, state, params).compile()


def kernels(compiled):
    """Count the instructions of the entry computation that do any work."""
    entry = re.search(r"^ENTRY.*?^}", compiled.as_text(), re.DOTALL | re.MULTILINE)
    opcodes = re.findall(r"^.* = .*? ([a-z-]+)\(", entry[0], re.MULTILINE)
    idle = {"parameter", "constant", "bitcast", "tuple", "get-tuple-element"}
    return sum(opcode not in idle for opcode in opcodes)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_step_moves_no_more_bytes_than_asgds(dtype):
    ours = compiled_step(optax.chain(optax.sgd(0.1), average_iterates()), dtype)
    # Without the decays asgd does the same arithmetic.
    asgds = compiled_step(asgd(0.1, lambd=0.0, alpha=0.0), dtype)
    bytes_per_parameter = [  # rounding leaves out the scalars
        round(c.cost_analysis()["bytes accessed"] / SIZE, 2) for c in (ours, asgds)
    ]
    assert bytes_per_parameter[0] <= bytes_per_parameter[1]
    assert 0 < kernels(ours) <= kernels(asgds)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_step_between_averaged_iterates_copies_nothing(dtype):
    tx = optax.chain(optax.sgd(0.1), average_iterates(every=10))
    assert compiled_step(tx, dtype).memory_analysis().temp_size_in_bytes < 4096
