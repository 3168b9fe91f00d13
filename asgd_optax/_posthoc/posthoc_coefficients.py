# SPDX-License-Identifier: Apache-2.0
"""Averages chosen after the run: which mixture of those kept is nearest to another.

An average is a profile: what each iterate of the run weighs in it. The shares of the
averaged iterates are products of weights, so the mass of a block of them follows from
what the average keeps of everything before its ends. Up to a million steps a block is
one iterate. Beyond, blocks grow geometrically with the distance from the nearest end of
their stretch, for that is how smoothly profiles vary there.
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
from asgd_optax._core.weightings import Weighting, uniform_weighting

# Longer runs are fitted blockwise.
_EXACT_STEPS = 10**6

# A block's length over its distance from the end of its stretch.
_GRADING = 1 / 512

# Weights are computed, and rows decomposed, so many at a time: one shape is compiled
# for all, and little memory is held.
_CHUNK = 2**15

# Singular values below this part of the largest are rounding errors of the profiles.
_RANK_TOLERANCE = 1e-11


class AverageProfile(NamedTuple):
    """Which iterates an average holds, and how much of each.

    What `average_iterates(weighting, start=start, every=every,
    include_start=include_start)` holds after `step` updates. What `asgd(t0=...)` holds
    has `start=t0 + 1`, for a whole t0; what `nt_asgd` holds, `start=step - since + 1`
    with the `since` of its state; both are uniform.

    Attributes:
      step: number of finished updates, a whole number of less than 2**31.
      weighting: the weight w of the n-th averaged iterate, a function that JAX can
        trace, with values from 0 to 1; `uniform_weighting` where it is None.
      start: as `average_iterates`'s, concrete.
      every: as `average_iterates`'s, concrete.
      include_start: as `average_iterates`'s.
    """

    step: ArrayLike
    weighting: Weighting | None = None
    start: ArrayLike = 0
    every: ArrayLike = 1
    include_start: bool = False


class PosthocFit(NamedTuple):
    """The mixture of averages that is nearest to another.

    Attributes:
      coefficients: what each average is to be multiplied with, in the order given;
        they sum to 1. Shape (number of averages,), float64, NumPy.
      residual: distance left between the mixture's profile and the one wanted, over
        the length of that one.
      amplification: sum of the coefficients' absolute values, by which rounding
        errors of the averages grow.
    """

    coefficients: np.ndarray
    residual: float
    amplification: float


def posthoc_coefficients(
    snapshots: Sequence[AverageProfile], target: AverageProfile
) -> PosthocFit:
    r"""The coefficients that make of averages kept in a run another average of it.

    Averages of one run are linear in its iterates p(0), p(1), …, so that averages kept
    at some moments, as in its checkpoints, determine others. With the profiles
    :math:`a_i` of those kept and :math:`b` of the one wanted, these are the

    .. math::

        c = \arg\min_{\sum_i c_i = 1} \Big\| \sum_i c_i a_i - b \Big\|_2,

    the smallest ones where snapshots depend on each other. Uniform averages after s
    and t updates give the mean of the iterates between, exactly; `power_weighting` of
    two widths, kept at some moments, gives any width in between, nearly.

    Up to 10^6 steps the sum is over single iterates. Beyond, iterates are taken
    together in blocks that grow with their distance from the nearest start or step,
    and a profile as constant within each. That is exact for uniform averages. For
    others it changes the residual, and the coefficients over their amplification, by
    less than 2e-7. Weightings have to be smooth in n there. Twenty snapshots of 10^9
    steps take seconds.

    Args:
      snapshots: profiles of the averages that were kept.
      target: profile of the average that is wanted, at the step of the last snapshot
        or later.

    Returns:
      A `PosthocFit`; `combine_averages` takes its coefficients.

    Raises:
      TypeError: what is no `AverageProfile`; fields that are no numbers, a weighting
        that is no function, an `include_start` that is no bool.
      ValueError: no snapshots; a snapshot that is later than the target; a step or a
        `start` that is negative or not whole, an `every` that is less than 1 or not
        whole, any of these traced; weights outside of [0, 1]; beyond 10^6 steps,
        profiles of different `every`. Each is named by its index and its field.

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
        raise ValueError("snapshots are missing: an average is made of one at least")
    wanted = _checked("target", target)
    for profile in kept:
        if profile.step > wanted.step:
            raise ValueError(
                f"{profile.name}.step is {profile.step}: it holds iterates that come"
                f" after the target's step, {wanted.step}"
            )
    profiles = [*kept, wanted]
    if wanted.step <= _EXACT_STEPS:
        logs = _shared(profiles, _log_kept)
        return _fit([_shares(p, logs[p.rule], wanted.step + 1) for p in profiles])
    for profile in kept:
        if profile.every != wanted.every:
            raise ValueError(
                f"{profile.name}.every is {profile.every}, target.every"
                f" {wanted.every}: beyond {_EXACT_STEPS} steps all must be the same"
            )
    blocks = _blocks(profiles)
    logs = _shared(profiles, lambda p: _log_kept_of_blocks(p, blocks))
    scale = np.sqrt(blocks.length)
    return _fit([_masses(p, logs[p.rule], blocks) / scale for p in profiles])


