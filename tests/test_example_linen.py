# SPDX-License-Identifier: Apache-2.0
"""The checkpoint lesson: resuming is exact, kills and full disks are harmless."""

import gc
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
import pytest
from flax import linen as nn
from flax.training.train_state import TrainState

from asgd_optax import asgd
from examples import linen_train_state as example
from tests.programs import contents, error_of

STEPS = 40
ROOT = Path(example.__file__).parents[1]


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(example, "SAVE_EVERY", 10)
    monkeypatch.setattr(example, "T0", 10)


@pytest.fixture
def no_training(monkeypatch):
    def train_step(*args):
        raise AssertionError("trained")

    monkeypatch.setattr(example, "train_step", train_step)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with the checkpoints of a short run, and what that run found."""
    folder = tmp_path_factory.mktemp("linen") / "a b" / "checkpoints"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(example, "SAVE_EVERY", 10)
        patched.setattr(example, "T0", 10)
        return folder, example.main(folder, STEPS)


@pytest.fixture
def saved(finished, tmp_path):
    """A copy of those checkpoints, to do with as one likes."""
    return shutil.copytree(finished[0], tmp_path / "checkpoints")


def refusal(folder, capsys):
    """The one line with which a start ends; logs and errors are as they were."""
    stderr, disabled = sys.stderr, logging.root.manager.disable
    line = error_of(lambda _: example.main(folder, STEPS), [], capsys, code=1)
    assert (sys.stderr, logging.root.manager.disable) == (stderr, disabled)
    # Nor does a thread, or what is left of an error, write any more later.
    gc.collect()
    assert capsys.readouterr().err == ""
    return line


@pytest.fixture
def assert_refused(capsys):
    def refused(folder, *reasons):
        """One line names the folder, and nothing in there has been touched."""
        before = contents(folder)
        # No line on stdout: it neither starts nor goes on.
        line = refusal(folder, capsys)
        for text in (str(folder), *reasons):
            assert text in line
        assert contents(folder) == before

    return refused


def test_the_resumed_run_ends_in_the_bits_of_the_uninterrupted_one(finished):
    folder, results = finished
    assert results["starts"] == [0, 20]
    assert results["bitwise"]
    # The newest two are kept.
    assert {path.name for path in folder.iterdir()} == {"30", "40"}


def test_bits_tell_one_ulp_and_the_dtype():
    state = TrainState.create(apply_fn=None, params={"w": jnp.ones(2)}, tx=asgd())
    ulp = state.opt_state._replace(ax={"w": jnp.nextafter(jnp.ones(2), 2.0)})
    narrow = state.opt_state._replace(step=jnp.zeros([], jnp.uint32))
    assert example.bits(state) == example.bits(state)
    assert example.bits(state) != example.bits(state.replace(opt_state=ulp))
    assert example.bits(state) != example.bits(state.replace(opt_state=narrow))


def test_without_a_folder_nothing_is_left_behind(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert example.main(steps=STEPS) == finished[1]
    assert contents(tmp_path) == {}


def test_a_later_start_goes_on_from_the_newest_checkpoint(saved):
    results = example.main(saved, 60)
    assert results["starts"] == [40, 40]
    assert results["bitwise"]


def test_a_finished_run_is_only_evaluated(finished, saved):
    before = contents(saved)
    assert example.main(saved, STEPS) == {**finished[1], "starts": [40, 40]}
    assert contents(saved) == before


def test_the_average_is_better_than_the_last_iterate(monkeypatch, capsys):
    monkeypatch.setattr(example, "T0", 300)
    monkeypatch.setattr(example, "SAVE_EVERY", 500)
    results = example.main()
    assert results["bitwise"]
    assert results["averaged"][0] < results["last"][0] < 0.3
    assert results["averaged"][1] > 0.9
    printed = capsys.readouterr().out
    assert "same bits as an uninterrupted run: True" in printed
    for name in ("last", "averaged"):
        loss, accuracy = results[name]
        expected = f"{name:8}  test loss {loss:.4f}, accuracy {accuracy:.2%}"
        assert expected in printed


def test_the_average_is_evaluated_once_there_is_one(finished, monkeypatch):
    assert finished[1]["averaged"] != finished[1]["last"]
    monkeypatch.setattr(example, "T0", float("inf"))
    before = example.main(steps=4)
    assert before["averaged"] == before["last"]


PROGRAM = """
import sys
from pathlib import Path
from examples import linen_train_state as example
example.SAVE_EVERY, example.T0 = 10, 10
save = example.ocp.CheckpointManager.save
def slow(manager, step, args):
    print("saving", step, flush=True)
    return save(manager, step, args=args)
