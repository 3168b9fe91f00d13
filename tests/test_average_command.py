# SPDX-License-Identifier: Apache-2.0
"""The command that merges steps of a run: what it chooses, writes and leaves."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

import asgd_optax
from asgd_optax.checkpoints import (
    _orbax_checkpoints,
    average_checkpoints,
    decay_coefficients,
)
from asgd_optax.checkpoints.__main__ import main
from tests.support import bits

ROOT = Path(__file__).parents[1]
STEPS = [2, 10, 100]  # in another order by their names
PROGRAM = "python -m asgd_optax.checkpoints: error: "


def state(step):
    rng = np.random.default_rng(step)
    return {
        "params": {
            "w": jnp.asarray(rng.standard_normal((16, 8)), jnp.float32),
            "layers": [jnp.asarray(rng.standard_normal(8), jnp.bfloat16)],
            "none": None,
        },
        "step": step,
        "rate": 1 / step,
        "count": jnp.asarray(step),
        "keys": {"typed": jax.random.key(step), "raw": jax.random.PRNGKey(step)},
    }


def save(run, steps, **options):
    options = ocp.CheckpointManagerOptions(**options)
    with ocp.CheckpointManager(run, options=options) as manager:
        for step in steps:
            manager.save(step, args=ocp.args.StandardSave(state(step)))
    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return save(tmp_path_factory.mktemp("run") / "run", STEPS)


def average(*arguments):
    main(["average", *map(str, arguments)])


def refused(capsys, status, *arguments):
    """What the command says, in one line, when it ends with this status."""
    with pytest.raises(SystemExit) as ended:
        average(*arguments)
    assert ended.value.code == status
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(PROGRAM)
    return error.removeprefix(PROGRAM)


def restored(path):
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(path)


def test_a_whole_checkpoint(run, tmp_path, capsys):
    """In structure and dtypes as it was saved, keys and plain numbers too."""
    average(run, "--output", tmp_path / "merged")
    found = restored(tmp_path / "merged")
    saved = restored(run / "100" / "default")
    assert jax.tree.structure(found) == jax.tree.structure(saved)
    for actual, wanted in zip(*map(jax.tree.leaves, (found, saved)), strict=True):
        assert getattr(actual, "dtype", None) == getattr(wanted, "dtype", None)
    assert type(found["rate"]) is float
    keys = [jax.random.key_data(tree["keys"]["typed"]) for tree in (found, saved)]
    np.testing.assert_array_equal(*keys)
    folders = [run / str(step) for step in STEPS]
    average_of_all = average_checkpoints(folders)
    assert bits(found["params"]) == bits(average_of_all["params"])
    assert found["rate"] == average_of_all["rate"]
    np.testing.assert_allclose(found["rate"], np.mean([1 / step for step in STEPS]))
    assert found["step"] == found["count"] == 100
    assert json.loads((tmp_path / "merged" / "averaged_from.json").read_text()) == {
        "checkpoints": [str(folder) for folder in folders],
        "coefficients": [1 / 3] * 3,
        "part": None,
    }
    # Nothing else was written; what is no result is on standard error.
    assert os.listdir(tmp_path) == ["merged"]
    out, err = capsys.readouterr()
    assert out == f"{tmp_path / 'merged'}: of {run} the steps 2, 10, 100\n"
    assert re.search(r"averaging: 100%.* [\d.]+k/[\d.]+k ", err)
    # It is a checkpoint like the others.
    again = average_checkpoints([tmp_path / "merged"], part="params/w")
    assert bits(again) == bits(found["params"]["w"])


@pytest.mark.parametrize(
    ("arguments", "steps", "coefficients"),
    [
        (["--last", 2], [10, 100], [0.5, 0.5]),
        (["--last=3"], STEPS, 3 * [1 / 3]),
        ([10], [10], [1.0]),
        ([100, 2, "--weights=-4,5"], [2, 100], [-4.0, 5.0]),
        (["--weights", "linear"], STEPS, decay_coefficients(3)),
        (["--weights", "cosine"], STEPS, decay_coefficients(3, "cosine")),
        (
            ["--weights=minus-sqrt", "--last=2"],
            [10, 100],
            decay_coefficients(2, "minus_sqrt"),
        ),
        (["--weights", "0.5,.25,2.5e-1"], STEPS, [0.5, 0.25, 0.25]),
    ],
    ids=str,
)
def test_steps_and_weights(run, tmp_path, arguments, steps, coefficients):
    output = tmp_path / "merged"
    average(run, *arguments, "--part", "params", "--output", output)
    made_from = json.loads((output / "averaged_from.json").read_text())
    assert made_from["checkpoints"] == [str(run / str(step)) for step in steps]
    np.testing.assert_array_equal(made_from["coefficients"], coefficients)
    assert made_from["part"] == "params"
    folders = [run / str(step) for step in steps]
    wanted = average_checkpoints(folders, coefficients, part="params")
    assert bits(restored(output)) == bits(wanted)
    assert restored(output).keys() == wanted.keys()


def test_options_may_stand_before_steps(run, tmp_path):
    average(run, "--output", tmp_path / "merged", 2, 10)
    made_from = json.loads((tmp_path / "merged" / "averaged_from.json").read_text())
    assert made_from["checkpoints"] == [str(run / "2"), str(run / "10")]


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"step_prefix": "ckpt"}, "ckpt_2"),
        ({"step_format_fixed_length": 6}, "000002"),
        ({"step_prefix": "a_b", "step_format_fixed_length": 3}, "a_b_002"),
    ],
)
def test_other_names_of_steps(options, name, tmp_path):
    run = save(tmp_path / "run", STEPS, **options)
    (run / "notes").mkdir()
    (run / "7.orbax-checkpoint-tmp-12").mkdir()
    average(run, "--part", "params", "--output", tmp_path / "merged")
    made_from = json.loads((tmp_path / "merged" / "averaged_from.json").read_text())
    assert len(made_from["checkpoints"]) == 3
    assert made_from["checkpoints"][0] == str(run / name)


def test_a_part_that_is_one_array(run, tmp_path, capsys):
    """Saved where Orbax saves it, refused by it otherwise; nothing in between."""
    output = tmp_path / "merged"
    if ocp.__version__ < "0.12":
        said = refused(capsys, 1, run, "--part", "params/w", "--output", output)
        assert said.startswith("Orbax cannot save it")
        assert not os.listdir(tmp_path)
        return
    average(run, "--part", "params/w", "--output", output)
    wanted = average_checkpoints([run / str(s) for s in STEPS], part="params/w")
    assert bits(restored(output)) == bits(wanted)


def test_as_a_step_of_a_manager(run, tmp_path):
    """In the place of an unnamed item, it is one."""
    (tmp_path / "7").mkdir()
    average(run, "--part", "params", "--output", tmp_path / "7" / "default")
    with ocp.CheckpointManager(tmp_path) as manager:
        assert manager.latest_step() == 7
        found = manager.restore(7, args=ocp.args.StandardRestore())
    assert bits(found) == bits(restored(tmp_path / "7" / "default"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{run}"], "the following arguments are required: --output"),
        (["{tmp}/no", "--output={tmp}/x"], "argument RUN: there is no folder {tmp}/no"),
        (["{tmp}", "--output={tmp}/x"], "argument RUN: no finished step is in {tmp}"),
        (["{run}", "3", "--output={tmp}/x"], "argument STEP: no finished step 3 is in"),
        (["{run}", "0", "--output={tmp}/x"], "argument STEP: no finished step 0 is in"),
        (["{run}", "2", "2", "--output={tmp}/x"], "argument STEP: 2 is given twice"),
        (
            ["{run}", "two", "--output={tmp}/x"],
            "argument STEP: must be a whole number, 0 or more, not 'two'",
        ),
        (
            ["{run}", "--last=4", "--output={tmp}/x"],
            "argument --last: 4 are more than the steps in {run}: 2, 10, 100",
        ),
        (
            ["{run}", "--last=0", "--output={tmp}/x"],
            "argument --last: must be a whole number, 1 or more, not '0'",
        ),
        (
            ["{run}", "2", "--last=1", "--output={tmp}/x"],
            "argument --last: not allowed where a STEP is given",
        ),
        (
            ["{run}", "--weights=1,2", "--output={tmp}/x"],
            "argument --weights: 2 numbers, and 3 steps",
        ),
        (
            ["{run}", "--weights=sqrt", "--output={tmp}/x"],
            "argument --weights: must be",
        ),
        (["{run}", "--weights=1,nan", "--output={tmp}/x"], "argument --weights: must"),
        (
            ["{run}", "--weights=1,,2", "--output={tmp}/x"],
            "argument --weights: must be",
        ),
        (
            ["{run}", "--weights=", "--output={tmp}/x"],
            "argument --weights: must be uni",
        ),
        (
            ["{run}", "--output={tmp}/a/x"],
            "argument --output: there is no folder {tmp}/a",
        ),
        (["{run}", "--output={run}"], "argument --output: {run} exists, and is not"),
        (["{run}", "--output={tmp}/x", "--out=y"], "unrecognized arguments: --out=y"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_bad_arguments(run, tmp_path, capsys, arguments, message):
    fill = {"run": run, "tmp": tmp_path}
    said = refused(capsys, 2, *(argument.format(**fill) for argument in arguments))
    assert said.startswith(message.format(**fill))
    assert not os.listdir(tmp_path)


def test_no_such_command(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["merge", "run", "--output", "x"])
    assert "argument command: invalid choice: 'merge'" in capsys.readouterr().err


def test_a_checkpoint_in_the_place_of_a_run(run, tmp_path, capsys):
    inside = run / "10" / "default"
    said = refused(capsys, 1, inside, "--output", tmp_path / "x")
    assert said == f"{inside} is one checkpoint, not a folder of steps"


def test_two_folders_of_one_step(tmp_path, capsys):
    run = save(tmp_path / "run", [5])
    save(tmp_path / "run", [5], step_format_fixed_length=4)
    said = refused(capsys, 1, run, "--output", tmp_path / "x")
    assert said.endswith("are the same step")


def test_what_cannot_be_averaged_leaves_nothing(tmp_path, capsys):
    run = save(tmp_path / "run", STEPS)
    output = tmp_path / "merged"
    said = refused(capsys, 1, run, "--part=x", "--output", output)
    assert said.startswith(f"{run / '2'} has no 'x' in its tree")
    (run / "11").mkdir()
    said = refused(capsys, 1, run, "--output", output)
    assert said.startswith(f"{run / '11'} is no checkpoint")
    (run / "11").rmdir()
    save(run, [11])
    odd = {"params": state(1)["params"]}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(run / "12", odd)
    said = refused(capsys, 1, run, 2, 12, "--output", output)
    assert said.startswith(f"{run / '12'} has no leaf '")
    assert os.listdir(tmp_path) == ["run"]


def test_broken_data_leave_nothing(tmp_path, capsys):
    """One array alone: of several Orbax tells what becomes of the others, too late."""
    run = tmp_path / "run"
    with ocp.StandardCheckpointer() as checkpointer:
        for step in (1, 2):
            numbers = np.random.default_rng(step).random(10**5)
            checkpointer.save(run / str(step), {"w": numbers})
    data = max(run.glob("2/**/d/*"), key=lambda path: path.stat().st_size)
    os.truncate(data, data.stat().st_size // 2)
    said = refused(capsys, 1, run, "--output", tmp_path / "merged")
    assert said.startswith(f"{run / '2'} cannot be read: ")
    assert os.listdir(tmp_path) == ["run"]


def test_an_empty_part(tmp_path, capsys):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "1", {"a": (), "b": np.ones(1)})
    said = refused(capsys, 1, tmp_path, "--part=a", "--output", tmp_path / "x")
    assert said.startswith("Orbax cannot save it")
    assert os.listdir(tmp_path) == ["1"]


@pytest.mark.parametrize("kind", ["file", "folder", "full", "link"])
def test_what_appears_in_between_is_left_alone(
    run, tmp_path, monkeypatch, capsys, kind
):
    output, write = tmp_path / "merged", _orbax_checkpoints.write

    def meanwhile(*arguments):
        write(*arguments)
        if kind == "file":
            output.write_text("mine")
        elif kind == "link":
            output.symlink_to(tmp_path / "nowhere")
        else:
            output.mkdir()
        if kind == "full":
            (output / "file").write_text("mine")

    monkeypatch.setattr(_orbax_checkpoints, "write", meanwhile)
    said = refused(capsys, 1, run, "--output", output)
    assert said == f"{output} exists, and is not written over"
    assert os.listdir(tmp_path) == ["merged"]
    assert output.is_symlink() == (kind == "link")
    assert output.is_file() == (kind == "file")
    if kind == "folder":
        assert not os.listdir(output)
    if kind == "full":
        assert os.listdir(output) == ["file"]


@pytest.mark.parametrize("moment", ["read", "write", "json", "rename"])
@pytest.mark.parametrize("error", [OSError("the disk is full"), KeyboardInterrupt()])
def test_an_error_half_way_leaves_nothing(
    run, tmp_path, monkeypatch, capsys, moment, error
):
    def failing(function):
        def fail(*arguments, **keywords):
            if moment == "write":
                function(*arguments, **keywords)
                assert os.listdir(tmp_path)
            raise error

        return fail

    where, name = {
        "read": (_orbax_checkpoints, "read"),
        "write": (_orbax_checkpoints, "write"),
        "json": (Path, "write_text"),
        "rename": (Path, "rename"),
    }[moment]
    monkeypatch.setattr(where, name, failing(getattr(where, name)))
    interrupted = isinstance(error, KeyboardInterrupt)
    status = 130 if interrupted else 1
    said = refused(capsys, status, run, "--output", tmp_path / "merged")
    assert said == ("interrupted: nothing was written" if interrupted else str(error))
    assert not os.listdir(tmp_path)


ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}
ENVIRONMENT.pop("XLA_FLAGS", None)


def test_as_a_program_on_another_number_of_devices(tmp_path):
    """Saved from eight, averaged on one."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()), "x")
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    tree = {"w": jax.device_put(jnp.arange(16.0), sharding)}
    tree["key"] = jax.device_put(jax.random.split(jax.random.key(0), 8), sharding)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "run" / "1", tree)
        checkpointer.save(tmp_path / "run" / "2", tree)
    command = [sys.executable, "-m", "asgd_optax.checkpoints", "average", "run"]
    command += ["--weights=-4,5", "--output=merged"]
    ended = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.decode().endswith("merged: of run the steps 1, 2\n")
    found = restored(tmp_path / "merged")
    assert bits(found["w"]) == bits(tree["w"])
    assert found["key"].dtype == tree["key"].dtype
    keys = [jax.random.key_data(t["key"]) for t in (found, tree)]
    np.testing.assert_array_equal(*keys)


