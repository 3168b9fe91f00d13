# SPDX-License-Identifier: Apache-2.0
"""Weighted sums of checkpoints, read an eighth of the leaves at a time."""

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
import optax
from jax.typing import ArrayLike

from asgd_optax._core.checks import needs
from asgd_optax._posthoc.combine_averages import checked_coefficients, combine_averages

# Summing whole checkpoints takes four times the memory of one: twice for a float64 sum
# of float32 leaves, and up to twice for reading. Slices also bound what malloc keeps of
# freed arrays. Too many take time, as each reads the metadata again.
_SLICES = 8


def average_checkpoints(
    paths: Sequence[str | os.PathLike[str]],
    coefficients: ArrayLike | None = None,
    *,
    part: str | Sequence[Any] | None = None,
    like: Any = None,
) -> optax.Params:
    r"""Compute a weighted sum of checkpoints, :math:`\sum_i c_i p_i`.

    The metadata of all checkpoints is compared before any array is read. The sum is
    that of `combine_averages`. Memory does not grow with the number of checkpoints.

    Args:
      paths: folders written by Orbax's `StandardCheckpointer`, or steps written by its
        `CheckpointManager`.
      coefficients: one number per checkpoint. The default is a uniform average.
      part: the subtree to average; nothing else is read. Either its keys joined by
        `/`, such as `"params"` or `"opt_state/1/average"`, or a tuple of them. For a
        step with several items the first key is the item's name. The default is the
        whole tree.
      like: a tree of arrays, or of `jax.ShapeDtypeStruct` with shardings, onto which to
        restore. Leaves without a sharding are restored as NumPy arrays. Others of 64
        bits need `jax_enable_x64`.

    Returns:
      With `like`, a tree with its structure and shardings. Without, NumPy arrays with
      the saved shapes and dtypes, in dicts and lists. Leaves that are not floating or
      complex come from the last checkpoint. Without `like`, a PRNG key is returned as
      its data.

    Raises:
      FileNotFoundError: If a path does not exist.
      ValueError: If a path is not a checkpoint, is unfinished or cannot be read; if a
        checkpoint or `like` differs from the first checkpoint (naming path and leaf);
        if it has no such `part`; if `paths` is empty, or `coefficients` are not finite
        or not one per path.
      TypeError: If `paths` is a single path, or `coefficients` are not real numbers.
      ModuleNotFoundError: If Orbax is not installed.

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
    return sum_checkpoints(paths, coefficients, part=part, like=like)


def sum_checkpoints(
    paths: Sequence[str | os.PathLike[str]],
    coefficients: ArrayLike | None,
    *,
    part: str | Sequence[Any] | None,
    like: Any = None,
    typed_keys: bool = False,
    progress: Callable[[float], object] = lambda checkpoints: None,
) -> Any:
    """Compute `average_checkpoints`.

    With `typed_keys`, typed PRNG keys stay typed even without `like`. `progress` is
    called after every read with the fraction of a checkpoint that was read.
    """
    with needs("checkpoints"):
        import orbax.checkpoint as ocp

        from asgd_optax.checkpoints._orbax import check_agree, convert, find_part, read

    if isinstance(paths, str | os.PathLike):
        raise TypeError(f"paths must be a sequence of paths; got the path {paths!r}")
    paths = list(paths)
    if not paths:
        raise ValueError("paths must be one or more; got none")
    if coefficients is None:
        coefficients = np.full(len(paths), 1 / len(paths))
    numbers = np.array(checked_coefficients(coefficients))
    if len(numbers) != len(paths):
        raise ValueError(
            f"expected one coefficient per checkpoint: got {len(paths)} paths but"
            f" {len(numbers)} coefficients"
        )
    parts = [find_part(path, part) for path in paths]
    target = check_agree(parts, like)
    targets = ocp.tree.to_flat_dict(target)
    # Slices of similar size, whatever the order of large and small leaves.
    order = sorted(targets, key=lambda keys: np.size(targets[keys]))
    slices = [order[i::_SLICES] for i in range(min(_SLICES, len(order)))]

    def read_all(leaves: Sequence[Any]) -> Iterator[Any]:
        for part in parts:
            yield read(part, {keys: targets[keys] for keys in leaves})
            progress(1 / len(slices))

    combined: dict[Any, Any] = {}
    for leaves in slices:
        combined |= combine_averages(read_all(leaves), numbers)
    converted = [convert(combined[keys], targets[keys], typed_keys) for keys in targets]
    return jax.tree.unflatten(jax.tree.structure(target), converted)