example.ocp.CheckpointManager.save = slow
example.main(Path(sys.argv[1]), 40)
"""


def kill_while(folder, step, appears):
    """Kills the program while it saves `step`, as soon as `appears` is there."""
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(folder)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    for line in process.stdout:
        if line == f"saving {step}\n":
            break
    while process.poll() is None and not list(folder.glob(appears)):
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.stdout.close()
    assert process.wait() == -signal.SIGKILL


def test_a_kill_in_the_first_save_is_harmless(finished, tmp_path):
    kill_while(tmp_path, 10, "10.*tmp*")
    left = [path.name for path in tmp_path.iterdir()]
    assert len(left) == 1
    assert left[0].startswith("10")
    results = example.main(tmp_path, STEPS)
    # The save may have come to its end between the look and the kill.
    first = 10 if left == ["10"] else 0
    assert results == {**finished[1], "starts": [first, 20]}
    assert {path.name for path in tmp_path.iterdir()} == {"30", "40"}


def test_a_kill_in_a_later_save_costs_that_save(finished, tmp_path):
    kill_while(tmp_path, 30, "30.*tmp*")
    first = 30 if (tmp_path / "30").is_dir() else 20
    assert example.main(tmp_path, STEPS) == {**finished[1], "starts": [first, first]}
    assert {path.name for path in tmp_path.iterdir()} == {"30", "40"}


@pytest.mark.parametrize("items", ["", "state", "state run"])
def test_what_a_killed_save_leaves_is_passed_over(items, finished, saved):
    # Orbax writes a step, and each of its items, into a folder that it then renames.
    unfinished = (saved / "40").rename(saved / "40.orbax-checkpoint-tmp")
    for item in items.split():
        (unfinished / item).rename(unfinished / f"{item}.orbax-checkpoint-tmp")
    results = example.main(saved, STEPS)
    assert results == {**finished[1], "starts": [30, 30]}
    assert {path.name for path in saved.iterdir()} == {"30", "40"}


def test_an_old_checkpoint_half_deleted_is_passed_over(finished, saved):
    shutil.copytree(saved / "30", saved / "20")
    (saved / "20" / "_CHECKPOINT_METADATA").unlink()
    shutil.rmtree(saved / "20" / "run")
    shutil.rmtree(saved / "40")
    assert example.main(saved, STEPS) == {**finished[1], "starts": [30, 30]}
    assert {path.name for path in saved.iterdir()} == {"30", "40"}


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a file system")
@pytest.mark.parametrize("size", ["16k", "120k"])
def test_a_small_file_system(size, finished, tmp_path):
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(tmp_path)]
    if subprocess.run(mount, stderr=subprocess.DEVNULL, check=False).returncode:
        pytest.skip("may not mount a file system")
    try:
        run = [sys.executable, "-c", PROGRAM, str(tmp_path / "checkpoints")]
        settings = {"cwd": ROOT, "capture_output": True, "text": True}
        full = subprocess.run(run, check=False, **settings)
        assert full.returncode == 1
        (line,) = full.stderr.splitlines()
        assert f"cannot save in {tmp_path}" in line
        assert line.endswith("No space left on device")
        subprocess.run(["mount", "-o", "remount,size=8m", str(tmp_path)], check=True)
        results = example.main(tmp_path / "checkpoints", STEPS)
        assert results == {**finished[1], "starts": results["starts"]}
        # What was saved while there was room is where the next start goes on.
        first, second = results["starts"]
        assert first == 0 if size == "16k" else first >= 10
        assert second == max(first, 20)
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


@pytest.mark.parametrize("below", ["file", "file/below"])
@pytest.mark.usefixtures("no_training")
def test_a_file_is_no_checkpoint_folder(below, tmp_path, capsys):
    (tmp_path / "file").write_text("kept")
    assert str(tmp_path / below) in refusal(tmp_path / below, capsys)
    assert (tmp_path / "file").read_text() == "kept"


def truncate(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip_a_bit(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


# Of the reads that Orbax leaves unfinished where one fails, Python complains later.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("damage", [truncate, flip_a_bit, lambda file: file.unlink()])
@pytest.mark.parametrize("which", ["largest", "state/_METADATA", "run/metadata"])
@pytest.mark.usefixtures("no_training")
def test_a_damaged_checkpoint_is_refused(which, damage, saved, assert_refused):
    files = [path for path in (saved / "40").rglob("*") if path.is_file()]
    if which == "largest":
        file = max(files, key=lambda path: path.stat().st_size)
    else:
        file = saved / "40" / which
    damage(file)
    assert_refused(saved, str(saved / "40"))


@pytest.mark.parametrize("item", ["state", "run"])
@pytest.mark.usefixtures("no_training")
def test_a_missing_item_is_refused(item, saved, assert_refused):
    shutil.rmtree(saved / "40" / item)
    assert_refused(saved, str(saved / "40"))


@pytest.mark.usefixtures("no_training")
def test_what_orbax_reads_without_a_word_is_refused(monkeypatch, saved, assert_refused):
    bits = example.bits
    monkeypatch.setattr(example, "bits", lambda tree: bits(tree)[:-1] + b"\1")
    assert_refused(saved, str(saved / "40"), "not the bits that were saved")


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("RATE", 0.2, "rate"),
        ("T0", 11, "t0"),
        ("SEED", 1, "seed"),
        ("BATCH_SIZE", 9, "batch size"),
        ("NETWORK", nn.Sequential([nn.Dense(17), nn.relu, nn.Dense(2)]), "model"),
        ("asgd", lambda rate, **_: optax.adam(rate), "optimizer"),
    ],
)
@pytest.mark.usefixtures("no_training")
def test_a_checkpoint_of_another_run_is_refused(
    name, value, reason, monkeypatch, saved, assert_refused
):
    monkeypatch.setattr(example, name, value)
    assert_refused(saved, str(saved / "40"), "made with another", reason)


@pytest.mark.usefixtures("no_training")
def test_a_foreign_checkpoint_is_refused(tmp_path, assert_refused):
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(20, args=ocp.args.StandardSave({"w": jnp.ones(2)}))
    assert_refused(tmp_path, str(tmp_path / "20"))


@pytest.mark.usefixtures("no_training")
def test_a_folder_that_is_called_as_a_step_is_refused(tmp_path, assert_refused):
    (tmp_path / "20").mkdir()
    (tmp_path / "20" / "data").write_text("kept")
    assert_refused(tmp_path, str(tmp_path / "20"))


def test_a_bad_option_is_one_line():
    run = [sys.executable, "-m", "examples.linen_train_state", "--checkpoint-dri=x"]
    ended = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert ended.stdout == ""
    (line,) = ended.stderr.splitlines()
    assert "--checkpoint-dri" in line
