# SPDX-License-Identifier: Apache-2.0
"""`posthoc_coefficients`: profiles, known mixtures, long runs, errors."""

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
from asgd_optax._posthoc import posthoc_coefficients as module
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
    "not smooth": lambda n: jnp.asarray([1.0, 0.0, 0.5])[n % 3],
}


def width(w):
    return power_weighting(gamma_from_width(w))


def shares(profile):
    """Return the profile, by snapshots that each hold one iterate."""
    kept = [AverageProfile(t, start=t) for t in range(profile.step + 1)]
    fit = posthoc_coefficients(kept, profile)
    assert fit.residual < 1e-13
    return fit.coefficients


def averages(tx, to_updates, iterates, **extra):
    """Return the averages that a transformation keeps after 0, 1, … updates."""

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
    """Return them by weighting, `include_start` and case, compiled together."""

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
def test_profiles_equal_the_weights_of_average_iterates(name, include_start):
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
def test_profiles_equal_the_weights_of_asgd(t0):
    with enable_x64(True):
        tx = asgd(1.0, lambd=0.0, t0=t0)
        rows = averages(tx, lambda params, new: params - new, ITERATES)
    for step in range(STEPS + 1):
        profile = AverageProfile(step, start=t0 + 1)
        np.testing.assert_allclose(shares(profile), rows[step, : step + 1], atol=1e-14)


def test_profiles_equal_the_weights_of_nt_asgd():
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


def test_two_widths_make_a_width_in_between():
    # Karras et al. 2024, section 3.
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


def test_uniform_averages_approximate_an_ema_badly():
    kept = [AverageProfile(step) for step in range(1000, 10_001, 1000)]
    target = AverageProfile(10_000, exponential_weighting(0.998))
    fit = posthoc_coefficients(kept, target)
    assert fit.residual == pytest.approx(0.49, abs=0.005)
    assert fit.amplification == pytest.approx(16.3, abs=0.05)


@pytest.mark.parametrize(
    ("start", "step"),
    [(4, 5), (4 * 10**3, 5 * 10**3), (4 * 10**5, 5 * 10**5), (2**30, 2**31 - 1)],
)
def test_means_of_windows_are_exact(start, step):
    fit = posthoc_coefficients(
        [AverageProfile(start), AverageProfile(step)],
        AverageProfile(step, start=start),
    )
    exact = np.array([-start, step]) / (step - start)
    np.testing.assert_allclose(fit.coefficients, exact, rtol=1e-11)
    assert fit.residual < 1e-11


@pytest.mark.parametrize("unit", [1, 10**5, 2 * 10**8])
def test_coefficients_are_the_smallest_if_snapshots_are_dependent(unit):
    early, late = AverageProfile(4 * unit), AverageProfile(5 * unit)
    window = AverageProfile(5 * unit, start=4 * unit)
    twice = posthoc_coefficients([early, late, late], window)
    np.testing.assert_allclose(twice.coefficients, [-4, 2.5, 2.5], rtol=1e-10)
    # All (-4, 5, 0) + s (4, -5, 1) are exact; s = 41 / 42 gives the shortest.
    own = posthoc_coefficients([early, late, window], window)
    shortest = np.array([-4, 5, 0]) + 41 / 42 * np.array([4, -5, 1])
    np.testing.assert_allclose(own.coefficients, shortest, rtol=1e-10)
    assert own.residual < 1e-12


def test_one_snapshot_has_coefficient_1():
    fit = posthoc_coefficients([AverageProfile(2)], AverageProfile(4))
    np.testing.assert_array_equal(fit.coefficients, [1])
    # (1/2, 1/2, 0, 0) against 1/4 four times.
    assert fit.residual == pytest.approx(1)
    assert fit.amplification == 1


def test_weighting_is_not_evaluated_past_the_last_iterate():
    # Its values there are more than 1.
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
def test_combined_averages_equal_the_average_of_the_run(kept, target):
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
        # Each average was rounded at every step.
        atol = 20 * fit.amplification * np.abs(iterates).max() * np.finfo(dtype).eps
        np.testing.assert_allclose(found["w"], wanted["w"], rtol=0, atol=atol)


def test_residual_is_the_least_distance_of_a_mixture():
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
    # The gradient is constant, so no change that keeps the sum at 1 helps.
    basis = np.stack([rows[i][t] for t in (20, 30, 40) for i in (0, 1)], axis=1)
    gradient = basis.T @ (found - wanted)
    np.testing.assert_allclose(gradient, gradient.mean(), atol=1e-14)


