# SPDX-License-Identifier: Apache-2.0
"""`posthoc_coefficients`: what averages weigh, known mixtures, blocks, errors."""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from asgd_optax import (
    AverageProfile,
    _posthoc_coefficients,
    asgd,
    average_iterates,
    averaged_params,
    combine_averages,
    exponential_weighting,
    gamma_from_width,
    nt_asgd,
    polynomial_weighting,
    posthoc_coefficients,
    power_weighting,
    uniform_weighting,
)
from tests.support import enable_x64

STEPS = 12
# The iterate after t updates is the t-th unit vector: its average is its profile.
ITERATES = np.eye(STEPS + 1)

WARM = exponential_weighting(0.9, warmup=lambda n: (1 + n) / (10 + n))
WEIGHTINGS = {
    "default": None,
    "uniform": uniform_weighting(),
    "polynomial": polynomial_weighting(3),
    "power": power_weighting(gamma_from_width(0.1)),
    "exponential": exponential_weighting(0.9),
    "follows": exponential_weighting(0.0),
    "plain": exponential_weighting(0.9, debias=False),
    "warm": WARM,
    "constant": lambda n: 0.25,
    "whole numbers alone": lambda n: jnp.asarray([1.0, 0.0, 0.5])[n % 3],
}


def width(w):
    return power_weighting(gamma_from_width(w))


def shares(profile):
    """What a profile weighs each iterate: as snapshots the iterates themselves."""
    kept = [AverageProfile(t, start=t) for t in range(profile.step + 1)]
    fit = posthoc_coefficients(kept, profile)
    assert fit.residual < 1e-13
    return fit.coefficients


def averages(tx, to_updates, iterates, **extra):
    """The average that a transformation keeps after 0, 1, … of its updates."""

    def body(carry, row):
        params, state = carry
        new, extra = row
        updates, state = tx.update(to_updates(params, new), state, params, **extra)
        return (optax.apply_updates(params, updates), state), averaged_params(state)

    iterates = jnp.asarray(iterates)
    state = tx.init(iterates[0])
    _, later = jax.lax.scan(body, (iterates[0], state), (iterates[1:], extra))
    return jnp.concatenate([averaged_params(state)[None], later])


def kept_averages(iterates, weighting=None, start=0, every=1, include_start=False):
    tx = average_iterates(
        weighting, start=start, every=every, include_start=include_start
    )
    return averages(tx, lambda params, new: new - params, iterates)


STARTS_AND_EVERIES = list(itertools.product([0, 1, 4, np.inf], [1, 2, 5]))


@functools.cache
def averages_of_unit_vectors():
    """By weighting, the start included or not, and case: in one compilation for all."""

    @jax.jit
    def run(starts, everies):
        return {
            name: [
                jax.vmap(
                    lambda *args, w=weighting, included=included: kept_averages(
                        ITERATES, w, *args, included
                    )
                )(starts, everies)
                for included in (False, True)
            ]
            for name, weighting in WEIGHTINGS.items()
        }

    with enable_x64(True):
        return run(*map(np.asarray, zip(*STARTS_AND_EVERIES, strict=True)))


@pytest.mark.parametrize("include_start", [False, True])
@pytest.mark.parametrize("name", WEIGHTINGS)
def test_profiles_are_what_average_iterates_weighs(name, include_start):
    """Weight for weight, by unit vectors through the transformation."""
    weighting = WEIGHTINGS[name]
    found = averages_of_unit_vectors()[name][include_start]
    for (start, every), rows in zip(STARTS_AND_EVERIES, found, strict=True):
        for step in (0, 5, STEPS):
            profile = AverageProfile(step, weighting, start, every, include_start)
            np.testing.assert_allclose(
                shares(profile),
                rows[step, : step + 1],
                atol=1e-14,
                err_msg=f"{profile}",
            )


@pytest.mark.parametrize("t0", [0, 3, 40])
def test_profiles_of_asgd(t0):
    with enable_x64(True):
        tx = asgd(1.0, lambd=0.0, t0=t0)
        rows = averages(tx, lambda params, new: params - new, ITERATES)
    for step in range(STEPS + 1):
        profile = AverageProfile(step, start=t0 + 1)
        np.testing.assert_allclose(shares(profile), rows[step, : step + 1], atol=1e-14)


