# SPDX-License-Identifier: Apache-2.0
"""`average_iterates`: direct sums, counting, half precision, what it costs."""

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
    polynomial_weighting,
    power_weighting,
    running_average,
    uniform_weighting,
)
from tests import reference
from tests.support import (
    WEIGHTINGS,
    assert_average_follows,
    bits,
    enable_x64,
    hard_trees,
    make_weighting,
    precision_of,
    train_step,
)

INT32_MAX = 2**31 - 1


EPS = float(np.finfo(np.float32).eps)


STARTS = [0, 1, 5, 7.0, np.inf]


EVERIES = [1, 2, 3]


STEPS = np.random.default_rng(0).standard_normal((20, 3))  # the updates


ITERATES = 1 + np.cumsum(STEPS, axis=0)


def averages(name, value, start, every, *, compensated=False):
    """The average after each of the updates `STEPS`, from params of ones."""
    weighting = make_weighting(name, value)
    tx = average_iterates(weighting, start=start, every=every, compensated=compensated)

    def body(carry, updates):
        params, state = carry
        updates, state = tx.update(updates, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), averaged_params(state)

    params = jnp.ones(3, STEPS.dtype)
    return jax.lax.scan(body, (params, tx.init(params)), jnp.asarray(STEPS))[1]


traced_averages = jax.jit(averages, static_argnames=("name", "compensated"))


def assert_direct_sums(found, name, value, start, every):
    np.testing.assert_allclose(
        found,
        list(reference.average_iterates(ITERATES, name, value, start, every)),
        rtol=1e-13,
        atol=1e-13 * np.abs(ITERATES).max(),
        err_msg=f"{name} {value}, start {start}, every {every}",
    )


@pytest.mark.parametrize("compensated", [False, True])
@pytest.mark.parametrize(("name", "value"), WEIGHTINGS)
def test_traced_arguments_give_direct_sums(name, value, compensated):
    with enable_x64(True):
        for start, every in itertools.product(STARTS, EVERIES):
            found = traced_averages(name, value, start, every, compensated=compensated)
            assert_direct_sums(found, name, value, start, every)


@pytest.mark.parametrize("start", STARTS)
def test_concrete_arguments_give_direct_sums(start):
    cases = []
    for every, compensated in itertools.product(EVERIES, [False, True]):
        # Every weighting has its turn; all of them at all starts would only take long.
        turn = 3 * STARTS.index(start) + every + compensated
        cases.append((*WEIGHTINGS[turn % len(WEIGHTINGS)], start, every, compensated))

    @jax.jit
    def run():
        return [averages(*case, compensated=wanted) for *case, wanted in cases]

    with enable_x64(True):
        for (*case, _), found in zip(cases, run(), strict=True):
            assert_direct_sums(found, *case)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("number", [np.int32, np.float32, jnp.float32, jnp.asarray])
def test_arguments_of_any_kind_of_number(number, compiled):
    """Arrays are concrete inside of a function that is traced, too."""
    with enable_x64(True):
        start, every = number(5), number(2)
        gamma = number(3)
        run = lambda: averages("polynomial", gamma, start, every)  # noqa: E731
        found = jax.jit(run)() if compiled else run()
        assert_direct_sums(found, "polynomial", 3, 5, 2)
        decay = jnp.asarray(0.5)
        run = lambda: averages("exponential", decay, 5, 2)  # noqa: E731
        found = jax.jit(run)() if compiled else run()
        assert_direct_sums(found, "exponential", 0.5, 5, 2)


@pytest.mark.parametrize(
    ("name", "values", "starts"),
    [
        ("uniform", None, [0.0, 1.0, 7.0, np.inf]),
        ("polynomial", [0.0, 1.0, 3.0], 2),
        ("exponential", [0.0, 0.9, 0.999], 2),
    ],
)
def test_vmap_equals_a_loop(name, values, starts):
    with enable_x64(True):
        if values is None:
            run = jax.vmap(lambda start: traced_averages(name, None, start, 2))
            found, rows = run(jnp.asarray(starts)), [(None, s) for s in starts]
        else:
            run = jax.vmap(lambda value: traced_averages(name, value, starts, 2))
            found, rows = run(jnp.asarray(values)), [(v, starts) for v in values]
        for row, (value, start) in zip(found, rows, strict=True):
            alone = traced_averages(name, value, start, 2)
            np.testing.assert_allclose(row, alone, rtol=1e-13)


