# SPDX-License-Identifier: Apache-2.0
"""The sum of checkpoints: compared first, then read one after another."""

import contextlib
import ctypes
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from jax.typing import ArrayLike

from asgd_optax import _orbax_checkpoints
from asgd_optax._combine_averages import checked_coefficients, combine_averages


def combine_checkpoints(
    paths: Sequence[str | os.PathLike[str]],
    coefficients: ArrayLike | None = None,
    *,
    part: str | Sequence[Any] | None = None,
    like: Any = None,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> Any:
    """`average_checkpoints`, but that a key of random numbers stays one on the host.

    `progress` gets what is to be read, and hands it on.
    """
    if isinstance(paths, str | os.PathLike):
        raise TypeError(f"paths must be several; got {paths!r}")
    paths = list(paths)
    if not paths:
        raise ValueError("paths must be one or more; got none")
    if coefficients is None:
        coefficients = np.full(len(paths), 1 / len(paths))
    numbers = np.array(checked_coefficients(coefficients))
    if len(numbers) != len(paths):
        raise ValueError(
            f"there are {len(paths)} paths, and {len(numbers)} coefficients"
        )
    keys = _orbax_checkpoints.keys_of(part)
    parts = [_orbax_checkpoints.find_part(path, keys) for path in paths]
    for other in parts[1:]:
        _orbax_checkpoints.check_alike(other, parts[0])
    if like is not None:
        _orbax_checkpoints.check_target(like, parts[0])

    def one_by_one() -> Iterator[Any]:
        for found in progress(parts):
            yield _orbax_checkpoints.read(found, like)
            _return_freed_memory()

    return combine_averages(one_by_one(), numbers)


def _return_freed_memory() -> None:
    """Hands back to the system what was freed, where the allocator is glibc's.

    It keeps what is smaller than 32 MiB for the thread that had it, and Orbax reads in
    other threads each time: with more checkpoints it would keep more and more.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
