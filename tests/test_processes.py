# SPDX-License-Identifier: Apache-2.0
"""Two processes train as one does, and average the checkpoints that they save."""

import contextlib
import os
import pathlib
import socket
import subprocess
import sys

import chex
import jax
import numpy as np
import pytest

from tests import process_worker
from tests.process_worker import SAVED, STEPS

pytestmark = pytest.mark.flax
TIMEOUT = 120  # seconds, ten times what a process takes
MESH = (4, 2)  # of the single process; the two have another


@contextlib.contextmanager
def two_processes(folder):
    """Start both, and kill both at the end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flag = f"--xla_force_host_platform_device_count={process_worker.DEVICES}"
    module = [sys.executable, "-m", "tests.process_worker"]
    processes = []
    try:
        for rank in range(process_worker.PROCESSES):
            with (folder / f"{rank}.log").open("wb") as log:
                process = subprocess.Popen(
                    [*module, str(port), str(rank), str(folder)],
                    env={**os.environ, "XLA_FLAGS": flag},
                    cwd=pathlib.Path(__file__).parents[1],
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
            processes.append(process)
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()


def logs(folder):
    return "\n".join(log.read_text() for log in sorted(folder.glob("*.log")))


def written(path, like):
    """Return the tree that a process wrote, in the structure of `like`."""
    with np.load(path) as arrays:
        return jax.tree.unflatten(jax.tree.structure(like), arrays.values())


def test_two_processes_train_and_average_as_one(tmp_path):
    with two_processes(tmp_path) as processes:
        for process in processes:
            assert process.wait(TIMEOUT) == 0, logs(tmp_path)

    mesh, saved = process_worker.mesh_of(MESH), {}
    run = process_worker.start(mesh)
    for first, last in ((0, SAVED), (SAVED, STEPS)):
        run = process_worker.train(*run, mesh, range(first, last))
        one = process_worker.gathered(*run)
        saved[last] = written(tmp_path / f"{last}.npz", one)
        chex.assert_trees_all_close(saved[last], one, rtol=1e-5, atol=1e-6)

    merged = written(tmp_path / "merged.npz", one)
    # One process averages the checkpoints of two.
    expected = process_worker.merge(tmp_path / "checkpoints", mesh)
    chex.assert_trees_all_close(merged, expected, rtol=1e-6)
    a, b = process_worker.MERGED
    trees = merged[:2], saved[SAVED][:2], saved[STEPS][:2]
    for actual, first, second in zip(*map(jax.tree.leaves, trees), strict=True):
        # Integers are taken from the last checkpoint.
        exact = np.issubdtype(second.dtype, np.integer)
        wanted = second if exact else a * first.astype(float) + b * second
        assert actual.dtype == second.dtype
        np.testing.assert_allclose(actual, wanted, rtol=1e-6, atol=1e-7)
