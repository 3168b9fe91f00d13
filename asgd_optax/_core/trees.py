# SPDX-License-Identifier: Apache-2.0
"""Comparison of pytrees in structure, shape and dtype."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def leaf_dtype(leaf: Any) -> Any:
    """Return the dtype of an array or number, or None if `leaf` is neither."""
    if hasattr(leaf, "dtype"):
        return leaf.dtype
    # `result_type` would take a string for the name of a dtype.
    if isinstance(leaf, str | bytes) or not jax.tree_util.all_leaves([leaf]):
        return None
    try:
        return jnp.result_type(leaf)
    except (TypeError, ValueError):
        return None


def check_agree(
    name: str,
    tree: Any,
    other_name: str,
    other: Any,
    *,
    same_dtype: Callable[[Any, Any], bool] | None = None,
    dtype_error: type[Exception] = ValueError,
) -> None:
    """Raise unless `tree` agrees with `other` in structure, shapes and dtypes.

    Args:
      name: what to call `tree` in a message.
      tree: a pytree of arrays, numbers or `jax.ShapeDtypeStruct`.
      other_name: what to call `other` in a message.
      other: the pytree that `tree` must agree with.
      same_dtype: whether two dtypes agree, None for a leaf without one; by default
        whether they are equal.
      dtype_error: the error to raise if a dtype differs.

    Raises:
      ValueError: If a leaf is missing or unexpected, or a shape differs.
    """
    structure: Any = jax.tree.structure(tree)
    if structure != jax.tree.structure(other):
        here, there = paths(tree), paths(other)
        difference = path_difference(
            name,
            missing=[path for path in there if path not in set(here)],
            unexpected=[path for path in here if path not in set(there)],
        )
        raise ValueError(
            f"{name} and {other_name} differ in structure:"
            f" {difference or f'{structure} and {jax.tree.structure(other)}'}"
        )
    pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True)
    for i, (leaf, expected) in enumerate(pairs):
        dtype, expected_dtype = leaf_dtype(leaf), leaf_dtype(expected)
        if np.shape(leaf) != np.shape(expected):
            path = jax.tree_util.keystr(paths(tree)[i])
            raise ValueError(
                f"{name}{path} has shape {np.shape(leaf)}, but {other_name}{path} has"
                f" shape {np.shape(expected)}"
            )
        if not (same_dtype or _equal)(dtype, expected_dtype):
            path = jax.tree_util.keystr(paths(tree)[i])
            raise dtype_error(
                f"{name}{path} is {type_name(leaf)}, but {other_name}{path} is"
                f" {type_name(expected)}"
            )


def _equal(dtype: Any, other: Any) -> bool:
    # NumPy takes None for float64.
    return (dtype is None) == (other is None) and bool(dtype == other)


def paths(tree: Any) -> list[Any]:
    """Return the key paths of all leaves, in the order of `jax.tree.leaves`."""
    return [path for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


def path_difference(name: str, *, missing: list[Any], unexpected: list[Any]) -> str:
    """Describe the leaves that a tree lacks and those it should not have."""
    parts = []
    if missing:
        parts.append(f"missing from {name}: {listed(missing)}")
    if unexpected:
        parts.append(f"unexpected in {name}: {listed(unexpected)}")
    return "; ".join(parts)


def listed(leaf_paths: Sequence[Any]) -> str:
    """Return the first three paths for a message, and the number of the others."""
    names = [jax.tree_util.keystr(path) or "the whole tree" for path in leaf_paths[:3]]
    if len(leaf_paths) > 3:
        names.append(f"{len(leaf_paths) - 3} more")
    return ", ".join(names)


def type_name(leaf: Any) -> str:
    """Return the dtype of an array or number, or else the type, for a message."""
    dtype = leaf_dtype(leaf)
    return f"a {type(leaf).__name__}" if dtype is None else str(dtype)
