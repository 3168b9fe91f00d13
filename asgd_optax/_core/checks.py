# SPDX-License-Identifier: Apache-2.0
"""Checks of arguments: every error names the argument or the leaf."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from asgd_optax._core.trees import check_agree, leaf_dtype, paths, type_name


@contextlib.contextmanager
def needs(extra: str) -> Iterator[None]:
    """Wrap optional imports: an error says which extra to install."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"this needs {error.name}: in a checkout, pip install '.[{extra}]'",
            name=error.name,
        ) from error


def is_key(leaf: Any) -> bool:
    """Return whether `leaf` is an array of typed PRNG keys."""
    dtype = getattr(leaf, "dtype", None)
    return dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)


def is_traced(value: Any) -> bool:
    """Return whether `value` is known only when the compiled program runs."""
    return isinstance(value, jax.core.Tracer)


def is_narrow(dtype: Any, bits: int = 32) -> bool:
    """Return whether `dtype` is a floating type of fewer than `bits` bits."""
    return (
        dtype is not None
        and jnp.issubdtype(dtype, jnp.floating)
        and jnp.finfo(dtype).bits < bits
    )


def concrete(value: Any) -> np.float64:
    """Return a number that is not traced as a float64; of a complex one the real part.

    NumPy converts it, because under a trace JAX would make a tracer of it.
    `optax.inject_hyperparams` makes numbers complex if the parameters are. An integer
    above the range of floats becomes infinite.
    """
    try:
        return np.float64(np.real(np.asarray(value)))
    except OverflowError:
        return np.float64(np.inf if value > 0 else -np.inf)


def check_scalar(name: str, value: Any) -> None:
    """Raise unless `value` is one number, traced or not."""
    dtype = getattr(value, "dtype", jnp.bool_)
    numeric = jnp.issubdtype(dtype, jnp.number) or jnp.issubdtype(dtype, jnp.bool_)
    if not hasattr(value, "__float__") or not numeric:
        raise TypeError(f"{name} must be a number; got {value!r}")
    if np.ndim(value) != 0:
        raise ValueError(f"{name} must be a scalar; got shape {np.shape(value)}")


def check_concrete(name: str, value: Any) -> None:
    """Raise unless `value` is one number that is not traced."""
    check_scalar(name, value)
    if is_traced(value):
        raise ValueError(f"{name} must be a concrete number; got the tracer {value}")


def check_hyperparameter(name: str, value: Any, *, may_be_inf: bool = False) -> None:
    """Raise unless `value` is a scalar and, if concrete, finite and not negative."""
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
    """Raise if `value` is an array of a floating type narrower than 32 bits.

    `optax.inject_hyperparams` rounds a Python float to the parameters' dtype before any
    transformation sees it: 0.999 becomes 1 in bfloat16.
    """
    dtype = getattr(value, "dtype", None)
    if is_narrow(dtype):
        raise ValueError(
            f"{name} has dtype {dtype}, which is too coarse for it. Pass a Python"
            " number, or hyperparam_dtype=jnp.float32 to optax.inject_hyperparams"
        )


def check_accumulator_dtype(accumulator_dtype: Any) -> None:
    """Raise unless it is None or a floating dtype of 16 bits or more."""
    if accumulator_dtype is None:
        return
    try:
        # `optax.inject_hyperparams` takes a type for a schedule: an array arrives.
        floating = (
            not isinstance(accumulator_dtype, jax.Array)
            and jnp.issubdtype(jnp.dtype(accumulator_dtype), jnp.inexact)
            and not is_narrow(jnp.dtype(accumulator_dtype), bits=16)
        )
    except TypeError:
        floating = False
    if not floating:
        raise ValueError(
            "accumulator_dtype must be a floating dtype of 16 bits or more, such as"
            " 'float32' (a string if you use optax.inject_hyperparams); got"
            f" {accumulator_dtype!r}"
        )


def check_count(
    name: str, value: Any, *, at_least: int, may_be_inf: bool = True
) -> None:
    """Raise unless `value` is a whole number (or `inf`) of at least `at_least`."""
    check_hyperparameter(name, value, may_be_inf=may_be_inf)
    check_not_narrowed(name, value)
    if is_traced(value):
        return
    number = concrete(value)
    if number < at_least:
        raise ValueError(f"{name} must be at least {at_least}; got {value}")
    if number != np.inf and number % 1:
        raise ValueError(f"{name} must be a whole number; got {value}")


def check_flag(name: str, value: Any) -> None:
    """Raise unless `value` is True or False."""
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name} must be True or False; got {value!r}")


def check_state(state: Any, kind: type) -> None:
    """Raise unless `state` is the state that the `init` of a transformation makes."""
    if not isinstance(state, kind):
        raise TypeError(
            f"state must be the {kind.__name__} that `init` or the last `update`"
            f" returned; got a {type(state).__name__}"
        )
    check_scalar("state.step", getattr(state, "step", 0))


def check_params(params: Any, name: str = "params", *, kind: Any = jnp.inexact) -> None:
    """Raise unless every leaf is an array with values that can be averaged.

    Args:
      params: a pytree.
      name: what to call it in a message.
      kind: the dtypes that are accepted: `jnp.inexact`, `jnp.floating`, or
        `jnp.generic` for any.
    """
    for i, leaf in enumerate(jax.tree.leaves(params)):
        dtype = leaf_dtype(leaf)
        if isinstance(leaf, jax.ShapeDtypeStruct):
            problem = "has no values, as jax.eval_shape returns it; pass arrays"
        elif dtype is None or not jnp.issubdtype(dtype, kind):
            problem = f"cannot be averaged: expected {_EXPECTED[kind]}"
        elif is_narrow(dtype, bits=16):
            problem = f"is too coarse: average 16 bits or more, then cast to {dtype}"
        else:
            continue
        key = jax.tree_util.keystr(paths(params)[i])
        raise TypeError(f"{name}{key} ({type_name(leaf)}) {problem}")


_EXPECTED = {
    jnp.inexact: "a floating or complex array",
    jnp.floating: "a real floating array",
    jnp.generic: "an array or a number",
}


def check_params_given(updates: optax.Updates, params: optax.Params | None) -> None:
    """Raise if `update` was called without the parameters."""
    if params is None and jax.tree.leaves(updates):
        raise ValueError(
            "params are missing: call `update(updates, state, params)`, or wrap the"
            " optimizer in asgd_optax.with_own_params if you cannot change the call"
        )


def check_update(
    updates: optax.Updates, params: optax.Params, kept: Mapping[str, Any]
) -> None:
    """Raise unless `updates` and what a state keeps fit the parameters.

    Args:
      updates: gradients or updates.
      params: the parameters, to which everything else is compared.
      kept: the params-shaped trees of a state, by their names for a message.
    """
    check_params_given(updates, params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(updates, is_leaf=_is_sparse):
        if _is_sparse(leaf):
            raise TypeError(
                f"updates{jax.tree_util.keystr(path)} is a sparse"
                f" {type(leaf).__name__}: make it dense first with `.todense()`"
            )
    check_params(params)
    for name, tree in {"updates": updates, **kept}.items():
        check_params(tree, name)
        check_agree(
            name, tree, "params", params, same_dtype=same_kind, dtype_error=TypeError
        )


def same_kind(dtype: Any, other: Any) -> bool:
    """Return whether two dtypes are both real or both complex."""
    complex_ = jnp.complexfloating
    return bool(jnp.issubdtype(dtype, complex_) == jnp.issubdtype(other, complex_))


def _is_sparse(node: Any) -> bool:
    return hasattr(node, "todense")
