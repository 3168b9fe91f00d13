# SPDX-License-Identifier: Apache-2.0
"""The sum of checkpoints: compared first, then read, leaves by leaves."""

import contextlib
import ctypes
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from functools import partial
from itertools import islice
from typing import Any, TypeVar

import numpy as np
from jax.typing import ArrayLike

from asgd_optax._posthoc.combine_averages import checked_coefficients, combine_averages
from asgd_optax.checkpoints import _orbax_checkpoints

_T = TypeVar("_T")

# Of the leaves so many are summed at a time: the sums are wider than what they are made
# of, and reading takes memory too, but of a part of the checkpoint alone. More groups
# cost time, as every reading begins with the metadata.
_GROUPS = 8
_LEAST = 2**26  # bytes of one


def combine_checkpoints(
    paths: Sequence[str | os.PathLike[str]],
    coefficients: ArrayLike | None = None,
    *,
    part: str | Sequence[Any] | None = None,
    like: Any = None,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> Any:
    """`average_checkpoints`, but that a key of random numbers stays one on the host.

    `progress` is told how many bytes have been read, and of how many.
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
    targets = None
    if like is not None:
        targets = _orbax_checkpoints.check_target(like, parts[0])
    groups = _orbax_checkpoints.groups_of(parts[0], least=_LEAST, most=_GROUPS)
    sizes = [sum(group.values()) for group in groups]
    # Two groups at a time are held, if that is no more than a checkpoint; on devices
    # they would be restored by one thread and summed by another.
    ahead = like is None and 2 * max(sizes, default=0) <= sum(sizes)
    reads = (
        partial(_orbax_checkpoints.read, found, group, targets)
        for group in groups
        for found in parts
    )
    leaves: dict[Any, Any] = {}
    with (
        ThreadPoolExecutor(1) as reader,
        contextlib.closing(_results(reads, reader if ahead else None)) as trees,
    ):
        counted = _counted(trees, sizes, len(parts), progress)
        for _ in groups:
            leaves |= combine_averages(islice(counted, len(parts)), numbers)
    return _orbax_checkpoints.unflatten(leaves, parts[0], like)


def _results(
    reads: Iterable[Callable[[], _T]], reader: Executor | None
) -> Generator[_T, None, None]:
    """What is read, one after another; by a reader, while the one before is summed."""
    if reader is None:
        for read in reads:
            yield read()
            _return_freed_memory()
        return
    pending: deque[Future[_T]] = deque()
    for read in reads:
        pending.append(reader.submit(read))
        if len(pending) == 2:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def _counted(
    trees: Iterator[_T],
    sizes: Sequence[int],
    checkpoints: int,
    progress: Callable[[int, int], object],
) -> Iterator[_T]:
    """The trees; tells of each how much has been read with it."""
    done, total = 0, sum(sizes) * checkpoints
    for size in sizes:
        for _ in range(checkpoints):
            tree = [next(trees)]
            done += size
            progress(done, total)
            yield tree.pop()  # and nothing here refers to it


def _return_freed_memory() -> None:
    """Hands back to the system what was freed, where the allocator is glibc's.

    It keeps what is smaller than 32 MiB for the thread that had it, and Orbax reads in
    other threads each time: of small checkpoints it would keep more and more. Of large
    ones it keeps parts alone, and getting memory anew would cost a tenth of the time.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