def test_profiles_of_nt_asgd():
    """With the `since` of its state."""
    losses = jnp.where(jnp.arange(STEPS) == 4, 9.0, 1.0)
    since = [0] * 5 + list(range(1, STEPS - 3))  # the fifth update triggers
    with enable_x64(True):
        tx = nt_asgd(1.0, nonmono=1)
        grads = lambda params, new: params - new  # noqa: E731
        rows = averages(tx, grads, ITERATES, validation_loss=losses)
    assert np.count_nonzero(rows[-1]) == STEPS - 5
    for step in range(STEPS + 1):
        profile = AverageProfile(step, start=step - since[step] + 1)
        np.testing.assert_allclose(shares(profile), rows[step, : step + 1], atol=1e-14)


def test_widths_in_between():
    """Karras et al. 2024, section 3: two widths, kept at some moments, make others."""
    kept = [
        AverageProfile(step, width(w))
        for step in range(1000, 8001, 1000)
        for w in (0.05, 0.10)
    ]
    fit = posthoc_coefficients(kept, AverageProfile(8000, width(0.15)))
    last = [-0.049, 0.114, -0.086, 0.199, -0.173, 0.938]
    np.testing.assert_allclose(fit.coefficients[-6:], last, atol=6e-4)
    assert fit.residual == pytest.approx(0.033, abs=6e-4)
    assert fit.amplification == pytest.approx(np.abs(fit.coefficients).sum())
    assert fit.coefficients.dtype == np.float64
    assert fit.coefficients.sum() == pytest.approx(1, abs=1e-14)


def test_uniform_averages_imitate_an_exponential_one_badly():
    kept = [AverageProfile(step) for step in range(1000, 10_001, 1000)]
    target = AverageProfile(10_000, exponential_weighting(0.998))
    fit = posthoc_coefficients(kept, target)
    assert fit.residual == pytest.approx(0.49, abs=0.005)
    assert fit.amplification == pytest.approx(16.3, abs=0.05)


# Beyond a million steps by blocks; up to it by iterates.
@pytest.mark.parametrize(
    ("start", "step"),
    [(4, 5), (4 * 10**3, 5 * 10**3), (4 * 10**5, 5 * 10**5), (2**30, 2**31 - 1)],
)
def test_windows_of_a_run_are_exact(start, step):
    fit = posthoc_coefficients(
        [AverageProfile(start), AverageProfile(step)],
        AverageProfile(step, start=start),
    )
    exact = np.array([-start, step]) / (step - start)
    np.testing.assert_allclose(fit.coefficients, exact, rtol=1e-11)
    assert fit.residual < 1e-11


@pytest.mark.parametrize("unit", [1, 10**5, 2 * 10**8])
def test_the_smallest_coefficients_where_snapshots_depend_on_each_other(unit):
    early, late = AverageProfile(4 * unit), AverageProfile(5 * unit)
    window = AverageProfile(5 * unit, start=4 * unit)
    twice = posthoc_coefficients([early, late, late], window)
    np.testing.assert_allclose(twice.coefficients, [-4, 2.5, 2.5], rtol=1e-10)
    # All (-4, 5, 0) + s (4, -5, 1) are exact; of these s = 41 / 42 is the shortest.
    own = posthoc_coefficients([early, late, window], window)
    shortest = np.array([-4, 5, 0]) + 41 / 42 * np.array([4, -5, 1])
    np.testing.assert_allclose(own.coefficients, shortest, rtol=1e-10)
    assert own.residual < 1e-12


def test_one_snapshot_is_taken_whole():
    fit = posthoc_coefficients([AverageProfile(2)], AverageProfile(4))
    np.testing.assert_array_equal(fit.coefficients, [1])
    # (1/2, 1/2, 0, 0) against 1/4 four times.
    assert fit.residual == pytest.approx(1)
    assert fit.amplification == 1


def test_weights_past_the_last_iterate_are_not_looked_at():
    """Here they would be more than 1."""
    fit = posthoc_coefficients([AverageProfile(2)], AverageProfile(2, lambda n: n / 2))
    # (1/2, 1/2) against (0, 1).
    assert fit.residual == pytest.approx(np.sqrt(0.5))


def random_walk(steps):
    rng = np.random.default_rng(0)
    return np.cumsum(rng.standard_normal((steps + 1, 7)), axis=0)