@pytest.mark.parametrize(
    ("name", "values"),
    [("polynomial", [0.5, 1.0, 3.0]), ("exponential", [0.3, 0.9, 0.999])],
)
def test_gradients_over_the_weightings_parameter(name, values):
    with enable_x64(True):
        # Any fixed weights will do: the plain sum would hide errors that cancel.
        size = lambda value: jnp.vdot(  # noqa: E731
            traced_averages(name, value, 1, 2), ITERATES
        )
        gradient, h = jax.jit(jax.grad(size)), 1e-6
        for value in values:
            difference = (size(value + h) - size(value - h)) / (2 * h)
            np.testing.assert_allclose(gradient(value), difference, rtol=1e-6)


@pytest.mark.flax  # scikit-learn is where flax is: among the examples' needs
@pytest.mark.parametrize("penalty", [{"penalty": None}, {"penalty": "l2", "alpha": 0}])
def test_plain_sgd_equals_scikit_learns_averaged_regression(penalty):
    """Coefficients and intercept, one sample at a time, in two passes."""
    from sklearn.datasets import load_diabetes
    from sklearn.linear_model import SGDRegressor

    x, y = load_diabetes(return_X_y=True)
    x, y = x / x.std(axis=0), (y - y.mean()) / y.std()
    rate, passes = 0.01, 2
    sklearns = SGDRegressor(
        average=True,
        learning_rate="constant",
        eta0=rate,
        shuffle=False,
        tol=None,
        max_iter=passes,
        **penalty,
    ).fit(x, y)

    def loss(params, sample):
        x, y = sample
        return (y - x @ params["coef"] - params["intercept"]) ** 2 / 2

    tx = optax.chain(optax.sgd(rate), average_iterates())

    def body(carry, sample):
        grads = jax.grad(loss)(carry[0], sample)
        return train_step(tx, *carry, grads), None

    with enable_x64(True):
        params = {"coef": jnp.zeros(x.shape[1]), "intercept": jnp.zeros(())}
        samples = (np.tile(x, (passes, 1)), np.tile(y, passes))
        (_, state), _ = jax.lax.scan(body, (params, tx.init(params)), samples)
        ours = averaged_params(state)
    np.testing.assert_allclose(ours["coef"], sklearns.coef_, rtol=1e-12)
    np.testing.assert_allclose(ours["intercept"], sklearns.intercept_[0], rtol=1e-12)


