# SPDX-License-Identifier: Apache-2.0
"""Averages chosen after the run: the best mixture of averages that were kept.

An average's profile is the weight that it gives to each iterate. Iterates are grouped
in blocks, and least squares compare the profiles' masses in the blocks. The mass of a
block follows from the fraction of the average that each block leaves to the iterates
before it, because these fractions multiply.
"""

import collections
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from asgd_optax._core import checks
from asgd_optax._core.numerics import LAST_STEP, enable_x64
from asgd_optax._core.weightings import Weighting, checked_weighting

# Up to this number of steps every block is a single iterate, and the fit is exact.
_EXACT_STEPS = 10**6

# A longer block's length, relative to its distance from where a profile begins or ends.
_GRADING = 1 / 512

# Compute weights, and decompose rows, in chunks of this size: one shape to compile,
# and little memory.
_CHUNK = 2**15

# Singular values below this fraction of the profiles' length are rounding errors.
_RANK_TOLERANCE = 1e-11


class AverageProfile(NamedTuple):
    """The weights that an average gives to the iterates of a run.

    The weights are those of `average_iterates(weighting, start=start, every=every,
    include_start=include_start)` after `step` updates. The average of `asgd(t0=...)` is
    uniform with `start=t0 + 1`, for a whole t0. The average of `nt_asgd` is uniform
    with `start=step - since + 1`, where `since` is from its state.

    Attributes:
      step: number of finished updates, a whole number less than 2**31.
      weighting: the weight w of the n-th averaged iterate: a function that JAX can
        trace, with values from 0 to 1; the decay of an EMA; or None for
        `uniform_weighting`.
      start: as in `average_iterates`, concrete.
      every: as in `average_iterates`, concrete.
      include_start: as in `average_iterates`.
    """

    step: ArrayLike
    weighting: Weighting | float | None = None
    start: ArrayLike = 0
    every: ArrayLike = 1
    include_start: bool = False


class PosthocFit(NamedTuple):
    """The mixture of kept averages that is nearest to the target.

    Attributes:
      coefficients: the factor of each average, in the order of the snapshots; they sum
        to 1. Shape (number of averages,), float64, NumPy.
      residual: distance between the profiles of the mixture and of the target, relative
        to the norm of the target's profile.
      amplification: sum of the coefficients' absolute values, by which rounding errors
        of the averages grow.
    """

    coefficients: np.ndarray
    residual: float
    amplification: float


def posthoc_coefficients(
    snapshots: Sequence[AverageProfile], target: AverageProfile
) -> PosthocFit:
    r"""Compute the coefficients that combine kept averages into another average.

    Averages of a run are linear in its iterates p(0), p(1), …, so averages kept in its
    checkpoints determine others. With the profiles :math:`a_i` of the kept averages and
    :math:`b` of the target, the coefficients are

    .. math::

        c = \arg\min_{\sum_i c_i = 1} \Big\| \sum_i c_i a_i - b \Big\|_2,

    the smallest ones if snapshots are linearly dependent. Uniform averages after s and
    t updates give the mean of the iterates in between exactly. Snapshots of
    `power_weighting` with two widths give any width in between approximately.

    Up to 10^6 steps the sum is over single iterates. In longer runs it is over blocks
    that grow with their distance from the nearest start or step, and weightings must be
    smooth in n. This is exact for uniform averages. For others it changes the residual,
    and the coefficients relative to their amplification, by less than 2e-7. Twenty
    snapshots of 10^9 steps take seconds.

    Args:
      snapshots: profiles of the averages that were kept.
      target: profile of the average that is wanted, at the step of the last snapshot
        or later.

    Returns:
      A `PosthocFit`; `combine_averages` takes its coefficients.

    Raises:
      TypeError: If an argument is not an `AverageProfile`, or a field is not a number,
        a function (`weighting`) or a bool (`include_start`).
      ValueError: If there are no snapshots, or one is later than the target; if `step`
        or `start` is negative, `every` is less than 1, or any of them is traced or not
        whole; if a weight is outside of [0, 1]; if `every` differs in a run of more
        than 10^6 steps. Errors name the index and the field.

    Examples:
      >>> from asgd_optax import AverageProfile, posthoc_coefficients
      >>> kept = [AverageProfile(8_000), AverageProfile(10_000)]
      >>> fit = posthoc_coefficients(kept, AverageProfile(10_000, start=8_000))
      >>> fit.coefficients.round(6) + 0.0
      array([-4.,  5.])
      >>> fit.residual < 1e-10, round(fit.amplification, 6)
      (True, 9.0)

    References:
      Karras et al., `Analyzing and improving the training dynamics of diffusion
      models <https://arxiv.org/abs/2312.02696>`_, CVPR 2024, section 3.
    """
    kept = [_checked(f"snapshots[{i}]", s) for i, s in enumerate(snapshots)]
    if not kept:
        raise ValueError("snapshots are missing: pass one AverageProfile or more")
    wanted = _checked("target", target)
    for profile in kept:
        if profile.step > wanted.step:
            raise ValueError(
                f"{profile.name}.step must be at most target.step, {wanted.step}; got"
                f" {profile.step}"
            )
        if profile.every != wanted.every and wanted.step > _EXACT_STEPS:
            raise ValueError(
                f"{profile.name}.every must be target.every, {wanted.every}, in runs of"
                f" more than {_EXACT_STEPS} steps; got {profile.every}"
            )
    profiles = [*kept, wanted]
    blocks = _blocks(profiles)
    # Profiles of one rule share a computation: the longest begins as the others do.
    longest = {p.rule: p for p in sorted(profiles, key=lambda p: p.averaged)}
    logs = {rule: _log_left(p, blocks) for rule, p in longest.items()}
    scale = np.sqrt(blocks.length)
    return _fit([_masses(p, logs[p.rule], blocks) / scale for p in profiles])