class _Profile(NamedTuple):
    """A profile that was checked: the n-th iterate is p(first + (n - 1) every).

    Attributes:
      name: what it is called in a message.
      step: number of finished updates.
      first: step of the first averaged iterate.
      every: steps from one to the next.
      averaged: how many there are, 0 before the first.
      before: step of the iterate that has what they leave: the one that is followed
        until the first. All, where there is none.
      weights: of n, an array, to their weights, float64.
      rule: what profiles have in common that differ in their step alone.
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
    if not isinstance(include_start, bool | np.bool_):
        raise TypeError(
            f"{name}.include_start must be True or False; got {include_start!r}"
        )
    weighting = profile.weighting
    if weighting is None:
        weighting = uniform_weighting()
    elif not callable(weighting):
        raise TypeError(f"{name}.weighting must be a function of n; got {weighting!r}")

    first = start if include_start else start + every
    averaged = max(0, 1 + (step - first) // every)
    before = max(0, first - 1) if averaged else step

    def weights(n: np.ndarray) -> np.ndarray:
        w = _weights_of(f"{name}.weighting(n)", weighting, n)
        return np.where(n == 1, 1.0, w) if include_start else w

    rule = (id(profile.weighting), start, every, bool(include_start))
    return _Profile(name, step, first, every, averaged, before, weights, rule)


def _whole(name: str, value: Any, *, at_least: int, may_be_inf: bool = True) -> int:
    """A concrete whole number as an int; what comes after the last step as that."""
    checks.check_count(name, value, at_least=at_least, may_be_inf=may_be_inf)
    if checks.is_traced(value):
        raise ValueError(f"{name} must be a concrete number: it is not to be traced")
    return int(min(checks.concrete(value), LAST_STEP + 1))


def _weights_of(name: str, weighting: Weighting, n: np.ndarray) -> np.ndarray:
    """The weights at n = 1, 2, …, an int64 array of any shape, in float64."""

    def weight(n: jax.Array) -> jax.Array:
        w = weighting(n)
        checks.check_scalar(name, w)
        return jnp.asarray(w, jnp.float64)

    flat = n.reshape(-1)
    result = np.empty(flat.shape)
    # On the CPU: not every accelerator has a float64 of its own. And at once, inside
    # of a trace too.
    with (
        enable_x64(True),
        jax.default_device(_cpu()),
        jax.ensure_compile_time_eval(),
    ):
        for i in range(0, flat.size, _CHUNK):
            part = flat[i : i + _CHUNK]
            chunk = np.pad(part, (0, _CHUNK - part.size), mode="edge")
            result[i : i + _CHUNK] = np.asarray(jax.vmap(weight)(jnp.asarray(chunk)))[
                : part.size
            ]
    if not np.all(inside := (result >= 0) & (result <= 1)):
        i = int(np.argmin(inside))
        raise ValueError(
            f"{name} must be from 0 to 1; got {result[i]} at n = {flat[i]}"
        )
    return result.reshape(n.shape)


def _cpu() -> jax.Device | None:
    """A CPU device, None where `JAX_PLATFORMS` leaves none."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return None