@pytest.mark.parametrize(
    ("kept", "target"),
    [
        ([AverageProfile(30), AverageProfile(40)], AverageProfile(40, start=30)),
        (
            [AverageProfile(t, None, 4, 3, True) for t in (20, 33, 41)],
            AverageProfile(41, None, 19, 3),
        ),
        (
            [AverageProfile(t, exponential_weighting(0.9)) for t in (30, 45)],
            AverageProfile(45, exponential_weighting(0.9), start=30),
        ),
        (
            [AverageProfile(t, start=t) for t in range(6)],
            AverageProfile(5, polynomial_weighting(8)),
        ),
    ],
)
def test_a_real_runs_averages_make_the_one_it_would_have_kept(kept, target):
    """To rounding, in float64 and in float32."""
    iterates = random_walk(target.step)
    fit = posthoc_coefficients(kept, target)
    assert fit.residual < 1e-12

    @jax.jit
    def averages_of(iterates):
        return [
            {"w": kept_averages(iterates, *fields)[step]}
            for step, *fields in [*kept, target]
        ]

    for dtype in (np.float64, np.float32):
        with enable_x64(dtype == np.float64):
            *trees, wanted = averages_of(iterates.astype(dtype))
            found = combine_averages(trees, fit.coefficients)
        assert found["w"].dtype == dtype
        # Each average was rounded at each step of its own.
        atol = 20 * fit.amplification * np.abs(iterates).max() * np.finfo(dtype).eps
        np.testing.assert_allclose(found["w"], wanted["w"], rtol=0, atol=atol)


def test_the_residual_is_the_distance_that_is_left():
    """Of unit vectors an average is its profile, and so is the mixture."""
    iterates = np.eye(41)
    weightings = [width(0.05), width(0.1)]
    kept = [AverageProfile(t, w) for t in (20, 30, 40) for w in weightings]
    target = AverageProfile(40, width(0.15))
    fit = posthoc_coefficients(kept, target)
    with enable_x64(True):
        rows = [kept_averages(iterates, w) for w in (*weightings, target.weighting)]
        found = combine_averages(
            (rows[i][t] for t in (20, 30, 40) for i in (0, 1)), fit.coefficients
        )
    rows, found = np.asarray(rows), np.asarray(found)
    wanted = rows[2][40]
    distance = np.linalg.norm(found - wanted) / np.linalg.norm(wanted)
    assert fit.residual == pytest.approx(distance, rel=1e-10)
    assert 0 < fit.residual < 0.1
    # None is nearer: the coefficients may be moved against each other, to no avail.
    basis = np.stack([rows[i][t] for t in (20, 30, 40) for i in (0, 1)], axis=1)
    gradient = basis.T @ (found - wanted)
    np.testing.assert_allclose(gradient, gradient.mean(), atol=1e-14)