def kinds_of_snapshots(step):
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
    exact = posthoc_coefficients(kept, target)
    with monkeypatch.context() as patch:
        patch.setattr(module, "_EXACT_STEPS", 0)
        blocks = posthoc_coefficients(kept, target)
    assert blocks.residual == pytest.approx(exact.residual, abs=atol)
    atol *= exact.amplification
    np.testing.assert_allclose(
        blocks.coefficients, exact.coefficients, rtol=0, atol=atol
    )


@pytest.mark.parametrize("kind", kinds_of_snapshots(1000))
def test_blocks_agree_with_single_iterates(kind, monkeypatch):
    # Blocks 8 times as long: the error grows with the square of their length.
    monkeypatch.setattr(module, "_GRADING", 1 / 64)
    step = 30_000
    warm = exponential_weighting(1 - 30 / step, warmup=lambda n: (1 + n) / (10 + n))
    for target in [
        AverageProfile(step, width(0.15)),
        AverageProfile(step, exponential_weighting(1 - 100 / step)),
        AverageProfile(step, exponential_weighting(0.99)),
        AverageProfile(step, warm),
        AverageProfile(step, start=step - step // 7),
    ]:
        kept = kinds_of_snapshots(step)[kind]
        assert_blocks_agree(kept, target, 64 * 2e-7, monkeypatch)


def test_blocks_agree_with_single_iterates_to_2e_7(monkeypatch):
    step = 100_000
    kept = kinds_of_snapshots(step)["two widths"][4:]
    for decay in (0.999, 0.9999):
        target = AverageProfile(step, exponential_weighting(decay))
        assert_blocks_agree(kept, target, 2e-7, monkeypatch)


def test_blocks_separate_averages_without_a_common_iterate(monkeypatch):
    # Blocks of so short a run hold one iterate each, so any weighting is exact.
    kept = [
        AverageProfile(900, start=1, every=3),
        AverageProfile(901, WEIGHTINGS["not smooth"], 2, 3),
        AverageProfile(902, start=902, every=3),  # has not begun
    ]
    target = AverageProfile(903, exponential_weighting(0.99, debias=False), every=3)
    assert_blocks_agree(kept, target, 1e-11, monkeypatch)


def test_sums_over_blocks_are_exact_for_polynomials():
    lengths = np.array([*range(1, 300), 10**4, 10**4 + 1])
    nodes, weights = module._sum_rule(lengths)
    assert np.all(weights >= 0)
    assert np.all((nodes >= 0) & (nodes < lengths[:, None]))
    for length, x, w in zip(lengths, nodes, weights, strict=True):
        assert len(set(x[w > 0])) == min(length, 6)
        for degree in range(6):
            found = np.sum(w * (x / length) ** degree)
            each = np.sum((np.arange(length) / length) ** degree)
            np.testing.assert_allclose(found, each, rtol=1e-12)


def test_weightings_need_not_be_smooth_in_short_runs():
    step, table = 20_000, np.array([0.002, 0.0, 0.001])
    weights = table[np.arange(step + 1) % 3]
    weights[0] = 1  # p(0) has what all others leave
    later = np.cumprod(np.append(1, 1 - weights[:0:-1]))[::-1]
    wanted = weights * later
    uniform = np.append(0, np.full(step, 1 / step))
    target = AverageProfile(step, lambda n: jnp.asarray(table)[n % 3])
    fit = posthoc_coefficients([AverageProfile(step)], target)
    expected = np.linalg.norm(uniform - wanted) / np.linalg.norm(wanted)
    assert fit.residual == pytest.approx(expected, rel=1e-10)


def test_runs_of_a_billion_steps():
    kept = [
        AverageProfile(10**8 * i, width(w)) for i in range(1, 11) for w in (0.05, 0.1)
    ]
    fit = posthoc_coefficients(kept, AverageProfile(10**9, width(0.15)))
    short = [p._replace(step=p.step // 10**4) for p in kept]
    same = posthoc_coefficients(short, AverageProfile(10**5, width(0.15)))
    # The fit converges as 1 / step.
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
        (TypeError, "weighting must be a function of n", AverageProfile(3, "ema")),
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
def test_error_names_the_profile_and_the_field(error, message, profile):
    message = re.escape(message)
    with pytest.raises(error, match=rf"^snapshots\[1\]\.{message}"):
        posthoc_coefficients([GOOD, profile], AverageProfile(9))
    with pytest.raises(error, match=rf"^target\.{message}"):
        posthoc_coefficients([AverageProfile(0)], profile)


def test_arguments_must_be_profiles():
    with pytest.raises(ValueError, match="snapshots are missing"):
        posthoc_coefficients([], GOOD)
    with pytest.raises(TypeError, match=r"snapshots\[1\] must be an AverageProfile"):
        posthoc_coefficients([GOOD, 5], GOOD)
    with pytest.raises(TypeError, match="target must be an AverageProfile"):
        posthoc_coefficients([GOOD], (5,))


def test_snapshots_must_not_be_later_than_the_target():
    message = re.escape("snapshots[1].step must be at most target.step, 5; got 6")
    with pytest.raises(ValueError, match=message):
        posthoc_coefficients([GOOD, AverageProfile(6)], GOOD)


def test_every_may_differ_up_to_a_million_steps():
    kept = [AverageProfile(999_999, every=2), AverageProfile(10**6, every=5)]
    target = AverageProfile(10**6, start=10**6 - 10)
    assert posthoc_coefficients(kept, target).residual > 0
    message = re.escape("snapshots[1].every must be target.every, 2, in runs of more")
    with pytest.raises(ValueError, match=message):
        posthoc_coefficients(kept, AverageProfile(10**6 + 1, every=2))


def test_fields_must_be_concrete():
    with pytest.raises(
        ValueError, match=r"snapshots\[0\]\.start must be a concrete number"
    ):
        jax.jit(lambda s: posthoc_coefficients([AverageProfile(5, start=s)], GOOD))(1)


def test_fields_may_be_arrays():
    plain = posthoc_coefficients([AverageProfile(4)], AverageProfile(6, start=2))
    kept = AverageProfile(jnp.asarray(4), uniform_weighting(), np.int64(0), 1.0)
    target = AverageProfile(np.float32(6), None, jnp.asarray(2.0), np.int32(1))
    fit = posthoc_coefficients([kept], target)
    assert fit.residual == plain.residual


def test_x64_setting_is_kept():
    posthoc_coefficients([GOOD], GOOD)
    assert jnp.asarray(1.0).dtype == jnp.result_type(float) == np.float32


def test_posthoc_coefficients_works_inside_a_trace():
    target = AverageProfile(5, width(0.1))
    kept = [AverageProfile(3, WARM), GOOD]
    plain = posthoc_coefficients(kept, target)

    @jax.jit
    def traced(x):
        return x * posthoc_coefficients(kept, target).coefficients

    np.testing.assert_allclose(traced(1.0), plain.coefficients, rtol=1e-6)


def test_default_device_is_used_without_a_cpu_device(monkeypatch):
    plain = posthoc_coefficients([GOOD], AverageProfile(9, WARM))

    def none(backend=None):
        raise RuntimeError(f"Unknown backend {backend}")

    monkeypatch.setattr(jax, "local_devices", none)
    assert posthoc_coefficients([GOOD], AverageProfile(9, WARM)) == plain


def test_steps_may_come_from_a_state():
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
    # The means of 3 and of 2 iterates give that of the last one.
    np.testing.assert_allclose(fit.coefficients, [3, -2], rtol=1e-12)


@pytest.mark.parametrize("steps", [1_000, 100_000, 3_000_000])
@pytest.mark.parametrize(
    ("first", "second"),
    [
        (uniform_weighting(), power_weighting(0.0)),
        (polynomial_weighting(3.0), polynomial_weighting(3.0 + 1e-13)),
        (0.999, exponential_weighting(0.999)),
    ],
)
def test_equal_profiles_share_the_smallest_coefficients(steps, first, second):
    kept = [AverageProfile(steps, first), AverageProfile(steps, second)]
    fit = posthoc_coefficients(kept, AverageProfile(steps, polynomial_weighting(1.0)))
    np.testing.assert_allclose(fit.coefficients, [0.5, 0.5], rtol=1e-6)
    assert fit.amplification == pytest.approx(1)


def test_snapshots_between_two_averaged_iterates_share_the_coefficients():
    kept = [AverageProfile(1_000, every=100), AverageProfile(1_050, every=100)]
    fit = posthoc_coefficients(kept, kept[1])
    np.testing.assert_allclose(fit.coefficients, [0.5, 0.5], rtol=1e-9)
    assert fit.residual < 1e-12
