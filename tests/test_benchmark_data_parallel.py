# SPDX-License-Identifier: Apache-2.0
"""`benchmarks/data_parallel.py`: three ways, one result; no process is left behind."""

import multiprocessing
import threading
import time

import numpy as np
import pytest

from benchmarks import data_parallel
from tests.programs import assert_explained, error_of


def test_all_ways_end_in_the_same_weights(capsys):
    outcomes = data_parallel.main(["--steps", "12", "--devices", "4"])
    assert list(outcomes) == ["pmap", "jit", "processes"]
    pmap, jit, processes = outcomes.values()
    for other in (jit, processes):
        np.testing.assert_allclose(other[:2], pmap[:2], rtol=1e-4)
    assert jit[2:] == processes[2:]
    # The processes had four devices, not the eight of the tests.
    assert pmap.params_bytes / 4 <= jit.params_bytes < pmap.params_bytes / 4 + 100
    printed = capsys.readouterr().out
    for how, outcome in outcomes.items():
        (row,) = (line for line in printed.splitlines() if f"| {how} " in line)
        assert f"{outcome.average_loss:.6f}" in row
    assert "differ by" in printed


def test_a_process_that_dies_ends_the_run(capsys, monkeypatch):
    """In one line, and the other process with it."""

    def kill():
        while len(children := multiprocessing.active_children()) < 2:
            time.sleep(0.05)
        children[0].kill()

    monkeypatch.delitem(data_parallel.WAYS, "pmap")
    monkeypatch.delitem(data_parallel.WAYS, "jit")
    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    line = error_of(data_parallel.main, ["--devices", "2"], capsys, code=1)
    assert "of 2 ended with exit code -9" in line
    assert not multiprocessing.active_children()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--devices", "0"], "--devices"),
        (["--devices", "-8"], "--devices"),
        (["--devices", "2.5"], "--devices"),
        (["--devices", "many"], "--devices"),
        (["--devices", "1"], "--devices"),
        (["--devices", "6"], "divides a minibatch of 64"),
        (["--steps", "0"], "--steps"),
        (["--speed", "1"], "--speed"),
    ],
)
def test_a_bad_option_is_refused_in_one_line(options, named, capsys):
    assert named in error_of(data_parallel.main, options, capsys)


def test_help_explains_every_option_with_its_default(capsys):
    assert_explained(data_parallel.main, ("--devices", "--steps"), capsys)
