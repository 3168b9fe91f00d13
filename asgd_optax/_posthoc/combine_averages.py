# SPDX-License-Identifier: Apache-2.0
"""Weighted sums of pytrees: other averages of a run, or merged checkpoints."""

from collections.abc import Iterable, Mapping, Sized
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from asgd_optax._core import averaging, checks, trees
from asgd_optax._core.numerics import map_real_and_imaginary

# Elements of a NumPy array to add at once, few enough for the processor's cache.
_CHUNK = 2**16


def combine_averages(
    averages: Iterable[optax.Params], coefficients: ArrayLike
) -> optax.Params:
    r"""Compute a weighted sum of pytrees, :math:`\sum_i c_i \bar p_i`.

    Use it with coefficients from `posthoc_coefficients` to turn averages kept in a run
    into another average of the run, or with your own coefficients to merge checkpoints.
    NumPy arrays are summed in float64, JAX arrays in float32, or in their own dtype if
    that is wider.

    Args:
      averages: pytrees of JAX or NumPy arrays with equal structure, shapes and dtypes.
        If it is a generator, one tree at a time is held in memory.
      coefficients: one number per tree, concrete.

    Returns:
      A pytree with the structure and the dtypes of the averages. JAX arrays have the
      shardings and memory spaces of the first tree. NumPy arrays stay NumPy arrays.
      Leaves that are not floating or complex are taken from the last tree.

    Raises:
      ValueError: If the numbers of trees and coefficients differ, if a tree differs
        from the first in structure, shape or dtype (naming its index and the leaf), or
        if `coefficients` are empty, not finite, traced, or not one-dimensional.
      TypeError: If `averages` is a dict or an array, or if `coefficients` are not real
        numbers.

    Examples:
      >>> import jax.numpy as jnp
      >>> from asgd_optax import combine_averages
      >>> kept = [{"w": jnp.array([1.0, 2.0])}, {"w": jnp.array([3.0, 5.0])}]
      >>> combine_averages(kept, [-4, 5])
      {'w': Array([11., 17.], dtype=float32)}
    """
    numbers = checked_coefficients(coefficients)
    if isinstance(averages, Mapping | jax.Array | np.ndarray):
        raise TypeError(
            "averages must be a sequence or generator of pytrees; got one"
            f" {type(averages).__name__}"
        )
    if isinstance(averages, Sized):
        _check_number(len(averages), len(numbers))
    iterator = iter(averages)
    total = _TreeSum()
    try:
        for number in numbers:
            # No variable may refer to this tree while the next one is made.
            total.add(number, next(iterator))
    except StopIteration:
        _check_number(total.trees, len(numbers))
    for _ in iterator:
        _check_number(f"more than {len(numbers)}", len(numbers))
    return total.result()


def checked_coefficients(coefficients: ArrayLike) -> list[float]:
    """Return the coefficients as floats, or raise if they are not finite numbers."""
    if any(map(checks.is_traced, jax.tree.leaves(coefficients))):
        raise ValueError("coefficients must be concrete, but they are traced")
    try:
        numbers = np.asarray(coefficients)
    except ValueError:  # rows of different lengths
        numbers = np.asarray(None)
    if numbers.size and numbers.dtype.kind not in "biuf":
        raise TypeError(f"coefficients must be real numbers; got {coefficients!r}")
    if numbers.ndim != 1 or not numbers.size:
        raise ValueError(
            "coefficients must be one or more numbers in one dimension; got shape"
            f" {numbers.shape}"
        )
    if not np.isfinite(numbers).all():
        raise ValueError(f"coefficients must be finite; got {coefficients!r}")
    return numbers.astype(np.float64).tolist()


def _check_number(averages: int | str, coefficients: int) -> None:
    if averages != coefficients:
        raise ValueError(
            f"expected one coefficient per average: got {averages} averages but"
            f" {coefficients} coefficients"
        )


