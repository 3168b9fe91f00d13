# SPDX-License-Identifier: Apache-2.0
"""The interface of statistics of a stream of pytrees."""

from collections.abc import Callable
from typing import Any, NamedTuple


class Statistic(NamedTuple):
    """A statistic of a stream of pytrees: three pure functions.

    `running_average` and `running_random_scaling` return one. `track_iterates` applies
    one to the iterates of an optimizer. To write your own, return a pytree of arrays as
    the state: all three functions then work under `jit`, `vmap` and `scan`.

    Attributes:
      init: `init(tree)` returns the state before the first tree. Only the shapes and
        dtypes of `tree` matter; its numbers are not counted.
      update: `update(state, tree)` returns the state with one more tree.
      value: `value(state)` returns the statistic.
    """

    init: Callable[[Any], Any]
    update: Callable[[Any, Any], Any]
    value: Callable[[Any], Any]