class _Profile(NamedTuple):
    """A checked profile, whose n-th iterate is p(first + (n - 1) every).

    Attributes:
      name: its name in messages.
      step: number of finished updates.
      first: step of the first averaged iterate.
      every: steps from one averaged iterate to the next.
      averaged: number of averaged iterates.
      before: step of the last iterate that the average copied before averaging began.
        It has the mass that the averaged iterates leave.
      weights: maps an array of n to the weights, float64.
      rule: equal for profiles that differ in `step` only.
    """

    name: str
    step: int
    first: int
    every: int
    averaged: int
    before: int
    weights: Callable[[np.ndarray], np.ndarray]
    rule: tuple[Any, ...]


def _checked(name: str, profile: AverageProfile) -> _Profile:
    if not isinstance(profile, AverageProfile):
        raise TypeError(f"{name} must be an AverageProfile; got {profile!r}")
    step = _whole(f"{name}.step", profile.step, at_least=0, may_be_inf=False)
    if step > LAST_STEP:
        raise ValueError(f"{name}.step must be less than 2**31; got {profile.step}")
    start = _whole(f"{name}.start", profile.start, at_least=0)
    every = _whole(f"{name}.every", profile.every, at_least=1)
    include_start = profile.include_start
    checks.check_flag(f"{name}.include_start", include_start)
    weighting = checked_weighting(profile.weighting, f"{name}.weighting")

    first = start if include_start else start + every
    averaged = max(0, 1 + (step - first) // every)
    before = max(0, first - 1) if averaged else step

    def weights(n: np.ndarray) -> np.ndarray:
        w = _weights(f"{name}.weighting(n)", weighting, n)
        return np.where(n == 1, 1.0, w) if include_start else w

    rule = (id(profile.weighting), start, every, bool(include_start))
    return _Profile(name, step, first, every, averaged, before, weights, rule)


def _whole(name: str, value: Any, *, at_least: int, may_be_inf: bool = True) -> int:
    """Return a concrete whole number as an int, at most `LAST_STEP + 1`."""
    checks.check_count(name, value, at_least=at_least, may_be_inf=may_be_inf)
    checks.check_concrete(name, value)
    return int(min(checks.concrete(value), LAST_STEP + 1))


def _weights(name: str, weighting: Weighting, n: np.ndarray) -> np.ndarray:
    """Return the weights at n, an int64 array of any shape, in float64."""

    def weight(n: jax.Array) -> jax.Array:
        return jnp.asarray(weighting(n), jnp.float64)

    padded = np.append(n, np.ones(-n.size % _CHUNK, n.dtype)).reshape(-1, _CHUNK)
    # On the CPU, because not every accelerator has float64; at once, even in a trace.
    with (
        enable_x64(True),
        jax.default_device(_cpu()),
        jax.ensure_compile_time_eval(),
    ):
        chunks = [np.asarray(jax.vmap(weight)(jnp.asarray(chunk))) for chunk in padded]
    result = np.array(chunks).reshape(-1)[: n.size].reshape(n.shape)
    if np.any(outside := ~((result >= 0) & (result <= 1))):
        raise ValueError(
            f"{name} must be from 0 to 1; got {result[outside][0]} at n ="
            f" {n[outside][0]}"
        )
    return result


def _cpu() -> jax.Device | None:
    """Return a CPU device, or None if `JAX_PLATFORMS` excludes it."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return None


class _Blocks(NamedTuple):
    """Blocks of iterates: `length` of them from p(first), the target's `every` apart.

    Attributes:
      first: shape (blocks,), int64, ascending within each profile.
      length: shape (blocks,), int64.
    """

    first: np.ndarray
    length: np.ndarray


def _blocks(profiles: list[_Profile]) -> _Blocks:
    """Return blocks of which a profile averages all iterates or none."""
    steps, every = profiles[-1].step, profiles[-1].every
    if steps <= _EXACT_STEPS:
        return _Blocks(np.arange(steps + 1), np.ones(steps + 1, np.int64))
    # Averages whose starts differ modulo `every` have no iterate in common.
    ends = collections.defaultdict[int, set[int]](set)
    for p in profiles:
        ends[p.before % every] |= {p.before, p.before + every}
        if p.averaged:
            ends[p.first % every] |= {p.first, p.first + every * p.averaged}
    edges = [0]
    while edges[-1] <= LAST_STEP:
        edges.append(edges[-1] + max(1, int(_GRADING * edges[-1])))
    firsts, lengths = [], []
    for remainder in sorted(ends):
        for low, high in itertools.pairwise(sorted(ends[remainder])):
            total = (high - low) // every
            near = np.array(edges)[: np.searchsorted(edges, total // 2, side="right")]
            cuts = np.unique(np.concatenate([near, total - near]))
            firsts.append(low + every * cuts[:-1])
            lengths.append(np.diff(cuts))
    return _Blocks(np.concatenate(firsts), np.concatenate(lengths))


def _inside(profile: _Profile, blocks: _Blocks) -> tuple[np.ndarray, np.ndarray]:
    """Return which blocks a profile averages, and n at the start of every block."""
    since = blocks.first - profile.first
    n = since // profile.every + 1
    return (n >= 1) & (n <= profile.averaged) & (since % profile.every == 0), n


def _log_left(profile: _Profile, blocks: _Blocks) -> np.ndarray:
    """Return the log of what each averaged block leaves of those before it."""
    inside, n = _inside(profile, blocks)
    distinct, which = np.unique(blocks.length[inside], return_inverse=True)
    nodes, node_weights = _sum_rule(distinct)
    weights = profile.weights(n[inside, None] + nodes[which])
    with np.errstate(divide="ignore"):
        # A weight of 1 leaves nothing: e^-10000 is 0, without an infinity.
        logs = np.maximum(np.log1p(-weights), -1e4)
    return np.sum(node_weights[which] * logs, axis=1)


def _sum_rule(length: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    r"""Return nodes and weights that sum a smooth function over 0, …, length - 1.

    The nodes are the whole numbers nearest to the zeros of the sixth Chebyshev
    polynomial. The weights sum polynomials up to degree five exactly, by the sums of

    .. math::

        x^k, \quad k = 0, …, 5, \quad x = -	frac{L-1}{2}, …, 	frac{L-1}{2}.

    Up to six numbers are summed one by one.
    """
    size = length[:, None].astype(np.float64)
    zeros = (1 - np.cos(np.pi * (np.arange(6) + 0.5) / 6)) / 2
    nodes = np.where(size > 6, np.rint(zeros * (size - 1)), np.arange(6))
    # In units of half the length, or high powers would spoil the equations.
    x, narrow = (2 * nodes - size + 1) / size, size**-2
    odd, fourth = np.zeros_like(size), (1 - narrow) * (3 - 7 * narrow) / 15
    sums = [narrow**0, odd, (1 - narrow) / 3, odd, fourth, odd]
    weights = np.linalg.solve(
        x[:, None, :] ** np.arange(6)[:, None], size[:, None] * np.stack(sums, axis=1)
    )[:, :, 0]
    # The weights are 1 for each of up to six numbers, and 0 for further nodes.
    weights = np.where(size > 6, weights, np.rint(weights))
    nodes = np.minimum(nodes, size - 1).astype(np.int64)
    used = slice(np.max(length, initial=1))
    return nodes[:, used], weights[:, used]


def _masses(profile: _Profile, log_left: np.ndarray, blocks: _Blocks) -> np.ndarray:
    """Return the total weight of the iterates in each block."""
    inside, _ = _inside(profile, blocks)
    log_left = log_left[: np.count_nonzero(inside)]
    # The log of what all later blocks leave. Products of numbers near 1 would drift.
    later = np.cumsum(np.append(log_left, 0.0)[::-1])[::-1]
    masses = np.zeros(inside.shape)
    with np.errstate(under="ignore"):
        masses[inside] = np.exp(later[1:]) * -np.expm1(log_left)
        masses[blocks.first == profile.before] += np.exp(later[0])
    return masses


def _fit(columns: list[np.ndarray]) -> PosthocFit:
    """Fit the last column by the others, by least squares."""
    r: Any = np.empty((0, len(columns)))
    for i in range(0, columns[0].size, _CHUNK):
        rows = np.stack([column[i : i + _CHUNK] for column in columns], axis=1)
        r = np.linalg.qr(np.concatenate([r, rows]), mode="r")
    kept, wanted = r[:, :-1], r[:, -1]
    m = kept.shape[1]
    even = np.full(m, 1 / m)
    # The columns of `free` are orthogonal to the ones: adding them to `even` keeps the
    # sum at 1, and the shortest combination makes the smallest coefficients.
    free = np.linalg.qr(np.ones((m, 1)), mode="complete")[0][:, 1:]
    u, s, vh = np.linalg.svd(kept @ free, full_matrices=False)
    # Not relative to s: between equal profiles all of s is rounding errors.
    length = np.linalg.norm(kept, axis=0).max()
    inverse = np.divide(1, s, out=np.zeros_like(s), where=s > _RANK_TOLERANCE * length)
    coefficients = even + free @ (vh.T @ (inverse * (u.T @ (wanted - kept @ even))))
    residual = np.linalg.norm(kept @ coefficients - wanted) / np.linalg.norm(wanted)
    amplification = np.abs(coefficients).sum()
    return PosthocFit(coefficients, float(residual), float(amplification))
