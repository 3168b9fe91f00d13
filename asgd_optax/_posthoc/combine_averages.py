# SPDX-License-Identifier: Apache-2.0
"""Sums of averages: another average of the same run, or a merge of checkpoints.

A sum is kept as two numbers, what is rounded and what that leaves (Kahan 1965). JAX
arrays are split in two of half as many bits, and so is a coefficient: their products
are exact, so that a compiler that contracts them with a sum changes nothing, and the
coefficient is not rounded to the array's precision. NumPy's narrow arrays are summed
in float64, in which all of that fits into one number.
"""

import math
from collections.abc import Iterable, Mapping, Sized
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from asgd_optax._core import averaging, checks
from asgd_optax._core.numerics import map_real_and_imaginary

# Elements of a NumPy array that are added at once: what is computed with them stays in
# the processor's cache.
_CHUNK = 2**16


def combine_averages(
    averages: Iterable[optax.Params], coefficients: ArrayLike
) -> optax.Params:
    r"""The sum of averages times coefficients, :math:`\sum_i c_i \bar p_i`.

    With what `posthoc_coefficients` finds, averages kept in a run become another
    average of it; with others, checkpoints are merged. The sum is compensated and in
    float32 (complex64) at least: what is rounded are the averages that go in, and the
    result.

    Args:
      averages: pytrees of JAX or NumPy arrays, alike in structure, shapes and dtypes.
        Of a generator, one tree at a time is held.
      coefficients: as many numbers, concrete.

    Returns:
      A pytree in the structure and the dtypes of the averages. JAX arrays have the
      shardings of the first; NumPy arrays, which are summed by NumPy, stay such.
      Leaves that are not floating or complex are those of the last tree.

    Raises:
      ValueError: a number of trees that is not that of the coefficients, or none; a
        tree that differs from the first in structure, shape or dtype, named by its
        index and the leaf's path; coefficients that are not finite, traced, or not of
        one dimension.
      TypeError: a dict or an array in the place of the trees, coefficients that are
        no real numbers.

    Examples:
      >>> import jax.numpy as jnp
      >>> from asgd_optax import combine_averages
      >>> kept = [{"w": jnp.array([1.0, 2.0])}, {"w": jnp.array([3.0, 5.0])}]
      >>> combine_averages(kept, [-4, 5])
      {'w': Array([11., 17.], dtype=float32)}

    References:
      Kahan, `Further remarks on reducing truncation errors
      <https://doi.org/10.1145/363707.363723>`_, Commun. ACM 8(1), 1965.
    """
    numbers = checked_coefficients(coefficients)
    if isinstance(averages, Mapping | jax.Array | np.ndarray):
        raise TypeError(
            f"averages must be several pytrees; got one {type(averages).__name__}"
        )
    if isinstance(averages, Sized) and len(averages) != len(numbers):
        raise ValueError(
            f"there are {len(averages)} averages, and {len(numbers)} coefficients"
        )
    trees = iter(averages)
    combined = _Combined()
    try:
        for number in numbers:
            # Nothing here refers to the tree while the next one is made.
            combined.add(number, next(trees))
    except StopIteration:
        raise ValueError(
            f"there is no averages[{combined.trees}], and there are {len(numbers)}"
            " coefficients"
        ) from None
    for _ in trees:
        raise ValueError(
            f"there is an averages[{len(numbers)}], and there are {len(numbers)}"
            " coefficients"
        )
    return combined.result()


def checked_coefficients(coefficients: ArrayLike) -> list[float]:
    """The numbers; raises unless they are finite, and in a row."""
    if any(map(checks.is_traced, jax.tree.leaves(coefficients))):
        raise ValueError("coefficients must be concrete: they are not to be traced")
    try:
        numbers = np.asarray(coefficients)
    except ValueError:  # of different lengths
        numbers = np.asarray(None)
    if numbers.size and numbers.dtype.kind not in "biuf":
        raise TypeError(f"coefficients must be real numbers; got {coefficients!r}")
    if numbers.ndim != 1 or not numbers.size:
        raise ValueError(
            "coefficients must be one or more numbers in a row; got shape"
            f" {numbers.shape}"
        )
    if not np.isfinite(numbers).all():
        raise ValueError(f"coefficients must be finite; got {coefficients!r}")
    return numbers.astype(np.float64).tolist()


