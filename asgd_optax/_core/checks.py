# SPDX-License-Identifier: Apache-2.0
"""Checks of what a caller passes: every error names the argument or the leaf."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax


@contextlib.contextmanager
def needs(extra: str) -> Iterator[None]:
    """For imports of what an extra brings: where it is missing, says how to get it."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"this needs {error.name}: pip install 'asgd_optax[{extra}]'",
            name=error.name,
        ) from error


def is_key(leaf: Any) -> bool:
    """Whether `leaf` is a typed key of random numbers, or an array of them."""
    dtype = getattr(leaf, "dtype", None)
    return dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)


def is_traced(value: Any) -> bool:
    """Whether `value` is known only when the compiled program runs."""
    return isinstance(value, jax.core.Tracer)


def concrete(value: Any) -> np.float64:
    """A number that is not traced; of a complex one the real part.

    By way of NumPy: inside of a trace JAX would make a tracer of a concrete array.
    `optax.inject_hyperparams` makes numbers complex where the parameters are. An
    integer past the range of floats counts as infinite.
    """
    try:
        return np.float64(np.real(np.asarray(value)))
    except OverflowError:
        return np.float64(np.inf if value > 0 else -np.inf)


def check_scalar(name: str, value: Any) -> None:
    """Raises unless `value` is one number, traced or not."""
    dtype = getattr(value, "dtype", jnp.bool_)
    numeric = jnp.issubdtype(dtype, jnp.number) or jnp.issubdtype(dtype, jnp.bool_)
    if isinstance(value, str | bytes) or not hasattr(value, "__float__") or not numeric:
        raise TypeError(f"{name} must be a number; got {value!r}")
    if np.ndim(value) != 0:
        raise ValueError(f"{name} must be a scalar; got shape {np.shape(value)}")


def check_hyperparameter(name: str, value: Any, *, may_be_inf: bool = False) -> None:
    """Raises unless `value` is a nonnegative scalar; of a traced one, a scalar."""
    check_scalar(name, value)
    if is_traced(value):
        return
    number = concrete(value)
    if not number >= 0:
        raise ValueError(f"{name} must not be negative or NaN; got {value}")
    largest = jnp.finfo(jnp.result_type(float))
    if number > float(largest.max) and not may_be_inf:
        raise ValueError(f"{name} must be finite in {largest.dtype}; got {value}")


def check_not_narrowed(name: str, value: Any) -> None:
    """Raises where `value` is an array of a floating type narrower than 32 bits.

    `optax.inject_hyperparams` makes a Python float one of the parameters' dtype,
    before any transformation sees it: 0.999 becomes 1 in bfloat16. What is taken
    from 1, or compared with a number of steps, cannot have been meant so.
    """
    dtype = getattr(value, "dtype", None)
    if is_narrow(dtype):
        raise ValueError(
            f"{name} is {dtype}, which is too coarse for it: pass a Python number or"
            " 32 bits; optax.inject_hyperparams rounds to the parameters' dtype unless"
            " told hyperparam_dtype=jnp.float32"
        )


def is_narrow(dtype: Any, bits: int = 32) -> bool:
    """Whether `dtype` is a floating type of fewer than so many bits."""
    return (
        dtype is not None
        and jnp.issubdtype(dtype, jnp.floating)
        and jnp.finfo(dtype).bits < bits
    )


def check_accumulator_dtype(accumulator_dtype: Any) -> None:
    """Raises `ValueError` unless it is None or names a floating dtype."""
    if accumulator_dtype is None:
        return
    try:
        # A type that `optax.inject_hyperparams` took for a schedule is an array here.
        floating = (
            not isinstance(accumulator_dtype, jax.Array)
            and jnp.issubdtype(jnp.dtype(accumulator_dtype), jnp.inexact)
            and not is_narrow(jnp.dtype(accumulator_dtype), bits=16)
        )
    except TypeError:
        floating = False
    if not floating:
        raise ValueError(
            "accumulator_dtype must name a floating dtype of 16 bits or more, such as"
            " 'float32' (a string under optax.inject_hyperparams); got"
            f" {accumulator_dtype!r}"
        )


def check_kind(state: Any, kind: type) -> None:
    """Raises unless `state` is of the kind that an `init` made."""
    if not isinstance(state, kind):
        raise TypeError(
            f"state must be the {kind.__name__} that `init` or an earlier `update` of"
            f" this transformation returned; got a {type(state).__name__}"
        )


def check_state(state: Any, kind: type) -> None:
    """Raises unless `state` is of the kind that an `init` made, for one run."""
    check_kind(state, kind)
    check_scalar("state.step", getattr(state, "step", None))


def check_count(
    name: str, value: Any, *, at_least: int, may_be_inf: bool = True
) -> None:
    """Raises unless `value` is a whole number (or `inf`) of at least `at_least`."""
    check_hyperparameter(name, value, may_be_inf=may_be_inf)
    check_not_narrowed(name, value)
    if is_traced(value):
        return
    number = concrete(value)
    if number < at_least:
        raise ValueError(f"{name} must be at least {at_least}; got {value}")
    if number != np.inf and number % 1:
        raise ValueError(f"{name} must be a whole number; got {value}")


def check_params(params: optax.Params, name: str = "params") -> None:
    """Raises unless every leaf of `params` is a floating or complex array."""
    check_fits(name, params, {})


