# SPDX-License-Identifier: Apache-2.0
"""The arrays of an average by path, for comparison with the parameters."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from asgd_optax._core.trees import check_agree

# The key of the array in a variable of Flax NNX.
_BOXED = jax.tree_util.GetAttrKey("value")


class AverageLeaves(NamedTuple):
    """An average as a flat dictionary.

    Averages and parameters are compared by paths, because their nodes may differ in
    type (NNX has states of variables, of optimizer variables and of plain arrays), and
    because a mask may end an average above a subtree of the parameters.

    Attributes:
      leaves: the arrays by `unboxed` path.
      ends: paths at which the average is masked or `None`.
    """

    leaves: dict[Any, Any]
    ends: set[Any]

    @classmethod
    def of(cls, tree: Any) -> "AverageLeaves":
        """Flatten an average."""
        pairs, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_end)
        return cls(
            {unboxed(path): leaf for path, leaf in pairs if not _is_end(leaf)},
            {path for path, leaf in pairs if _is_end(leaf)},
        )

    def misfit(self, expected: list[Any]) -> tuple[list[Any], list[Any]]:
        """Return the paths that the average lacks, and those it should not have."""
        ends = {unboxed(path) for path in self.ends}
        missing = [
            path
            for path in expected
            if path not in self.leaves
            and path not in ends
            and not any(path[:n] in self.ends for n in range(len(path)))
        ]
        known = set(expected)
        return missing, [path for path in self.leaves if path not in known]


def unboxed(path: Any) -> Any:
    """Drop the last key of a path to the array in a variable of Flax NNX."""
    return path[:-1] if path and path[-1] == _BOXED else path


def is_masked(node: Any) -> bool:
    """Return whether `optax.masked` or `optax.partition` removed a part of a tree."""
    return isinstance(node, optax.MaskedNode)


def check_leaf(leaf: Any, other_name: str, other: Any, path: Any) -> None:
    """Raise unless a leaf of an average fits another array in shape and dtype."""
    key = jax.tree_util.keystr(path)
    check_agree(
        f"average{key}",
        leaf,
        f"{other_name}{key}",
        other,
        same_dtype=_can_cast,
        dtype_error=TypeError,
    )


def _is_end(node: Any) -> bool:
    return node is None or is_masked(node)


def _can_cast(dtype: Any, wanted: Any) -> bool:
    is_complex = jnp.issubdtype(dtype, jnp.complexfloating)
    kind = jnp.complexfloating if is_complex else jnp.inexact
    return wanted is not None and jnp.issubdtype(wanted, kind)
