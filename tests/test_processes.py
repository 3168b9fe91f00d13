# SPDX-License-Identifier: Apache-2.0
"""Two real processes: they train as one does; each restores what the other saved."""

import contextlib
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import chex
import jax
import numpy as np
import pytest

from tests import process_worker
from tests.process_worker import SAVED, STEPS
from tests.support import bits

pytestmark = pytest.mark.flax
TIMEOUT = 120  # seconds, for what takes a tenth of it
MESH = (4, 2)  # of the one process; the two have another


@contextlib.contextmanager
def two_processes(folder, job):
    """Both, running; whatever happens, none is left."""
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
                    [*module, str(port), str(rank), str(folder), job],
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
    """The tree that a process wrote, in the structure of `like`."""
    with np.load(path) as arrays:
        return jax.tree.unflatten(jax.tree.structure(like), arrays.values())


def test_two_processes_are_as_good_as_one(tmp_path):
    mesh = process_worker.mesh_of(MESH)
    saved = process_worker.train(*process_worker.start(mesh), mesh, range(SAVED))
    process_worker.save(tmp_path / "of_one", SAVED, *saved)
    half = process_worker.gathered(*saved)
    whole = process_worker.gathered(
        *process_worker.train(*saved, mesh, range(SAVED, STEPS))
    )
    with two_processes(tmp_path, "train") as processes:
        for process in processes:
            assert process.wait(TIMEOUT) == 0, logs(tmp_path)

    # They trained alike.
    at_save = written(tmp_path / "at_save.npz", whole)
    chex.assert_trees_all_close(at_save, half, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(
        written(tmp_path / "trained.npz", whole), whole, rtol=1e-5, atol=1e-6
    )
    # They averaged what one and what they have saved.
    one, two = process_worker.MERGED
    merged = written(tmp_path / "merged.npz", whole)
    for actual, first, second in zip(
        *map(jax.tree.leaves, (merged[:2], half[:2], at_save[:2])), strict=True
    ):
        # What is no float is of the last of them.
        exact = np.issubdtype(second.dtype, np.integer)
        wanted = second if exact else one * first.astype(float) + two * second
        assert actual.dtype == second.dtype
        np.testing.assert_allclose(actual, wanted, rtol=1e-6, atol=1e-7)
    # Two restored what one has saved, and went on from it.
    assert bits(written(tmp_path / "restored.npz", whole)) == bits(half)
    chex.assert_trees_all_close(
        written(tmp_path / "resumed.npz", whole), whole, rtol=1e-5, atol=1e-6
    )
    # One restores what two have saved, and goes on from it.
    step, restored = process_worker.restore(tmp_path / "of_two", mesh)
    assert step == SAVED
    assert bits(process_worker.gathered(*restored)) == bits(at_save)
    resumed = process_worker.train(*restored, mesh, range(SAVED, STEPS))
    chex.assert_trees_all_close(
        process_worker.gathered(*resumed), whole, rtol=1e-5, atol=1e-6
    )


def test_a_process_killed_in_the_middle_of_a_save(tmp_path):
    with two_processes(tmp_path, "hang") as (first, second):
        deadline = time.monotonic() + TIMEOUT
        while not (tmp_path / "saving").exists():
            assert first.poll() is None, logs(tmp_path)
            assert second.poll() is None, logs(tmp_path)
            assert time.monotonic() < deadline, logs(tmp_path)
            time.sleep(0.1)
        second.send_signal(signal.SIGKILL)
        assert second.wait(TIMEOUT) == -signal.SIGKILL
        # The other one waits for it, or has noticed.
        with contextlib.suppress(subprocess.TimeoutExpired):
            assert first.wait(2) != 0
    assert not (tmp_path / "saved").exists()
    begun = [path.name for path in (tmp_path / "of_two").iterdir()]
    assert any(name.startswith(f"{STEPS}.") for name in begun), begun

    mesh = process_worker.mesh_of(MESH)
    step, restored = process_worker.restore(tmp_path / "of_two", mesh)
    assert step == SAVED
    saved = process_worker.train(*process_worker.start(mesh), mesh, range(SAVED))
    chex.assert_trees_all_close(restored, saved, rtol=1e-5, atol=1e-6)
    # What is left of the other save is not in the way of the next.
    new = process_worker.train(*restored, mesh, range(SAVED, STEPS))
    process_worker.save(tmp_path / "of_two", STEPS, *new)
    step, restored = process_worker.restore(tmp_path / "of_two", mesh)
    assert step == STEPS
    assert bits(restored) == bits(new)
