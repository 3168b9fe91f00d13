# SPDX-License-Identifier: Apache-2.0
"""Two processes train as one does, and each side restores what the other saved."""

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
from tests.support import bits

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


def test_two_processes_train_average_and_restore_as_one(tmp_path):
    mesh = process_worker.mesh_of(MESH)
    saved = process_worker.train(*process_worker.start(mesh), mesh, range(SAVED))
    process_worker.save(tmp_path / "of_one", SAVED, *saved)
    half = process_worker.gathered(*saved)
    whole = process_worker.gathered(
        *process_worker.train(*saved, mesh, range(SAVED, STEPS))
    )
    with two_processes(tmp_path) as processes:
        for process in processes:
            assert process.wait(TIMEOUT) == 0, logs(tmp_path)

    # Both train alike.
    at_save = written(tmp_path / "at_save.npz", whole)
    chex.assert_trees_all_close(at_save, half, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(
        written(tmp_path / "trained.npz", whole), whole, rtol=1e-5, atol=1e-6
    )
    # The average of both checkpoints.
    one, two = process_worker.MERGED
    merged = written(tmp_path / "merged.npz", whole)
    for actual, first, second in zip(
        *map(jax.tree.leaves, (merged[:2], half[:2], at_save[:2])), strict=True
    ):
        # Integers are taken from the last checkpoint.
        exact = np.issubdtype(second.dtype, np.integer)
        wanted = second if exact else one * first.astype(float) + two * second
        assert actual.dtype == second.dtype
        np.testing.assert_allclose(actual, wanted, rtol=1e-6, atol=1e-7)
    # Two processes resume from the checkpoint of one.
    assert bits(written(tmp_path / "restored.npz", whole)) == bits(half)
    chex.assert_trees_all_close(
        written(tmp_path / "resumed.npz", whole), whole, rtol=1e-5, atol=1e-6
    )
    # One process resumes from the checkpoint of two.
    step, restored = process_worker.restore(tmp_path / "of_two", mesh)
    assert step == SAVED
    assert bits(process_worker.gathered(*restored)) == bits(at_save)
    resumed = process_worker.train(*restored, mesh, range(SAVED, STEPS))
    chex.assert_trees_all_close(
        process_worker.gathered(*resumed), whole, rtol=1e-5, atol=1e-6
    )