class _Kind(NamedTuple):
    """What a leaf must have in common with the first tree's: None where no array."""

    shape: tuple[int, ...]
    dtype: Any


class _Sum(Protocol):
    """The sum of one leaf over the trees."""

    def add(self, number: float, leaf: Any) -> None: ...

    def result(self) -> Any:
        """To be called once: it lets go of the sum."""


class _Combined:
    """The sum of trees."""

    def __init__(self) -> None:
        self.trees = 0
        self.treedef: Any = None
        self.kinds: list[_Kind] = []
        self.sums: list[_Sum] = []

    def add(self, number: float, tree: Any) -> None:
        pairs, treedef = jax.tree_util.tree_flatten_with_path(tree)
        kinds = [_kind(leaf) for _, leaf in pairs]
        if self.trees == 0:
            self.treedef, self.kinds = treedef, kinds
            self.sums = [
                _sum_of(leaf, kind)
                for (_, leaf), kind in zip(pairs, kinds, strict=True)
            ]
        elif treedef != self.treedef:
            first = jax.tree.unflatten(self.treedef, range(len(self.sums)))
            other = {f"averages[{self.trees}]": tree}
            raise ValueError(checks.misfit("averages[0]", first, other))
        for (path, _), kind, expected in zip(pairs, kinds, self.kinds, strict=True):
            for what, here, there in zip(_Kind._fields, kind, expected, strict=True):
                if here != there:
                    raise ValueError(
                        f"averages[{self.trees}]{jax.tree_util.keystr(path)} has {what}"
                        f" {here}, averages[0]{jax.tree_util.keystr(path)} {there}"
                    )
        for sum_, (_, leaf) in zip(self.sums, pairs, strict=True):
            sum_.add(number, leaf)
        self.trees += 1

    def result(self) -> Any:
        return jax.tree.unflatten(self.treedef, [s.result() for s in self.sums])


def _kind(leaf: Any) -> _Kind:
    if isinstance(leaf, np.ndarray | np.generic):
        return _Kind(leaf.shape, leaf.dtype)
    dtype = checks.array_dtype(leaf)
    return _Kind(() if dtype is None else np.shape(leaf), dtype)


def _sum_of(leaf: Any, kind: _Kind) -> _Sum:
    if kind.dtype is None or not jnp.issubdtype(kind.dtype, jnp.inexact):
        return _Last()
    return _JaxSum(kind) if isinstance(leaf, jax.Array) else _NumpySum(leaf, kind)


class _Last:
    """What cannot be summed: the latest."""

    def add(self, number: float, leaf: Any) -> None:
        del number
        self.leaf = leaf

    def result(self) -> Any:
        return self.leaf


class _NumpySum:
    """A sum of NumPy arrays, in float64 at least; those as wide are compensated."""

    def __init__(self, leaf: Any, kind: _Kind) -> None:
        self.shape, self.dtype = kind.shape, np.asarray(leaf).dtype
        self.unboxed = not isinstance(leaf, np.ndarray)
        flat = _flat(leaf)
        narrow = jnp.finfo(flat.dtype).nmant < np.finfo(np.float64).nmant
        wide = np.dtype(np.float64) if narrow else flat.dtype
        # Not by `zeros`, to whom memory comes in small pages: it may take longer to get
        # than the sum takes.
        self.total = np.full(flat.shape, 0, wide)
        self.rest = None if narrow else np.full(flat.shape, 0, wide)

    def add(self, number: float, leaf: Any) -> None:
        flat = _flat(leaf)
        # What is infinite or NaN shows in the result, as in any sum.
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            for i in range(0, flat.size, _CHUNK):
                total = self.total[i : i + _CHUNK]
                term = flat[i : i + _CHUNK].astype(total.dtype)
                term *= number
                if self.rest is None:
                    total += term
                else:
                    total[:], lost = _two_sum(total, term)
                    self.rest[i : i + _CHUNK] += lost

    def result(self) -> Any:
        total, rest = self.total, self.rest
        del self.total, self.rest
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            if rest is not None:
                # Where the sum is infinite the rest is NaN.
                np.add(total, rest, out=total, where=np.isfinite(total))
            if self.dtype.kind == "c":
                total = total.view(np.result_type(total.dtype, np.complex64))
            total = total.astype(self.dtype, copy=False).reshape(self.shape)
        return total[()] if self.unboxed else total