class _TreeSum:
    """The weighted sum of the trees added so far."""

    def __init__(self) -> None:
        self.trees = 0
        self.sums: list[Any] = []

    def add(self, number: float, tree: Any) -> None:
        if self.trees == 0:
            self.first = jax.tree.map(_without_values, tree)
            self.sums = [None] * len(jax.tree.leaves(tree))
        trees.check_agree(f"averages[{self.trees}]", tree, "averages[0]", self.first)
        for i, leaf in enumerate(jax.tree.leaves(tree)):
            self.sums[i] = _add_leaf(self.sums[i], number, leaf)
        self.trees += 1

    def result(self) -> Any:
        leaves, treedef = jax.tree.flatten(self.first)
        # Each wide sum is dropped before the next leaf is converted.
        self.sums.reverse()
        return jax.tree.unflatten(
            treedef, [_converted(self.sums.pop(), leaf) for leaf in leaves]
        )


def _without_values(leaf: Any) -> Any:
    if isinstance(leaf, jax.Array | np.ndarray):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
    return leaf


def _is_summed(leaf: Any) -> bool:
    dtype = trees.leaf_dtype(leaf)
    return dtype is not None and jnp.issubdtype(dtype, jnp.inexact)


def _add_leaf(total: Any, number: float, leaf: Any) -> Any:
    """Return `total + number * leaf` in a wide dtype; a `total` of None counts as 0."""
    if not _is_summed(leaf):
        return leaf
    if isinstance(leaf if total is None else total, jax.Array):
        return _add_jax(total, number, leaf)
    return _add_numpy(total, number, leaf)


@np.errstate(all="ignore")
def _converted(total: Any, first: Any) -> Any:
    """Return a sum in the dtype of the first leaf that went into it."""
    if not _is_summed(first):
        return total
    if isinstance(total, jax.Array):
        return _placed(averaging.in_device_memory(total).astype(first.dtype), total)
    total = total.astype(getattr(first, "dtype", total.dtype), copy=False)
    return total if isinstance(first, jax.ShapeDtypeStruct) else total[()]


# Infinities and NaNs show in the result; a warning would add nothing.
@np.errstate(all="ignore")
def _add_numpy(total: np.ndarray | None, number: float, leaf: Any) -> np.ndarray:
    leaf = np.asarray(leaf, order="C")
    if total is None:
        # `np.zeros` would map its memory page by page during the first addition, which
        # can take longer than the addition itself.
        total = np.full(leaf.shape, 0, np.promote_types(leaf.dtype, np.float64))
    term, result = _flat(leaf), _flat(total)
    for i in range(0, term.size, _CHUNK):
        wide = term[i : i + _CHUNK].astype(result.dtype)
        wide *= number
        result[i : i + _CHUNK] += wide
    return total


def _flat(array: np.ndarray) -> np.ndarray:
    """Return a view of a contiguous array, real and imaginary parts as two elements."""
    flat = array.reshape(-1)
    return flat.view(flat.real.dtype) if flat.dtype.kind == "c" else flat


def _add_jax(total: jax.Array | None, number: float, leaf: Any) -> jax.Array:
    like = leaf if total is None else total
    operands = jax.tree.map(averaging.in_device_memory, (total, _placed(leaf, like)))
    new = _placed(_multiply_add(number, *operands), like)
    # The next tree must not be made before this is done with the leaf.
    return jax.block_until_ready(new)


def _placed(x: Any, like: jax.Array) -> Any:
    """Return `x` with the sharding of `like`, if it is known."""
    if checks.is_traced(like) or getattr(x, "sharding", None) == like.sharding:
        return x
    return jax.device_put(x, like.sharding)


@partial(jax.jit, donate_argnums=1)
def _multiply_add(number: float, total: jax.Array | None, leaf: jax.Array) -> jax.Array:
    wide = jnp.float32 if jnp.finfo(leaf.dtype).bits < 32 else leaf.dtype
    # In two parts, or a NaN in one part of a complex number would reach the other.
    term = map_real_and_imaginary(lambda x: number * x, leaf.astype(wide))
    return term if total is None else total + term