def blockwise_profiles(step):
    """Many kinds of averages, all with the same `every`."""
    tenths = range(step // 10, step + 1, step // 10)
    ema = exponential_weighting(1 - 100 / step)
    return {
        "two widths": [
            AverageProfile(t, width(w)) for t in tenths for w in (0.05, 0.1)
        ],
        "uniform": [AverageProfile(t) for t in tenths],
        "exponential": [AverageProfile(t, ema) for t in tenths],
        "polynomial": [
            AverageProfile(t, polynomial_weighting(8), start=step // 7) for t in tenths
        ],
        "start": [AverageProfile(t, start=t // 3, include_start=True) for t in tenths],
    }


def assert_blocks_agree(kept, target, atol, monkeypatch):
    """The residual, and the coefficients as a part of what they add up to."""
    exact = posthoc_coefficients(kept, target)
    with monkeypatch.context() as patch:
        patch.setattr(_posthoc_coefficients, "_EXACT_STEPS", 0)
        blocks = posthoc_coefficients(kept, target)
    assert blocks.residual == pytest.approx(exact.residual, abs=atol)
    atol *= exact.amplification
    np.testing.assert_allclose(
        blocks.coefficients, exact.coefficients, rtol=0, atol=atol
    )


@pytest.mark.parametrize("kind", blockwise_profiles(1000))
def test_blocks_give_what_single_iterates_give(kind, monkeypatch):
    """With blocks eight times as long: the error grows with their square."""
    step = 30_000
    kept = blockwise_profiles(step)[kind]
    warm = exponential_weighting(1 - 30 / step, warmup=lambda n: (1 + n) / (10 + n))
    monkeypatch.setattr(_posthoc_coefficients, "_GRADING", 1 / 64)
    for target in [
        AverageProfile(step, width(0.15)),
        AverageProfile(step, exponential_weighting(1 - 100 / step)),
        AverageProfile(step, exponential_weighting(0.99)),
        AverageProfile(step, warm),
        AverageProfile(step, start=step - step // 7),
    ]:
        assert_blocks_agree(kept, target, 64 * 2e-7, monkeypatch)


def test_blocks_as_they_are(monkeypatch):
    step = 100_000
    kept = blockwise_profiles(step)["two widths"][4:]
    for decay in (0.999, 0.9999):
        target = AverageProfile(step, exponential_weighting(decay))
        assert_blocks_agree(kept, target, 2e-7, monkeypatch)


def test_blocks_tell_averages_apart_that_have_no_iterate_in_common(monkeypatch):
    """And one that has not begun. A run as short has blocks of one iterate alone."""
    kept = [
        AverageProfile(900, start=1, every=3),
        AverageProfile(901, WEIGHTINGS["whole numbers alone"], 2, 3),
        AverageProfile(902, start=902, every=3),
    ]
    target = AverageProfile(903, exponential_weighting(0.99, debias=False), every=3)
    exact = posthoc_coefficients(kept, target)
    monkeypatch.setattr(_posthoc_coefficients, "_EXACT_STEPS", 0)
    blocks = posthoc_coefficients(kept, target)
    np.testing.assert_allclose(blocks.coefficients, exact.coefficients, rtol=1e-11)
    assert blocks.residual == pytest.approx(exact.residual, rel=1e-11)
    assert exact.residual > 1


def test_sums_over_blocks_are_exact_for_polynomials():
    lengths = np.array([*range(1, 300), 10**4, 10**4 + 1])
    nodes, weights = posthoc_coefficients._sum_rule(lengths)
    assert np.all(weights >= 0)
    assert np.all((nodes >= 0) & (nodes < lengths[:, None]))
    for length, x, w in zip(lengths, nodes, weights, strict=True):
        assert len(set(x[w > 0])) == min(length, 6)
        if length <= 6:
            np.testing.assert_array_equal(w[:length], 1)
        for degree in range(6):
            found = np.sum(w * (x / length) ** degree)
            each = np.sum((np.arange(length) / length) ** degree)
            np.testing.assert_allclose(found, each, rtol=1e-12)


def test_a_billion_steps():
    """Two widths kept ten times: the fit is that of a run of any length."""
    kept = [
        AverageProfile(10**8 * i, width(w)) for i in range(1, 11) for w in (0.05, 0.1)
    ]
    fit = posthoc_coefficients(kept, AverageProfile(10**9, width(0.15)))
    short = [p._replace(step=p.step // 10**4) for p in kept]
    same = posthoc_coefficients(short, AverageProfile(10**5, width(0.15)))
    # The continuous problem's; a run of n steps differs from it as 1 / n.
    np.testing.assert_allclose(fit.coefficients, same.coefficients, atol=1e-4)
    assert fit.residual == pytest.approx(same.residual, abs=1e-5)


GOOD = AverageProfile(5)


@pytest.mark.parametrize(
    ("error", "message", "profile"),
    [
        (ValueError, "step must not be negative", AverageProfile(-1)),
        (ValueError, "step must be a whole number", AverageProfile(1.5)),
        (ValueError, "step must be finite", AverageProfile(np.inf)),
        (ValueError, "step must be less than 2**31", AverageProfile(2**31)),
        (ValueError, "step must be less than 2**31; got 1000000000000",
         AverageProfile(10**12)),
        (TypeError, "step must be a number", AverageProfile("3")),
        (ValueError, "start must not be negative", AverageProfile(3, start=-1)),
        (ValueError, "start must be a whole number", AverageProfile(3, start=0.5)),
        (ValueError, "start must not be negative", AverageProfile(3, start=np.nan)),
        (TypeError, "start must be a number", AverageProfile(3, start=None)),
        (ValueError, "every must be at least 1", AverageProfile(3, every=0)),
        (ValueError, "every must be a whole number", AverageProfile(3, every=1.5)),
        (TypeError, "include_start must be True", AverageProfile(3, include_start=1)),
        (TypeError, "weighting must be a function of n", AverageProfile(3, 0.999)),
        (TypeError, "weighting(n) must be a number", AverageProfile(3, lambda n: "1")),
        (ValueError, "weighting(n) must be a scalar",
         AverageProfile(3, jnp.atleast_1d)),
        (ValueError, "weighting(n) must be from 0 to 1; got 2.0 at n = 2",
         AverageProfile(3, lambda n: n)),
        (ValueError, "weighting(n) must be from 0 to 1; got -0.5 at n = 1",
         AverageProfile(3, lambda n: -0.5)),
        (ValueError, "weighting(n) must be from 0 to 1; got nan at n = 1",
         AverageProfile(3, lambda n: np.nan)),
    ],
)  # fmt: skip
def test_errors_name_the_field(error, message, profile):
    message = re.escape(message)
    with pytest.raises(error, match=rf"^snapshots\[1\]\.{message}"):
        posthoc_coefficients([GOOD, profile], AverageProfile(9))
    with pytest.raises(error, match=rf"^target\.{message}"):
        posthoc_coefficients([AverageProfile(0)], profile)


def test_errors():
    with pytest.raises(ValueError, match="snapshots are missing"):
        posthoc_coefficients([], GOOD)
    with pytest.raises(TypeError, match=r"snapshots\[1\] must be an AverageProfile"):
        posthoc_coefficients([GOOD, 5], GOOD)
    with pytest.raises(TypeError, match="target must be an AverageProfile"):
        posthoc_coefficients([GOOD], (5,))
    with pytest.raises(ValueError, match=r"snapshots\[1\]\.step is 6: .* step, 5"):
        posthoc_coefficients([GOOD, AverageProfile(6)], GOOD)
    late = AverageProfile(2 * 10**6, every=2)
    with pytest.raises(
        ValueError, match=r"snapshots\[1\]\.every is 1, .* 1000000 steps"
    ):
        posthoc_coefficients([late, GOOD], late)
    # Up to that many they may differ.
    posthoc_coefficients([late._replace(step=0)], AverageProfile(10**6, start=10**6))
    with pytest.raises(ValueError, match=r"snapshots\[0\]\.start must be a concrete"):
        jax.jit(lambda s: posthoc_coefficients([AverageProfile(5, start=s)], GOOD))(1)


def test_numbers_of_any_kind():
    """Fields as states have them."""
    plain = posthoc_coefficients([AverageProfile(4)], AverageProfile(6, start=2))
    kept = AverageProfile(jnp.asarray(4), uniform_weighting(), np.int64(0), 1.0)
    target = AverageProfile(np.float32(6), None, jnp.asarray(2.0), np.int32(1))
    fit = posthoc_coefficients([kept], target)
    assert fit.residual == plain.residual


def test_x64_is_left_as_it_was():
    posthoc_coefficients([GOOD], GOOD)
    assert jnp.asarray(1.0).dtype == jnp.result_type(float) == np.float32


def test_inside_of_a_trace():
    target = AverageProfile(5, width(0.1))
    kept = [AverageProfile(3, WARM), GOOD]
    plain = posthoc_coefficients(kept, target)

    @jax.jit
    def traced(x):
        return x * posthoc_coefficients(kept, target).coefficients

    np.testing.assert_allclose(traced(1.0), plain.coefficients, rtol=1e-6)


def test_without_a_cpu_device(monkeypatch):
    """`JAX_PLATFORMS` may leave none: then where everything is computed."""
    plain = posthoc_coefficients([GOOD], AverageProfile(9, WARM))

    def none(backend=None):
        raise RuntimeError(f"Unknown backend {backend}")

    monkeypatch.setattr(jax, "local_devices", none)
    assert posthoc_coefficients([GOOD], AverageProfile(9, WARM)) == plain


def test_with_one_cpu_device(monkeypatch):
    """As it is outside of the tests, which have eight."""
    first = jax.local_devices(backend="cpu")[:1]
    monkeypatch.setattr(jax, "local_devices", lambda backend: first)
    assert posthoc_coefficients([GOOD], AverageProfile(9)).residual > 0


def test_states_give_their_profiles():
    """`step`, `since` and what a state counts are taken as they are."""
    tx = asgd(1.0, lambd=0.0, t0=1)
    params = jnp.ones(())
    state = tx.init(params)
    for _ in range(5):
        _, state = tx.update(params, state, params)
    kept = [
        AverageProfile(state.step, start=2),
        AverageProfile(state.step - 1, start=2),
    ]
    fit = posthoc_coefficients(kept, AverageProfile(5, start=4))
    # Of the means over iterates 3, 4, 5 and 3, 4 the last one.
    np.testing.assert_allclose(fit.coefficients, [3, -2], rtol=1e-12)