def _flat(leaf: Any) -> np.ndarray:
    """The numbers of an array in a row, real and imaginary parts as two."""
    flat = np.ascontiguousarray(leaf).reshape(-1)
    return flat.view(flat.real.dtype) if flat.dtype.kind == "c" else flat


class _JaxSum:
    """A sum of JAX arrays, in float32 at least, where the first of them lies."""

    def __init__(self, kind: _Kind) -> None:
        self.dtype = kind.dtype
        self.sharding: Any = None
        self.parts: tuple[jax.Array, ...] = ()

    def add(self, number: float, leaf: Any) -> None:
        if not self.parts and not checks.is_traced(leaf):
            self.sharding = leaf.sharding
        leaf, *parts = (
            averaging.in_device_memory(self._placed(x)) for x in (leaf, *self.parts)
        )
        head, tail = _split_number(number, jnp.finfo(_wide(self.dtype)))
        kernel = _add if parts else _begin
        # Not before it is done with the leaf may the next tree be made.
        parts = jax.block_until_ready(kernel(*parts, leaf, head, tail))
        self.parts = tuple(map(self._placed, parts))

    def result(self) -> jax.Array:
        parts = map(averaging.in_device_memory, self.parts)
        del self.parts
        return self._placed(_rounded_sum(*parts, self.dtype))

    def _placed(self, x: Any) -> Any:
        if self.sharding is None or getattr(x, "sharding", None) == self.sharding:
            return x
        return jax.device_put(x, self.sharding)


def _two_sum(a: Any, b: Any) -> tuple[Any, Any]:
    """The sum as it is rounded, and what that leaves, exactly (Knuth)."""
    total = a + b
    added = total - a
    return total, (a - (total - added)) + (b - added)


def _split_number(number: float, info: Any) -> tuple[np.generic, np.generic]:
    """A number in two: one of half as many bits as a float has, and the rest."""
    fraction, exponent = math.frexp(number)
    bits = (info.nmant + 1) // 2
    head = math.ldexp(round(math.ldexp(fraction, bits)), exponent - bits)
    return info.dtype.type(head), info.dtype.type(number - head)


def _product(x: jax.Array, head: jax.Array, tail: jax.Array) -> tuple[Any, Any]:
    """`x * (head + tail)` in two: the first part is exact."""
    info = jnp.finfo(x.dtype)
    upper = jax.lax.reduce_precision(x, info.nexp, (info.nmant + 1) // 2 - 1)
    return head * upper, head * (x - upper) + tail * x


@jax.jit
def _begin(leaf: jax.Array, head: jax.Array, tail: jax.Array) -> Any:
    return map_real_and_imaginary(
        lambda x: _product(x, head, tail), leaf.astype(_wide(leaf.dtype))
    )


@partial(jax.jit, donate_argnums=(0, 1))
def _add(
    total: jax.Array, rest: jax.Array, leaf: jax.Array, head: jax.Array, tail: jax.Array
) -> Any:
    def f(total: jax.Array, rest: jax.Array, x: jax.Array) -> tuple[Any, Any]:
        term, small = _product(x, head, tail)
        total, lost = _two_sum(total, term)
        return total, rest + (lost + small)

    return map_real_and_imaginary(f, total, rest, leaf.astype(total.dtype))


@partial(jax.jit, static_argnums=2)
def _rounded_sum(total: jax.Array, rest: jax.Array, dtype: Any) -> jax.Array:
    # Where the sum is infinite the rest is NaN.
    whole = map_real_and_imaginary(
        lambda t, r: jnp.where(jnp.isfinite(t), t + r, t), total, rest
    )
    return whole.astype(dtype)


def _wide(dtype: Any) -> Any:
    """The dtype in which to sum: float32 at least."""
    return np.dtype(np.float32) if jnp.finfo(dtype).bits < 32 else dtype