def test_ended_from_outside(run, tmp_path):
    """As by a scheduler, in the middle of the reading and of the writing."""
    program = """
import os, signal, sys
from asgd_optax.checkpoints import __main__
from asgd_optax.checkpoints import _orbax_checkpoints
function = getattr(_orbax_checkpoints, sys.argv[1])
def ended(*arguments):
    function(*arguments)
    os.kill(os.getpid(), signal.SIGTERM)
    raise AssertionError("it went on")
setattr(_orbax_checkpoints, sys.argv.pop(1), ended)
__main__.run()
"""
    for moment in ("read", "write"):
        command = [sys.executable, "-c", program, moment, "average", run]
        command.append(f"--output={tmp_path / 'merged'}")
        ended = subprocess.run(command, env=ENVIRONMENT, capture_output=True)
        assert ended.returncode == 128 + signal.SIGTERM, ended.stderr
        assert not os.listdir(tmp_path)


def test_without_orbax(run, tmp_path, monkeypatch, capsys):
    for name in ("_combine_checkpoints", "_orbax_checkpoints"):
        monkeypatch.delitem(sys.modules, f"asgd_optax.{name}", raising=False)
        monkeypatch.delattr(asgd_optax, name, raising=False)
    monkeypatch.setitem(sys.modules, "orbax.checkpoint", None)
    said = refused(capsys, 1, run, "--output", tmp_path / "x")
    assert "pip install 'asgd_optax[checkpoints]'" in said


if hasattr(os, "fork"):

    def test_killed_at_any_moment(run, tmp_path):
        kills = 20
        module = [sys.executable, "-m", "tests.command_process"]
        arguments = [str(run), str(tmp_path), str(kills)]
        ended = subprocess.run(
            [*module, *arguments], cwd=ROOT, env=ENVIRONMENT, capture_output=True
        )
        assert ended.returncode == 0, ended.stderr
        wanted = average_checkpoints([run / str(step) for step in STEPS])
        there = {path.name: path for path in tmp_path.iterdir()}
        outputs = {"whole", "before", "after", *map(str, range(kills))}
        assert {"whole", "before", "after"} <= there.keys()
        for name in outputs & there.keys():
            found = restored(there[name])
            assert bits(found["params"]) == bits(wanted["params"])
            made_from = json.loads((there[name] / "averaged_from.json").read_text())
            assert len(made_from["checkpoints"]) == 3
        # The others were killed in time; what they left, Orbax takes for unfinished.
        assert not outputs <= there.keys()
        left = there.keys() - outputs
        assert any(name.startswith("before.") for name in left)
        for name in left:
            assert ocp.utils.is_tmp_checkpoint(there[name])
