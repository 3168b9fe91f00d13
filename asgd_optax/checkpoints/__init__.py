# SPDX-License-Identifier: Apache-2.0
"""Averages of checkpoints that lie on the disk, as functions and as a command.

Needs Orbax to read them. Not imported by `asgd_optax`, which does without it.
"""

import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import optax
from jax.typing import ArrayLike

from asgd_optax._core.checks import check_count, is_key, needs

_DECAYS: dict[str, Callable[[float], float]] = {
    "linear": lambda x: 1 - x,
    "cosine": lambda x: (1 + math.cos(math.pi * x)) / 2,
    "minus_sqrt": lambda x: 1 - math.sqrt(x),
}


def decay_coefficients(
    n: int, schedule: str | Callable[[float], float] = "linear"
) -> np.ndarray:
    r"""Coefficients that make of `n` checkpoints what a decaying rate would have made.

    Where a run at a constant rate saved :math:`p_0, \ldots, p_{n-1}`, a rate that
    decays as :math:`s` over the same steps would have shortened each of the ways
    between them. The merge that has these ways in these lengths has

    .. math::
      c_{n-1} = s\bigl(\tfrac{n-1}{n}\bigr), \quad
      c_i = s\bigl(\tfrac{i}{n}\bigr) - s\bigl(\tfrac{i+1}{n}\bigr), \quad
      c_0 = 1 - \sum_{i > 0} c_i .

    Args:
      n: how many checkpoints.
      schedule: `"linear"`, :math:`s(x) = 1 - x`, which gives the uniform average;
        `"cosine"`, :math:`(1 + \cos \pi x) / 2`; `"minus_sqrt"`,
        :math:`1 - \sqrt{x}`; or a function on :math:`[0, 1]` with :math:`s(0) = 1`.

    Returns:
      A float64 array of shape `(n,)`, the oldest checkpoint's first, with sum 1.

    Raises:
      ValueError: `n < 1`; another name; a function that is not 1 at 0 or whose values
        are not finite.
      TypeError: a function that returns no numbers, an `n` that is none.

    Examples:
      >>> from asgd_optax.checkpoints import decay_coefficients
      >>> print(decay_coefficients(4))
      [0.25 0.25 0.25 0.25]
      >>> print(decay_coefficients(4, "minus_sqrt").round(3))
      [0.5   0.207 0.159 0.134]

    References:
      Tian et al., `WSM: Decay-Free Learning Rate Schedule via Checkpoint Merging for
      LLM Pre-training <https://arxiv.org/abs/2507.17634>`_, 2025.
    """
    check_count("n", n, at_least=1, may_be_inf=False)
    n = int(n)
    if isinstance(schedule, str):
        if schedule not in _DECAYS:
            raise ValueError(
                f"schedule must be one of {', '.join(map(repr, _DECAYS))}, or a"
                f" function; got {schedule!r}"
            )
        schedule = _DECAYS[schedule]
    elif not callable(schedule):
        raise TypeError(f"schedule must be a name or a function; got {schedule!r}")
    s = [_value(schedule, i / n) for i in range(n)]
    if not math.isclose(s[0], 1, rel_tol=1e-6):
        raise ValueError(f"schedule must be 1 at 0; got {s[0]}")
    coefficients = -np.diff([*s, 0.0])
    coefficients[0] = 1 - math.fsum(coefficients[1:])
    return coefficients


def _value(schedule: Callable[[float], float], x: float) -> float:
    value = np.asarray(schedule(x))
    if value.ndim or value.dtype.kind not in "iuf":
        raise TypeError(f"schedule({x:g}) must be a real number; got {value!r}")
    if not np.isfinite(value):
        raise ValueError(f"schedule({x:g}) must be finite; got {value}")
    return float(value)


def average_checkpoints(
    paths: Sequence[str | os.PathLike[str]],
    coefficients: ArrayLike | None = None,
    *,
    part: str | Sequence[Any] | None = None,
    like: Any = None,
) -> optax.Params:
    r"""The sum of checkpoints times coefficients, :math:`\sum_i c_i p_i`.

    The metadata of all are compared first, then the checkpoints are read, a part of
    the leaves at a time: beside the sum, which `combine_averages` makes, there is never
    more in memory than one checkpoint.

    Args:
      paths: folders as Orbax's `StandardCheckpointer` writes them, or a step's as its
        `CheckpointManager` does.
      coefficients: as many numbers. By default the average is uniform.
      part: the subtree to average, which alone is read: its keys joined by `/`, such
        as `"params"` or `"opt_state/1/average"`, or a tuple of them. Of a step with
        several items the first key is the item's. By default all of it.
      like: a tree of arrays or of `jax.ShapeDtypeStruct` with shardings to restore
        onto. A leaf without a sharding is restored as NumPy.

    Returns:
      With `like`, a tree of its structure and shardings. Without, what was saved as
      NumPy on the host, in dicts and lists. Leaves that are not floating or complex
      are those of the last checkpoint; of a key of random numbers, its data.

    Raises:
      FileNotFoundError: a path where nothing is.
      ValueError: a folder that is no checkpoint, an unfinished one or one that cannot
        be read, named by its path; one that differs from the first, or `like` that
        does, named by path and leaf; a part that is not there; no paths, or
        coefficients that are not as many finite numbers.
      TypeError: a single path, coefficients that are no real numbers.
      ModuleNotFoundError: Orbax is not installed.

    Examples:
      >>> import pathlib, tempfile
      >>> import jax.numpy as jnp, orbax.checkpoint as ocp
      >>> from asgd_optax.checkpoints import average_checkpoints
      >>> run = pathlib.Path(tempfile.mkdtemp())
      >>> with ocp.StandardCheckpointer() as checkpointer:
      ...     for step, value in [(100, 1.0), (200, 3.0)]:
      ...         params = {"w": jnp.full(2, value)}
      ...         checkpointer.save(run / str(step), {"params": params, "step": step})
      >>> average_checkpoints([run / "100", run / "200"], part="params")
      {'w': array([2., 2.], dtype=float32)}
      >>> average_checkpoints([run / "100", run / "200"], [-4, 5], part="params/w")
      array([11., 11.], dtype=float32)
    """
    with needs("checkpoints"):
        from asgd_optax.checkpoints._combine_checkpoints import combine_checkpoints

    tree = combine_checkpoints(paths, coefficients, part=part, like=like)
    return tree if like is not None else jax.tree.map(_key_data, tree)


def _key_data(leaf: Any) -> Any:
    return np.asarray(jax.random.key_data(leaf)) if is_key(leaf) else leaf