def check_update(updates: Any, params: Any, kept: Mapping[str, Any]) -> None:
    """Raises unless an `update` can be done: all fit, and can be averaged.

    Args:
      updates: gradients or updates.
      params: the parameters.
      kept: what a state has in their shape, by its name for a message.
    """
    if params is None and jax.tree.leaves(updates):
        raise ValueError(
            "params are missing: the average is that of the parameters, so call"
            " `update(updates, state, params)`"
        )
    check_fits("params", params, {"updates": updates, **kept})


def check_fits(
    name: str, tree: Any, others: Mapping[str, Any], *, averaged_only: bool = True
) -> None:
    """Raises unless `tree` can be averaged and `others` are trees like it.

    That is, unless its leaves are floating or complex arrays and those of the others
    have their structure, shapes and kind. All in one walk.

    Args:
      name: what `tree` is, for a message.
      tree: a pytree.
      others: pytrees by what they are, for a message.
      averaged_only: whether arrays of other kinds are refused too. Where they are not
        they must have the same dtype in all trees.
    """
    rows: list[tuple[Any, ...]] = []
    try:
        jax.tree_util.tree_map_with_path(
            lambda *row: rows.append(row), tree, *others.values()
        )
    except (ValueError, TypeError) as error:
        raise ValueError(misfit(name, tree, others)) from error
    for path, leaf, *rest in rows:
        _check_has_values(name, path, leaf)
        dtype = array_dtype(leaf)
        if dtype is None or (averaged_only and not jnp.issubdtype(dtype, jnp.inexact)):
            raise TypeError(
                f"{name}{jax.tree_util.keystr(path)} is"
                f" {type(leaf).__name__ if dtype is None else dtype}: only floating"
                " and complex arrays can be averaged"
            )
        _check_wide_enough(name, path, dtype)
        for other, other_leaf in zip(others, rest, strict=True):
            _check_leaf(other, other_leaf, name, leaf, path, dtype)


def _check_leaf(
    name: str, leaf: Any, against: str, param: Any, path: Any, expected: Any
) -> None:
    """Raises unless `leaf` has the shape of `param`, and is real or complex as it."""
    key = jax.tree_util.keystr
    if hasattr(leaf, "todense"):
        raise TypeError(
            f"{name}{key(path)} is a {type(leaf).__name__}: sparse gradients must be"
            " made dense first, as by `.todense()`"
        )
    _check_has_values(name, path, leaf)
    dtype = array_dtype(leaf)
    if dtype is None:
        raise ValueError(
            f"{name} and {against} differ in structure: {name}{key(path)} is a"
            f" {type(leaf).__name__}, {against}{key(path)} an array"
        )
    if np.shape(leaf) != np.shape(param):
        raise ValueError(
            f"{name}{key(path)} has shape {np.shape(leaf)}, {against}{key(path)}"
            f" {np.shape(param)}"
        )
    if not jnp.issubdtype(expected, jnp.inexact):
        fits = dtype == expected
    else:
        fits = jnp.issubdtype(dtype, jnp.inexact) and (
            jnp.issubdtype(dtype, jnp.complexfloating)
            == jnp.issubdtype(expected, jnp.complexfloating)
        )
    if not fits:
        raise TypeError(
            f"{name}{key(path)} is {dtype}, {against}{key(path)} {expected}"
        )
    _check_wide_enough(name, path, dtype)


def _check_has_values(name: str, path: Any, leaf: Any) -> None:
    """Raises for what `jax.eval_shape` makes of an array."""
    if isinstance(leaf, jax.ShapeDtypeStruct):
        raise TypeError(
            f"{name}{jax.tree_util.keystr(path)} is a ShapeDtypeStruct, which has no"
            " values: `jax.eval_shape` computes with shapes alone"
        )


def _check_wide_enough(name: str, path: Any, dtype: Any) -> None:
    """Raises for floating types that JAX promotes to no other."""
    if is_narrow(dtype, bits=16):
        raise TypeError(
            f"{name}{jax.tree_util.keystr(path)} is {dtype}: keep master weights of 16"
            f" bits or more, average those and cast to {dtype} where they are used"
        )


def misfit(against: str, params: Any, others: Mapping[str, Any]) -> str:
    """Says which of `others` departs in structure from `params`, and where first."""

    def paths(tree: Any) -> list[Any]:
        return [path for path, _ in jax.tree_util.tree_leaves_with_path(tree)]

    there = paths(params)
    for name, tree in others.items():
        here = paths(tree)
        prefix = f"{name} and {against} differ in structure: "
        for path in there:
            # A leaf below the path is a container in the place of the array.
            if not any(other[: len(path)] == path for other in here):
                return prefix + f"{name} has no leaf {jax.tree_util.keystr(path)}"
        for path in here:
            if not any(path[: len(other)] == other for other in there):
                return prefix + f"{against} has no leaf {jax.tree_util.keystr(path)}"
        nodes: tuple[Any, Any] = jax.tree.structure(tree), jax.tree.structure(params)
        if nodes[0] != nodes[1]:
            return prefix + f"{nodes[0]} against {nodes[1]}"
    raise AssertionError("all of these trees fit")  # pragma: no cover


def array_dtype(leaf: Any) -> Any:
    """The dtype JAX gives `leaf`, None where it is no array but a container, say."""
    # A string would be taken for the name of a dtype.
    if isinstance(leaf, str | bytes) or not jax.tree_util.all_leaves([leaf]):
        return None
    try:
        # That of a key of random numbers is no NumPy dtype.
        return leaf.dtype if isinstance(leaf, jax.Array) else jnp.result_type(leaf)
    except (TypeError, ValueError):
        return None
