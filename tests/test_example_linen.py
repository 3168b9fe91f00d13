# SPDX-License-Identifier: Apache-2.0
"""The Flax Linen example: resuming is exact, and what is wrong is said in a line."""

import math
import shutil
import tempfile

import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
import pytest
from flax import linen as nn
from flax.training.train_state import TrainState

from asgd_optax import asgd
from examples import linen_train_state as example
from tests.programs import assert_explained, contents, error_of

SHORT = ["--steps", "40", "--t0", "10"]


def in_folder(folder, *options):
    return [*SHORT, "--checkpoint-dir", str(folder), *options]


def assert_refused(capsys, folder, argv):
    """A line names the folder, and nothing in there has been touched."""
    before = contents(folder)
    line = error_of(example.main, argv, capsys)
    assert "--checkpoint-dir" in line
    assert str(folder) in line
    assert contents(folder) == before


@pytest.fixture
def no_training(monkeypatch):
    def train_step(*args):
        raise AssertionError("trained")

    monkeypatch.setattr(example, "train_step", train_step)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with the checkpoints of a short run, and what that run found."""
    folder = tmp_path_factory.mktemp("linen") / "a b" / "checkpoints"
    return folder, example.main(in_folder(folder))


@pytest.fixture
def saved(finished, tmp_path):
    """A copy of those checkpoints, to do with as one likes."""
    return shutil.copytree(finished[0], tmp_path / "checkpoints")


def test_the_resumed_run_ends_in_the_bits_of_the_uninterrupted_one(finished):
    folder, results = finished
    assert results.starts == [0, 20]
    assert results.bitwise
    assert {path.name for path in folder.iterdir()} >= {"20", "40"}


def test_bits_tell_one_ulp_and_the_dtype():
    state = TrainState.create(apply_fn=None, params={"w": jnp.ones(2)}, tx=asgd())
    ulp = state.opt_state._replace(ax={"w": jnp.nextafter(jnp.ones(2), 2.0)})
    narrow = state.opt_state._replace(step=jnp.zeros([], jnp.uint32))
    assert example.bits(state) == example.bits(state)
    assert example.bits(state) != example.bits(state.replace(opt_state=ulp))
    assert example.bits(state) != example.bits(state.replace(opt_state=narrow))


def test_without_a_folder_nothing_is_left_behind(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert example.main(SHORT) == finished[1]
    assert contents(tmp_path) == {}


def test_a_later_start_goes_on_from_the_newest_checkpoint(saved):
    results = example.main(in_folder(saved, "--steps", "60"))
    assert results.starts == [40, 40]
    assert results.bitwise


def test_a_later_start_goes_on_from_halfway(finished, saved):
    shutil.rmtree(saved / "40")
    (saved / "40.stamp").unlink()
    results = example.main(in_folder(saved))
    assert results == finished[1]._replace(starts=[20, 20])


def test_a_finished_run_is_only_evaluated(finished, saved):
    before = contents(saved)
    results = example.main(in_folder(saved))
    assert results == finished[1]._replace(starts=[40, 40])
    assert contents(saved) == before


def test_the_average_is_better_than_the_last_iterate(capsys):
    results = example.main([])
    assert results.bitwise
    assert results.average_loss < results.last_loss < 0.3
    assert results.average_accuracy > 0.9
    printed = capsys.readouterr().out
    assert "same bits as an uninterrupted run: True" in printed
    for figure in (
        f"{results.last_loss:.4f}",
        f"{results.last_accuracy:.2%}",
        f"{results.average_loss:.4f}",
        f"{results.average_accuracy:.2%}",
    ):
        assert figure in printed


def test_the_average_is_evaluated_once_there_is_one(finished):
    results = finished[1]
    assert math.isfinite(results.average_loss)
    assert results.average_loss != results.last_loss
    before = example.main(["--steps", "4", "--t0", "inf"])
    assert before.average_loss == before.last_loss


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--rate", "0"),
        ("--rate", "-0.1"),
        ("--rate", "nan"),
        ("--rate", "inf"),
        ("--rate", "fast"),
        ("--t0", "-1"),
        ("--t0", "nan"),
        ("--steps", "1"),
        ("--steps", "2.5"),
        ("--seed", "-1"),
        ("--seed", str(2**32)),
    ],
)
@pytest.mark.usefixtures("no_training")
def test_a_bad_option_is_named(option, value, capsys, tmp_path):
    folder = tmp_path / "new"
    line = error_of(example.main, in_folder(folder, f"{option}={value}"), capsys)
    assert option in line
    assert not folder.exists()


@pytest.mark.parametrize("below", ["file", "file/below"])
@pytest.mark.usefixtures("no_training")
def test_a_file_is_no_checkpoint_folder(below, capsys, tmp_path):
    (tmp_path / "file").write_text("kept")
    line = error_of(example.main, in_folder(tmp_path / below), capsys)
    assert "--checkpoint-dir" in line
    assert str(tmp_path / below) in line
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.usefixtures("no_training")
def test_fewer_steps_than_the_checkpoint_has(capsys, saved):
    before = contents(saved)
    line = error_of(example.main, in_folder(saved, "--steps", "30"), capsys)
    assert "--steps" in line
    assert str(saved) in line
    assert contents(saved) == before


def test_help_explains_every_option(capsys):
    options = ("--steps", "--rate", "--t0", "--seed", "--checkpoint-dir")
    assert_explained(example.main, options, capsys)


def truncate(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip_a_bit(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, lambda file: file.unlink()])
@pytest.mark.parametrize(
    "which", ["largest", "_CHECKPOINT_METADATA", "_METADATA", "manifest.ocdbt", "stamp"]
)
@pytest.mark.usefixtures("no_training")
def test_a_damaged_checkpoint_is_refused(which, damage, capsys, saved):
    files = [path for path in (saved / "40").rglob("*") if path.is_file()]
    if which == "largest":
        file = max(files, key=lambda path: path.stat().st_size)
    elif which == "stamp":
        file = saved / "40.stamp"
    else:
        file = next(path for path in files if path.name == which)
    damage(file)
    assert_refused(capsys, saved, in_folder(saved))


@pytest.mark.usefixtures("no_training")
def test_a_missing_checkpoint_is_refused(capsys, saved):
    shutil.rmtree(saved / "40" / "default")
    assert_refused(capsys, saved, in_folder(saved))


@pytest.mark.parametrize(
    "options", [("--rate", "0.2"), ("--t0", "11"), ("--seed", "1")]
)
@pytest.mark.usefixtures("no_training")
def test_a_checkpoint_of_other_options_is_refused(options, capsys, saved):
    assert_refused(capsys, saved, in_folder(saved, *options))


@pytest.mark.usefixtures("no_training")
def test_a_checkpoint_of_another_model_is_refused(monkeypatch, capsys, saved):
    wider = nn.Sequential([nn.Dense(17), nn.relu, nn.Dense(2)])
    monkeypatch.setattr(example, "NETWORK", wider)
    assert_refused(capsys, saved, in_folder(saved))


@pytest.mark.usefixtures("no_training")
def test_a_checkpoint_of_another_optimizer_is_refused(monkeypatch, capsys, saved):
    monkeypatch.setattr(example, "asgd", lambda rate, **_: optax.adam(rate))
    assert_refused(capsys, saved, in_folder(saved))


@pytest.mark.usefixtures("no_training")
def test_a_foreign_checkpoint_is_refused(capsys, tmp_path):
    params = example.NETWORK.init(jax.random.key(0), jnp.ones((1, 30)))["params"]
    state = TrainState.create(apply_fn=None, params=params, tx=optax.adam(0.1))
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(20, args=ocp.args.StandardSave(state))
    assert_refused(capsys, tmp_path, in_folder(tmp_path))


@pytest.mark.parametrize("name", ["notes.txt", "20", "7/data", ".hidden"])
@pytest.mark.usefixtures("no_training")
def test_a_folder_of_other_things_is_refused(name, capsys, tmp_path):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("kept")
    assert_refused(capsys, tmp_path, in_folder(tmp_path))
