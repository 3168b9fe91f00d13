# SPDX-License-Identifier: Apache-2.0
"""Coefficients that replace a learning rate decay by a merge of checkpoints."""

import math
from collections.abc import Callable

import numpy as np

from asgd_optax._core.checks import check_count, check_scalar

_SCHEDULES: dict[str, Callable[[float], float]] = {
    "linear": lambda x: 1 - x,
    "cosine": lambda x: (1 + math.cos(math.pi * x)) / 2,
    "minus_sqrt": lambda x: 1 - math.sqrt(x),
}


def decay_coefficients(
    n: int, schedule: str | Callable[[float], float] = "linear"
) -> np.ndarray:
    r"""Return coefficients that merge `n` checkpoints like a learning rate decay.

    A run with a constant learning rate saved the checkpoints
    :math:`p_0, \ldots, p_{n-1}`. A learning rate that decays as :math:`s` over the same
    steps would have scaled each difference :math:`p_i - p_{i-1}` by :math:`s(i/n)`. The
    merge :math:`\sum_i c_i p_i` that does the same has

    .. math::
      c_{n-1} = s\bigl(\tfrac{n-1}{n}\bigr), \quad
      c_i = s\bigl(\tfrac{i}{n}\bigr) - s\bigl(\tfrac{i+1}{n}\bigr), \quad
      c_0 = 1 - \sum_{i > 0} c_i .

    Args:
      n: number of checkpoints.
      schedule: `"linear"`, :math:`s(x) = 1 - x`, which gives the uniform average;
        `"cosine"`, :math:`(1 + \cos \pi x) / 2`; `"minus_sqrt"`,
        :math:`1 - \sqrt{x}`; or a function on :math:`[0, 1]` with :math:`s(0) = 1`.

    Returns:
      A float64 array of shape `(n,)` with sum 1, the oldest checkpoint first.

    Raises:
      ValueError: If `n` is less than 1 or not whole, if `schedule` is an unknown name,
        or if its value is not 1 at 0 or not finite.
      TypeError: If `n` is not a number, or if `schedule` is neither a name nor a
        function that returns real numbers.

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
    function = _SCHEDULES.get(schedule) if isinstance(schedule, str) else schedule
    if not callable(function):
        error = ValueError if isinstance(schedule, str) else TypeError
        names = ", ".join(map(repr, _SCHEDULES))
        raise error(f"schedule must be one of {names} or a function; got {schedule!r}")
    values = np.empty(n)
    for i in range(n):
        value = function(i / n)
        check_scalar(f"schedule({i / n:g})", value)
        values[i] = value
    if not np.isfinite(values).all():
        raise ValueError(f"schedule must be finite; got {values}")
    if not math.isclose(values[0], 1, rel_tol=1e-6):
        raise ValueError(f"schedule must be 1 at 0; got {values[0]}")
    coefficients = -np.diff(values, append=0)
    coefficients[0] = 1 - math.fsum(coefficients[1:])
    return coefficients
