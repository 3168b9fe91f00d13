# SPDX-License-Identifier: Apache-2.0
"""`examples/data_parallel.py`: three ways, one result; no process is left behind."""

import multiprocessing
import threading
import time

import numpy as np
import pytest

from examples import data_parallel
from tests.programs import assert_explained, error_of


def test_all_ways_end_in_the_same_weights(capsys):
    outcomes = data_parallel.main(["--steps", "12", "--devices", "4"])
    assert list(outcomes) == ["pmap", "jit", "processes"]
    pmap, jit, processes = outcomes.values()
    for other in (jit, processes):
        np.testing.assert_allclose(other[:2], pmap[:2], rtol=1e-4)
    assert pmap.average_loss != pmap.last_loss
    # Four devices hold a quarter each, but for a last bias of ten numbers.
    for field in ("params_bytes", "state_bytes"):
        whole, *quarters = (getattr(outcome, field) for outcome in outcomes.values())
        assert all(whole / 4 <= quarter < whole / 4 + 100 for quarter in quarters)
    assert pmap.params_bytes == 4 * (64 * 512 + 512 + 512 * 10 + 10)
    assert pmap.params_bytes < pmap.state_bytes < pmap.params_bytes + 100
    printed = capsys.readouterr().out
    for how, outcome in outcomes.items():
        (row,) = (line for line in printed.splitlines() if f"| {how} " in line)
        assert f"{outcome.average_loss:.6f}" in row
        assert f"{outcome.state_bytes / 1e3:.1f}" in row
    assert "differ by" in printed


@pytest.mark.parametrize("how", ["pmap", "jit"])
def test_on_the_devices_there_are(how, capsys):
    outcomes = data_parallel.main(
        ["--steps", "2", "--devices", "all", "--how", how, "--rate", "0.1"]
    )
    assert list(outcomes) == [how]
    assert f"{outcomes[how].last_loss:.6f}" in capsys.readouterr().out


def test_a_process_that_dies_ends_the_run(capsys):
    """In one line, and the other process with it."""

    def kill():
        while len(children := multiprocessing.active_children()) < 2:
            time.sleep(0.05)
        children[0].kill()

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    options = ["--how", "processes", "--devices", "2"]
    line = error_of(data_parallel.main, options, capsys, code=1)
    assert "of 2 ended with exit code -9" in line
    assert not multiprocessing.active_children()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--how", "magic"], "--how"),
        (["--how", "all", "--devices", "all"], "--how"),
        (["--how", "processes", "--devices", "all"], "--how"),
        (["--devices", "0"], "--devices"),
        (["--devices", "-8"], "--devices"),
        (["--devices", "2.5"], "--devices"),
        (["--devices", "many"], "--devices"),
        (["--devices", "1"], "--devices"),
        (["--devices", "3", "--batch-size", "63"], "--devices"),
        (["--devices", "7"], "7 devices cannot share 64 images"),
        (["--batch-size", "60"], "8 devices cannot share 60 images"),
        (["--how", "pmap", "--devices", "all", "--batch-size", "60"], "--batch-size"),
        (["--batch-size", "0"], "--batch-size"),
        (["--batch-size", "998"], "--batch-size"),
        (["--rate", "nan"], "--rate"),
        (["--steps", "0"], "--steps"),
        (["--speed", "1"], "--speed"),
    ],
)
def test_a_bad_option_is_refused_in_one_line(options, named, capsys):
    assert named in error_of(data_parallel.main, options, capsys)


def test_help_explains_every_option_with_its_default(capsys):
    options = ("--how", "--devices", "--batch-size", "--rate", "--steps")
    assert_explained(data_parallel.main, options, capsys)
