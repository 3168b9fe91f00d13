# SPDX-License-Identifier: Apache-2.0
"""Checks of what a caller passes: every error names the argument or the leaf."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def is_traced(value: Any) -> bool:
    """Whether `value` is known only when the compiled program runs."""
    return isinstance(value, jax.core.Tracer)


def concrete(value: Any) -> np.float64:
    """A number that is not traced; of a complex one the real part.

    By way of NumPy: inside of a trace JAX would make a tracer of a concrete array.
    `optax.inject_hyperparams` makes numbers complex where the parameters are.
    """
    return np.float64(np.real(np.asarray(value)))


def check_scalar(name: str, value: Any) -> None:
    """Raises unless `value` is one number, traced or not."""
    if isinstance(value, str | bytes) or not hasattr(value, "__float__"):
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


def check_state(state: Any, kind: type) -> None:
    """Raises unless `state` is of the kind that a transformation made."""
    if not isinstance(state, kind):
        raise TypeError(
            f"state must be the {kind.__name__} that `init` or an earlier `update` of"
            f" this transformation returned; got a {type(state).__name__}"
        )


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


def check_params(params: Any, name: str = "params") -> None:
    """Raises unless every leaf of `params` is a floating or complex array."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        dtype = _dtype(leaf)
        if dtype is None or not jnp.issubdtype(dtype, jnp.inexact):
            raise TypeError(
                f"{name}{jax.tree_util.keystr(path)} is"
                f" {type(leaf).__name__ if dtype is None else dtype}: only floating"
                " and complex arrays can be averaged"
            )
        _check_wide_enough(f"{name}{jax.tree_util.keystr(path)}", dtype)


def check_fits(name: str, tree: Any, params: Any, *, against: str = "params") -> None:
    """Raises unless `tree` has the structure, shapes and kind of `params`.

    Args:
      name: what `tree` is, for the message.
      tree: gradients, updates or an average.
      params: what it must fit.
      against: what `params` is, for the message.
    """
    if params is None and jax.tree.leaves(tree):
        raise ValueError(
            "params are missing: the average is that of the parameters, so call"
            " `update(updates, state, params)`"
        )
    rows: list[tuple[Any, Any, Any]] = []
    try:
        jax.tree_util.tree_map_with_path(lambda *row: rows.append(row), params, tree)
    except (ValueError, TypeError) as error:
        raise ValueError(_misfit(name, tree, against, params)) from error
    for path, param, leaf in rows:
        where = f"{name}{jax.tree_util.keystr(path)}"
        other = f"{against}{jax.tree_util.keystr(path)}"
        if hasattr(leaf, "todense"):
            raise TypeError(
                f"{where} is a {type(leaf).__name__}: sparse gradients must be made"
                " dense first, as by `.todense()`"
            )
        dtype = _dtype(leaf)
        if dtype is None:
            raise ValueError(
                f"{name} and {against} differ in structure: {where} is a"
                f" {type(leaf).__name__}, {other} an array"
            )
        if np.shape(leaf) != np.shape(param):
            raise ValueError(
                f"{where} has shape {np.shape(leaf)}, {other} {np.shape(param)}"
            )
        expected = _dtype(param)
        if not jnp.issubdtype(dtype, jnp.inexact) or (
            jnp.issubdtype(dtype, jnp.complexfloating)
            != jnp.issubdtype(expected, jnp.complexfloating)
        ):
            raise TypeError(f"{where} is {dtype}, {other} {expected}")
        _check_wide_enough(where, dtype)


def check_update(updates: Any, params: Any, mean: Any, name: str) -> None:
    """Raises unless an `update` can be done: all three fit, and can be averaged.

    Args:
      updates: gradients or updates.
      params: the parameters.
      mean: the average kept so far.
      name: what `mean` is, for the message.
    """
    check_params(params)
    check_fits("updates", updates, params)
    check_fits(name, mean, params)


def _check_wide_enough(where: str, dtype: Any) -> None:
    """Raises where JAX neither promotes nor steps in a floating type so narrow."""
    if is_narrow(dtype, bits=16):
        raise TypeError(
            f"{where} is {dtype}: keep master weights of 16 bits or more, average those"
            f" and cast to {dtype} where they are used"
        )


def _misfit(name: str, tree: Any, against: str, params: Any) -> str:
    """Says where the structure of `tree` first departs from that of `params`."""
    here = [p for p, _ in jax.tree_util.tree_leaves_with_path(tree)]
    there = [p for p, _ in jax.tree_util.tree_leaves_with_path(params)]
    prefix = f"{name} and {against} differ in structure: "
    for path in there:
        # A leaf below the path is a container in the place of the array.
        if not any(other[: len(path)] == path for other in here):
            return prefix + f"{name} has no leaf {jax.tree_util.keystr(path)}"
    for path in here:
        if not any(path[: len(other)] == other for other in there):
            return prefix + f"{against} has no leaf {jax.tree_util.keystr(path)}"
    return prefix + f"{jax.tree.structure(tree)} against {jax.tree.structure(params)}"


def _dtype(leaf: Any) -> Any:
    """The dtype JAX gives `leaf`, None where it is no array but a container, say."""
    if not jax.tree_util.all_leaves([leaf]):
        return None
    try:
        return jnp.result_type(leaf)
    except (TypeError, ValueError):
        return None