CUSTOM = {
    "python float": lambda n: 0.1,
    "1/n": lambda n: 1 / n,
    "array": lambda n: jnp.minimum(1.0, 10.0 / (9 + n)),
}


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("start", [0, 2])
@pytest.mark.parametrize("name", CUSTOM)
def test_a_weighting_of_ones_own(name, start, every):
    """Also one that does not begin with 1: until then the average is the iterate."""
    weighting, expected = CUSTOM[name], 1.0
    tx = average_iterates(weighting, start=start, every=every)
    update = jax.jit(tx.update)
    params = jnp.ones(())
    state = tx.init(params)
    for step in range(1, 11):
        updates, state = update(jnp.asarray(float(step)), state, params)
        params = optax.apply_updates(params, updates)
        since = step - start
        if since < every:
            expected = float(params)
        elif since % every == 0:
            weight = float(weighting(since // every))
            expected += weight * (float(params) - expected)
        np.testing.assert_allclose(averaged_params(state), expected, rtol=4 * EPS)


OPTIMIZERS = {"sgd": lambda: optax.sgd(0.1), "adam": lambda: optax.adam(0.01)}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_averages_the_iterates_really_applied(dtype, name):
    """Over 2,000 steps under jit, to a few float32 eps of their size."""
    tx = optax.chain(OPTIMIZERS[name](), average_iterates())
    noise = np.random.default_rng(0).standard_normal((2_000, 64))
    params = jnp.ones(64, dtype)

    def body(carry, noise):
        carry = train_step(tx, *carry, noise + carry[0])
        return carry, carry[0]

    carry = (params, tx.init(params))
    (params, state), path = jax.lax.scan(body, carry, jnp.asarray(noise, dtype))
    path = np.asarray(path, np.float64)
    average = averaged_params(state)
    assert average.dtype == jnp.float32
    assert averaged_params(state, params).dtype == dtype
    error = np.abs(np.asarray(average, np.float64) - path.mean(axis=0)).max()
    assert error <= 8 * EPS * np.abs(path).max()


@pytest.mark.parametrize("compensated", [False, True])
@pytest.mark.parametrize(
    ("name", "g_dtypes"),
    [
        ("sgd", ["float16", "float32", "bfloat16"]),
        ("adam", ["float16", "bfloat16", "float32"]),
    ],
)
def test_before_averaging_the_average_is_the_params_bit_for_bit(
    name, g_dtypes, compensated
):
    averaging = average_iterates(start=np.inf, compensated=compensated)
    tx = optax.chain(OPTIMIZERS[name](), averaging)
    pairs = list(zip(["float16", "bfloat16", "float32"], g_dtypes, strict=True))
    assert_average_follows(tx, *hard_trees(pairs, steps=2))


def passed_through(updates, compiled):
    with precision_of(updates.dtype):
        tx, updates = average_iterates(), jnp.asarray(updates)
        params = jnp.ones_like(updates)
        update = jax.jit(tx.update) if compiled else tx.update
        return np.asarray(update(updates, tx.init(params), params)[0])


def special_numbers(dtype, numbers):
    """`numbers` in `dtype`; if it is complex, each as a real and an imaginary part."""
    if not np.issubdtype(jnp.dtype(dtype), np.complexfloating):
        return np.array(numbers).astype(jnp.dtype(dtype))
    array = np.zeros(len(numbers), dtype)
    array.real, array.imag = numbers, numbers[::-1]
    return array


DTYPES = ["float32", "bfloat16", "float16", "float64", "complex64"]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_updates_pass_through_bit_for_bit(dtype, compiled):
    info = jnp.finfo(dtype)
    numbers = [0.0, -0.0, np.inf, -np.inf, np.nan, 1.5, -1 / 3]
    numbers += [float(info.max), float(info.tiny), -float(info.eps)]
    updates = special_numbers(dtype, numbers)
    assert bits(passed_through(updates, compiled)) == bits(updates)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_subnormal_updates_pass_through_bit_for_bit(dtype, compiled):
    smallest = float(jnp.finfo(dtype).smallest_subnormal)
    updates = special_numbers(dtype, [k * smallest for k in range(-5, 5)])
    assert bits(passed_through(updates, compiled)) == bits(updates)


def test_the_counter_saturates():
    tx = average_iterates(start=5)
    params = jnp.ones(3)
    last = jnp.asarray(INT32_MAX - 1, jnp.int32)
    state = tx.init(params)._replace(step=last, averaged=last)
    update = jax.jit(tx.update)
    for _ in range(3):
        _, state = update(params, state, params)
        for counter in (state.step, state.averaged):
            assert counter.dtype == jnp.int32
            assert int(counter) == INT32_MAX
    moved = 3 / INT32_MAX  # too little for float32
    np.testing.assert_allclose(state.average, 1 + moved, rtol=EPS)


def warm(n):
    return (1 + n) / (10 + n)


# A weighting, and the weight of the n-th iterate as its formula has it.
FORMULAS = {
    "uniform": (uniform_weighting(), lambda n: 1 / n),
    "power 0": (power_weighting(0), lambda n: 1 / n),
    "power 6.94": (power_weighting(6.94), lambda n: 1 - (1 - 1 / n) ** 7.94),
    "plain EMA": (exponential_weighting(0.9, debias=False), lambda n: 1 - 0.9),
    "warm EMA": (
        exponential_weighting(0.4, warmup=warm),
        lambda n: max(1 - 0.4, 1 - warm(n)),
    ),
    "one's own": (lambda n: 2 / (3 + n), lambda n: 2 / (3 + n)),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_shares_of_the_iterates(name):
    """Exact in float64: from an n that is int64, so that 1 / n is no float32."""
    weighting, formula = FORMULAS[name]
    cases = list(itertools.product([0, 1, 5], [1, 3], [False, True]))

    def run(start, every, include_start):
        tx = average_iterates(
            weighting, start=start, every=every, include_start=include_start
        )

        def body(carry, updates):
            return train_step(tx, *carry, updates), carry[1].averaged

        params = jnp.ones(3)
        (_, state), counts = jax.lax.scan(body, (params, tx.init(params)), STEPS)
        return state.average, counts

    with enable_x64(True):
        found = jax.jit(lambda: [run(*case) for case in cases])()
    path = np.concatenate([np.ones((1, 3)), ITERATES])
    for case, (average, counts) in zip(cases, found, strict=True):
        start, every, include_start = case
        shares = reference.average_shares(formula, len(STEPS), *case)
        np.testing.assert_allclose(
            average, shares @ path, rtol=0, atol=2e-15, err_msg=f"{case}"
        )
        assert shares.sum() == pytest.approx(1, abs=1e-14)
        expected = [max(0, n - start) // every for n in range(len(STEPS))]
        if include_start:
            expected = [c + (n >= start) for n, c in enumerate(expected)]
        assert counts.tolist() == expected, case


@pytest.mark.parametrize("every", [1, 2])
def test_what_a_weighting_reads_may_change(every):
    """A new trace reads it anew; a transformation holds none of an earlier one's."""
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
        found = every - 1  # the average follows the iterate until it begins
        for iterate in range(every, 5, every):
            found += weight * (iterate - found)
        return found

    for weight in (0.25, 0.5):
        for run in (average, jax.jit(lambda w: average(w))):
            np.testing.assert_allclose(run(weight), exact(weight), rtol=1e-6)
        slope = (exact(weight + 1e-6) - exact(weight - 1e-6)) / 2e-6
        for run in (jax.grad(average), jax.jit(jax.grad(lambda w: average(w)))):
            np.testing.assert_allclose(run(weight), slope, rtol=1e-5)


@pytest.mark.parametrize("every", [1, 2])
def test_a_traced_start_is_included(every):
    @jax.jit
    def run(start):
        tx = average_iterates(start=start, every=every, include_start=True)
        state = tx.init(jnp.float32(0))
        counts = [state.averaged]
        for n in range(4):
            _, state = tx.update(jnp.float32(1), state, jnp.float32(n))
            counts.append(state.averaged)
        return counts, state.average

    for start in (0, 1, 3):
        counts, average = run(start)
        taken = [start, *range(start + every, 5, every)]
        assert [int(c) for c in counts] == [
            sum(t <= n for t in taken) for n in range(5)
        ]
        np.testing.assert_allclose(average, np.mean(taken), rtol=1e-6)


def test_before_an_included_start_the_average_follows():
    tx, params = average_iterates(start=3, include_start=True), jnp.float32(0)
    state = tx.init(params)
    for _ in range(3):
        params, state = train_step(tx, params, state, jnp.float32(1))
        assert float(state.average) == float(params)


@pytest.mark.parametrize("every", EVERIES)
@pytest.mark.parametrize("start", STARTS)
def test_averaged_counts_the_iterates_in_the_average(start, every):
    tx, params = average_iterates(start=start, every=every), jnp.ones(3)
    state = tx.init(params)
    update = jax.jit(tx.update)
    for step in range(12):
        assert state.averaged.dtype == jnp.int32
        assert int(state.averaged) == max(0, step - min(start, 99)) // every
        _, state = update(params, state, params)


@pytest.mark.parametrize(
    ("starts", "everies"),
    [
        ([2] * 9, [1, 1, 1, 1, 1, 3, 3, 3, 3]),  # rarer from the sixth update on
        ([2] * 9, [3] * 5 + [1] * 4),  # more often
        ([1] * 5 + [3] * 4, [1] * 9),  # a start that moves behind
        ([1] * 5 + [99] * 4, [1] * 9),  # averaging that is stopped: it is held
        ([1] * 5 + [99] * 4, [2] * 9),
        ([99] * 5 + [0] * 4, [2] * 9),  # one that begins when told
    ],
)
def test_start_and_every_changed_in_mid_run(starts, everies):
    """What is in the average keeps its weight: n is counted, not derived from step."""

    def make(start, every):
        return average_iterates(start=start, every=every)

    injected = optax.inject_hyperparams(make)(start=starts[0], every=everies[0])
    update = jax.jit(injected.update)
    params, state, taken = jnp.zeros(3), injected.init(jnp.zeros(3)), []
    for n, (start, every) in enumerate(zip(starts, everies, strict=True), 1):
        values = {"start": jnp.asarray(start), "every": jnp.asarray(every)}
        state = state._replace(hyperparams=values)
        updates, state = update(jnp.full(3, float(n)), state, params)
        params = optax.apply_updates(params, updates)
        since = n - start
        if since >= every and since % every == 0:
            taken.append(float(params[0]))
        expected = np.mean(taken) if taken else float(params[0])
        np.testing.assert_allclose(averaged_params(state), expected, rtol=4 * EPS)
        assert int(state.inner_state.averaged) == len(taken)


def test_a_start_moved_ahead_holds_the_average():
    """Also where `every` is known to be 1, so that no step is left out."""
    params = jnp.ones(3)
    _, state = train_step(tx := average_iterates(), params, tx.init(params), params)
    _, held = average_iterates(start=9).update(3 * params, state, params)
    assert bits(held.average) == bits(state.average) == bits(2 * params)
    assert held.averaged == 1


PARAMS = {"w": jnp.ones((2, 3)), "b": [jnp.ones(3)]}


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: average_iterates(start=-1), ValueError, "^start must not be negative"),
        (lambda: average_iterates(start=2.5), ValueError, "^start must be a whole"),
        (lambda: average_iterates(start=np.nan), ValueError, "^start must.*NaN"),
        (lambda: average_iterates(start="1"), TypeError, "^start must be a number"),
        (lambda: average_iterates(start=[1]), TypeError, "^start must be a number"),
        (lambda: average_iterates(every=0), ValueError, "^every must be at least 1"),
        (lambda: average_iterates(every=-1), ValueError, "^every must not be negative"),
        (lambda: average_iterates(every=1.5), ValueError, "^every must be a whole"),
        (lambda: average_iterates(every=0.5), ValueError, "^every must be at least 1"),
        (lambda: average_iterates(every=np.nan), ValueError, "^every must.*NaN"),
        (lambda: average_iterates(every=None), TypeError, "^every must be a number"),
        (lambda: average_iterates(every=np.ones(2)), ValueError, "^every.*a scalar"),
        (lambda: average_iterates(0.9), TypeError, "^weighting must be a function"),
        (lambda: average_iterates("ema"), TypeError, "^weighting must be a function"),
        (lambda: running_average(0.9), TypeError, "^weighting must be a function"),
        (lambda: exponential_weighting(-0.1), ValueError, "^decay must not be neg"),
        (lambda: exponential_weighting(1.0), ValueError, "^decay must be less than 1"),
        (lambda: exponential_weighting(1.5), ValueError, "^decay must be less than 1"),
        (lambda: exponential_weighting(np.nan), ValueError, "^decay must.*NaN"),
        (lambda: exponential_weighting(None), TypeError, "^decay must be a number"),
        (lambda: polynomial_weighting(-1), ValueError, "^gamma must not be negative"),
        (lambda: polynomial_weighting(np.nan), ValueError, "^gamma must.*NaN"),
        (lambda: polynomial_weighting(np.inf), ValueError, "^gamma must be finite"),
        (lambda: polynomial_weighting("3"), TypeError, "^gamma must be a number"),
        (
            lambda: average_iterates(accumulator_dtype="int8"),
            ValueError,
            "^accumulator_dtype must name a floating",
        ),
        (
            lambda: running_average(accumulator_dtype="int8"),
            ValueError,
            "^accumulator_dtype must name a floating",
        ),
    ],
)
def test_a_bad_argument(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize("leaf", [jnp.ones(3, int), np.array([True]), 3, "text"])
def test_params_that_cannot_be_averaged(leaf):
    with pytest.raises(TypeError, match=r"^params\['b'\]\[0\] is"):
        average_iterates().init({"w": jnp.ones(2), "b": [leaf]})


def test_missing_params():
    tx = average_iterates()
    with pytest.raises(ValueError, match="^params are missing"):
        tx.update(PARAMS, tx.init(PARAMS))


@pytest.mark.parametrize(
    ("updates", "error", "message"),
    [
        ({"w": jnp.ones((2, 3))}, ValueError, r"updates has no leaf \['b'\]\[0\]"),
        (
            {**PARAMS, "w": jnp.ones((3, 2))},
            ValueError,
            r"^updates\['w'\] has shape \(3, 2\), params\['w'\] \(2, 3\)",
        ),
        (
            {**PARAMS, "w": jnp.ones((2, 3), int)},
            TypeError,
            r"^updates\['w'\] is int32, params\['w'\] float32",
        ),
    ],
)
def test_updates_that_do_not_fit(updates, error, message):
    tx = average_iterates()
    with pytest.raises(error, match=message):
        tx.update(updates, tx.init(PARAMS), PARAMS)


def test_a_state_of_another_tree():
    tx = average_iterates()
    state = tx.init({**PARAMS, "w": jnp.ones(1)})
    with pytest.raises(ValueError, match=r"^state.average\['w'\] has shape \(1,\)"):
        tx.update(PARAMS, state, PARAMS)


SIZE = 2**20


def compiled_step(tx, dtype):
    params = jax.ShapeDtypeStruct((SIZE,), dtype)
    state = jax.eval_shape(tx.init, params)
    step = jax.jit(lambda *carry_and_grads: train_step(tx, *carry_and_grads))
    return step.lower(params, state, params).compile()


def kernels(compiled):
    """How many instructions of the entry computation do any work."""
    entry = re.search(r"^ENTRY.*?^}", compiled.as_text(), re.DOTALL | re.MULTILINE)
    opcodes = re.findall(r"^.* = .*? ([a-z-]+)\(", entry[0], re.MULTILINE)
    idle = {"parameter", "constant", "bitcast", "tuple", "get-tuple-element"}
    return sum(opcode not in idle for opcode in opcodes)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_step_costs_no_more_than_asgds(dtype):
    ours = compiled_step(optax.chain(optax.sgd(0.1), average_iterates()), dtype)
    # Without the decays it does the same arithmetic.
    asgds = compiled_step(asgd(0.1, lambd=0.0, alpha=0.0), dtype)
    # Scalars apart.
    bytes_per_parameter = [
        round(c.cost_analysis()["bytes accessed"] / SIZE, 2) for c in (ours, asgds)
    ]
    assert bytes_per_parameter[0] <= bytes_per_parameter[1]
    assert 0 < kernels(ours) <= kernels(asgds)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_steps_between_need_no_copy(dtype):
    tx = optax.chain(optax.sgd(0.1), average_iterates(every=10))
    assert compiled_step(tx, dtype).memory_analysis().temp_size_in_bytes < 4096