def _shared(
    profiles: list[_Profile], log_kept: Callable[[_Profile], np.ndarray]
) -> dict[tuple[Any, ...], np.ndarray]:
    """Each rule's `log_kept`: of its longest profile, for others begin as that does."""
    longest: dict[tuple[Any, ...], _Profile] = {}
    for p in sorted(profiles, key=lambda p: p.averaged):
        longest[p.rule] = p
    return {rule: log_kept(p) for rule, p in longest.items()}


def _log_kept(profile: _Profile) -> np.ndarray:
    """Logarithms of what each iterate leaves of those before it."""
    return _log_rest(profile.weights(np.arange(1, profile.averaged + 1)))


def _log_rest(weights: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore"):
        # A weight of 1 leaves nothing: e^-10000 is 0, without an infinity.
        return np.maximum(np.log1p(-weights), -1e4)


def _shares(profile: _Profile, log_kept: np.ndarray, size: int) -> np.ndarray:
    """What each of p(0), …, p(size - 1) weighs."""
    averaged, before = _shared_out(log_kept[: profile.averaged])
    shares = np.zeros(size)
    shares[profile.first :: profile.every][: profile.averaged] = averaged
    shares[profile.before] += before
    return shares


def _shared_out(log_kept: np.ndarray) -> tuple[np.ndarray, Any]:
    """The mass that each takes of what later ones leave, and what all leave."""
    # Products of numbers near 1 would drift, these sums do not.
    left = np.cumsum(np.append(log_kept, 0.0)[::-1])[::-1]
    with np.errstate(under="ignore"):
        return np.exp(left[1:]) * -np.expm1(log_kept), np.exp(left[0])


class _Blocks(NamedTuple):
    """Iterates taken together: `length` of them from p(first), `every` apart.

    Attributes:
      first: shape (blocks,), int64, ascending where iterates belong to one profile.
      length: shape (blocks,), int64.
      nodes: iterates of each block, counted from 0, that stand for all in a sum.
      node_weights: for how many each stands. Both of shape (blocks, nodes).
    """

    first: np.ndarray
    length: np.ndarray
    nodes: np.ndarray
    node_weights: np.ndarray


def _blocks(profiles: list[_Profile]) -> _Blocks:
    """Blocks that begin or end with every profile, finer towards these ends."""
    every = profiles[0].every
    # Averages that start at other remainders of `every` have no iterate in common.
    ends = collections.defaultdict[int, set[int]](set)
    for p in profiles:
        ends[p.before % every] |= {p.before, p.before + every}
        if p.averaged:
            ends[p.first % every] |= {p.first, p.first + every * p.averaged}
    edges = [0]
    while edges[-1] <= LAST_STEP:
        edges.append(edges[-1] + max(1, int(_GRADING * edges[-1])))
    graded = np.array(edges)
    firsts, lengths = [], []
    stretches = (itertools.pairwise(sorted(ends[r])) for r in sorted(ends))
    for low, high in itertools.chain.from_iterable(stretches):
        total = (high - low) // every
        near = graded[: np.searchsorted(graded, total // 2, side="right")]
        cuts = np.unique(np.concatenate([near, total - near]))
        firsts.append(low + every * cuts[:-1])
        lengths.append(np.diff(cuts))
    length = np.concatenate(lengths)
    distinct, which = np.unique(length, return_inverse=True)
    nodes, node_weights = _sum_rule(distinct)
    return _Blocks(np.concatenate(firsts), length, nodes[which], node_weights[which])


def _sum_rule(length: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    r"""Nodes and weights that sum a smooth function over 0, …, length - 1.

    Whole numbers, for a weighting is a function of these: those nearest to the zeros
    of the sixth Chebyshev polynomial, symmetric about the middle. With weights from

    .. math::

        \sum_x x^{2k}, \quad k = 0, 1, 2, \quad x = -\tfrac{L-1}{2}, …, \tfrac{L-1}{2}

    the rule is exact for polynomials of up to the fifth degree. Up to six numbers are
    summed as they are.
    """
    size = length[:, None].astype(np.float64)
    zeros = (1 - np.cos(np.pi * (np.arange(3) + 0.5) / 6)) / 2
    lower = np.rint(zeros * (size - 1))
    # On a scale of half the length, or high powers would spoil the equations.
    x, narrow = (size - 1 - 2 * lower) / size, size**-2
    sums = size * np.concatenate(
        [narrow**0, (1 - narrow) / 3, (1 - narrow) * (3 - 7 * narrow) / 15], axis=1
    )
    equations = x[:, None, :] ** np.array([0, 2, 4])[:, None]
    short = length <= 6
    equations[short] = np.eye(3)  # there they are singular, and not needed
    half = np.linalg.solve(equations, sums[:, :, None] / 2)[:, :, 0]
    nodes = np.concatenate([lower, (size - 1 - lower)[:, ::-1]], axis=1)
    weights = np.concatenate([half, half[:, ::-1]], axis=1)
    each = np.arange(6)
    inside = each < length[short, None]
    nodes[short], weights[short] = np.where(inside, each, 0), inside
    return nodes.astype(np.int64), weights


def _inside(profile: _Profile, blocks: _Blocks) -> tuple[np.ndarray, np.ndarray]:
    """Which blocks a profile averages, and the n of the first iterate of each block."""
    since = blocks.first - profile.first
    n = since // profile.every + 1
    return (n >= 1) & (n <= profile.averaged) & (since % profile.every == 0), n


def _log_kept_of_blocks(profile: _Profile, blocks: _Blocks) -> np.ndarray:
    """Logarithms of what each block that it averages leaves of those before it."""
    inside, n = _inside(profile, blocks)
    weights = profile.weights(n[inside, None] + blocks.nodes[inside])
    return np.sum(blocks.node_weights[inside] * _log_rest(weights), axis=1)


def _masses(profile: _Profile, log_kept: np.ndarray, blocks: _Blocks) -> np.ndarray:
    """What each block weighs, all its iterates together."""
    inside, _ = _inside(profile, blocks)
    averaged, before = _shared_out(log_kept[: np.count_nonzero(inside)])
    masses = np.zeros(inside.shape)
    masses[inside] = averaged
    masses[blocks.first == profile.before] += before
    return masses


def _fit(columns: list[np.ndarray]) -> PosthocFit:
    """Least squares: the last column from those before it."""
    r: Any = np.empty((0, len(columns)))
    for i in range(0, columns[0].size, _CHUNK):
        rows = np.stack([column[i : i + _CHUNK] for column in columns], axis=1)
        r = np.linalg.qr(np.concatenate([r, rows]), mode="r")
    kept, wanted = r[:, :-1], r[:, -1]
    m = kept.shape[1]
    even = np.full(m, 1 / m)
    # Orthogonal to the ones: what is added to `even` along it leaves the sum at 1, and
    # is the shorter the smaller the coefficients are.
    free = np.linalg.qr(np.ones((m, 1)), mode="complete")[0][:, 1:]
    along, *_ = np.linalg.lstsq(
        kept @ free, wanted - kept @ even, rcond=_RANK_TOLERANCE
    )
    coefficients = even + free @ along
    distance = np.linalg.norm(kept @ coefficients - wanted)
    return PosthocFit(
        coefficients,
        float(distance / np.linalg.norm(wanted)),
        float(np.abs(coefficients).sum()),
    )
