# SPDX-License-Identifier: Apache-2.0
"""`python -m asgd_optax.checkpoints`: what it averages, writes and leaves."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

import asgd_optax.checkpoints
from asgd_optax.checkpoints import _orbax, average_checkpoints, decay_coefficients
from asgd_optax.checkpoints.__main__ import main
from tests.support import bits

ROOT = Path(__file__).parents[1]
STEPS = [2, 10, 100]  # sorted by name they would be 10, 100, 2
PROGRAM = "python -m asgd_optax.checkpoints: error: "
# Without the eight devices of these tests.
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}


def make_state(step):
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
            manager.save(step, args=ocp.args.StandardSave(make_state(step)))
    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return save(tmp_path_factory.mktemp("run") / "run", STEPS)


def average(*arguments):
    main(["average", *map(str, arguments)])


def error_of(capsys, status, *arguments):
    """Run the command, which must exit with `status`; return its error."""
    with pytest.raises(SystemExit) as exited:
        average(*arguments)
    assert exited.value.code == status
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(PROGRAM)
    return error.removeprefix(PROGRAM)


def restore(path):
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(path)


def made_from(path):
    return json.loads((path / "averaged_from.json").read_text())


def test_output_is_a_checkpoint_like_the_averaged_ones(run, tmp_path, capsys):
    output = tmp_path / "merged"
    average(run, "--output", output)
    found, saved = restore(output), restore(run / "100" / "default")
    assert jax.tree.structure(found) == jax.tree.structure(saved)
    for actual, wanted in zip(*map(jax.tree.leaves, (found, saved)), strict=True):
        assert getattr(actual, "dtype", None) == getattr(wanted, "dtype", None)
    assert type(found["rate"]) is float
    keys = [jax.random.key_data(tree["keys"]["typed"]) for tree in (found, saved)]
    np.testing.assert_array_equal(*keys)
    folders = [run / str(step) for step in STEPS]
    expected = average_checkpoints(folders)
    assert bits(found["params"]) == bits(expected["params"])
    assert found["rate"] == expected["rate"]
    assert found["step"] == found["count"] == 100
    assert made_from(output) == {
        "checkpoints": [str(folder) for folder in folders],
        "coefficients": [1 / 3] * 3,
        "part": None,
    }
    assert os.listdir(tmp_path) == ["merged"]
    assert (
        capsys.readouterr().out
        == f"{output}: average of the steps 2, 10, 100 of {run}\n"
    )


@pytest.mark.parametrize(
    ("arguments", "steps", "coefficients"),
    [
        (["--last", 2], [10, 100], [0.5, 0.5]),
        ([10], [10], [1.0]),
        ([100, 2, "--weights=-4,5"], [2, 100], [-4.0, 5.0]),
        (["--weights", "linear"], STEPS, decay_coefficients(3)),
        (["--weights", "cosine", 2, 10], [2, 10], decay_coefficients(2, "cosine")),
        (["--weights=minus-sqrt"], STEPS, decay_coefficients(3, "minus_sqrt")),
        (["--weights", "0.5,.25,2.5e-1"], STEPS, [0.5, 0.25, 0.25]),
    ],
    ids=str,
)
def test_steps_and_weights_are_chosen(run, tmp_path, arguments, steps, coefficients):
    output = tmp_path / "merged"
    average(run, "--part", "params", *arguments, "--output", output)
    folders = [run / str(step) for step in steps]
    assert made_from(output)["checkpoints"] == list(map(str, folders))
    np.testing.assert_array_equal(made_from(output)["coefficients"], coefficients)
    assert made_from(output)["part"] == "params"
    expected = average_checkpoints(folders, coefficients, part="params")
    assert bits(restore(output)) == bits(expected)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"step_prefix": "ckpt"}, "ckpt_2"),
        ({"step_prefix": "a_b", "step_format_fixed_length": 3}, "a_b_002"),
    ],
)
def test_steps_may_have_other_names(options, name, tmp_path):
    run = save(tmp_path / "run", STEPS, **options)
    (run / "notes").mkdir()
    (run / "7.orbax-checkpoint-tmp-12").mkdir()
    average(run, "--part", "params", "--output", tmp_path / "merged")
    folders = made_from(tmp_path / "merged")["checkpoints"]
    assert len(folders) == 3
    assert folders[0] == str(run / name)


def test_output_may_be_the_item_of_a_manager_step(run, tmp_path):
    (tmp_path / "7").mkdir()
    average(run, "--part", "params", "--output", tmp_path / "7" / "default")
    with ocp.CheckpointManager(tmp_path) as manager:
        assert manager.latest_step() == 7
        found = manager.restore(7, args=ocp.args.StandardRestore())
    assert bits(found) == bits(restore(tmp_path / "7" / "default"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{run}"], "the following arguments are required: --output"),
        (["{tmp}/no", "--output={tmp}/x"], "argument RUN: no finished steps in {tmp}/"),
        (["{tmp}", "--output={tmp}/x"], "argument RUN: no finished steps in {tmp}"),
        (
            ["{run}", "3", "--output={tmp}/x"],
            "argument STEP: no finished step 3; finished steps in {run}: 2, 10, 100",
        ),
        (["{run}", "2", "2", "--output={tmp}/x"], "argument STEP: 2 is given twice"),
        (["{run}", "two", "--output={tmp}/x"], "argument STEP: invalid int value: 'tw"),
        (["{run}", "--last=4", "--output={tmp}/x"], "argument --last: got 4; finished"),
        (["{run}", "--last=0", "--output={tmp}/x"], "argument --last: got 0; finished"),
        (
            ["{run}", "2", "--last=1", "--output={tmp}/x"],
            "argument --last: not allowed with STEP",
        ),
        (["{run}", "--weights=1,2", "--output={tmp}/x"], "argument --weights: must be"),
        (["{run}", "--weights=sqrt", "--output={tmp}/x"], "argument --weights: must b"),
        (["{run}", "--weights=1,,nan", "--output={tmp}/x"], "argument --weights: must"),
        (["{run}", "--output={tmp}/a/x"], "argument --output: no folder {tmp}/a"),
        (["{run}", "--output={run}"], "argument --output: {run} exists"),
        (["{run}", "--output={tmp}/x", "--out=y"], "unrecognized arguments: --out=y"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_bad_argument_exits_with_2(run, tmp_path, capsys, arguments, message):
    names = {"run": run, "tmp": tmp_path}
    error = error_of(capsys, 2, *(argument.format(**names) for argument in arguments))
    assert error.startswith(message.format(**names))
    assert not os.listdir(tmp_path)


def test_bad_checkpoint_exits_with_1_and_is_named(tmp_path, capsys):
    run = save(tmp_path / "run", STEPS)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(run / "12", {"params": make_state(1)["params"], "empty": ()})
    (run / "11").mkdir()
    for arguments, error in (
        ([run, "2", "--part=x"], f"no key 'x' in {run / '2'}"),
        ([run, "2", "11"], f"{run / '11'} is not an Orbax checkpoint"),
        ([run, "2", "12"], f"{run / '12'} and {run / '2'} differ in structure"),
        ([run, "12", "--part=empty"], "Orbax cannot save the average"),
        ([run / "12"], f"{run / '12'} is a single checkpoint"),
    ):
        found = error_of(capsys, 1, *arguments, "--output", tmp_path / "x")
        assert found.startswith(error)
    save(tmp_path / "run", [10], step_format_fixed_length=4)
    found = error_of(capsys, 1, run, "--output", tmp_path / "x")
    assert found.endswith("are the same step")
    assert os.listdir(tmp_path) == ["run"]


def test_missing_orbax_exits_with_1(run, tmp_path, monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "asgd_optax.checkpoints._orbax", raising=False)
    monkeypatch.delattr(asgd_optax.checkpoints, "_orbax", raising=False)
    monkeypatch.setitem(sys.modules, "orbax.checkpoint", None)
    error = error_of(capsys, 1, run, "--output", tmp_path / "x")
    assert "[checkpoints]'" in error


@pytest.mark.parametrize("kind", ["file", "folder", "full", "link"])
def test_output_that_appears_meanwhile_is_kept(
    run, tmp_path, monkeypatch, capsys, kind
):
    output, write = tmp_path / "merged", _orbax.write

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

    monkeypatch.setattr(_orbax, "write", meanwhile)
    error = error_of(capsys, 1, run, "--output", output)
    assert error == f"{output} exists and is not overwritten"
    assert os.listdir(tmp_path) == ["merged"]
    assert output.is_symlink() == (kind == "link")
    assert output.is_file() == (kind == "file")
    if output.is_dir():
        assert os.listdir(output) == (["file"] if kind == "full" else [])


@pytest.mark.parametrize("moment", ["read", "write", "json", "rename"])
def test_error_leaves_nothing(run, tmp_path, monkeypatch, capsys, moment):
    where, name = {
        "read": (_orbax, "read"),
        "write": (_orbax, "write"),
        "json": (Path, "write_text"),
        "rename": (Path, "rename"),
    }[moment]
    function = getattr(where, name)

    def fail(*arguments, **keywords):
        if moment == "write":
            function(*arguments, **keywords)
        raise OSError("the disk is full")

    monkeypatch.setattr(where, name, fail)
    found = error_of(capsys, 1, run, "--output", tmp_path / "x")
    assert found == "the disk is full"
    assert not os.listdir(tmp_path)


def test_program_averages_on_another_number_of_devices(tmp_path):
    """Save from eight devices, average on one."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()), "x")
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    tree = {"w": jnp.arange(16.0), "key": jax.random.split(jax.random.key(0), 8)}
    tree = jax.device_put(tree, sharding)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "run" / "1", tree)
        checkpointer.save(tmp_path / "run" / "2", tree)
    command = [sys.executable, "-m", "asgd_optax.checkpoints", "average", "run"]
    command += ["--weights=-4,5", "--output=merged"]
    subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, check=True)
    found = restore(tmp_path / "merged")
    assert bits(found["w"]) == bits(tree["w"])
    assert found["key"].dtype == tree["key"].dtype
    keys = [jax.random.key_data(t["key"]) for t in (found, tree)]
    np.testing.assert_array_equal(*keys)


def run_with_signal(moment, signal_name, run, output):
    """Run the program, which sends itself a signal before or after a function."""
    program = """
import os, signal, sys
from pathlib import Path
from asgd_optax.checkpoints import __main__, _orbax
when, name, signal_name = sys.argv[1:4]
del sys.argv[1:4]
where = Path if name == "rename" else _orbax
function = getattr(where, name)
def patched(*arguments):
    if when == "before":
        os.kill(os.getpid(), getattr(signal, signal_name))
    result = function(*arguments)
    if when == "after":
        os.kill(os.getpid(), getattr(signal, signal_name))
    return result
setattr(where, name, patched)
__main__.run()
"""
    command = [sys.executable, "-c", program, *moment.split(), signal_name]
    command += ["average", run, "--part=params", f"--output={output}"]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("moment", "signal_name"),
    [("after read", "SIGTERM"), ("before write", "SIGINT"), ("after write", "SIGTERM")],
)
def test_interrupted_program_leaves_nothing_and_says_so(
    moment, signal_name, run, tmp_path
):
    ended = run_with_signal(moment, signal_name, run, tmp_path / "merged")
    assert ended.returncode == 128 + getattr(signal, signal_name)
    assert ended.stderr == f"{PROGRAM}interrupted; nothing was written\n"
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("moment", ["after read", "before rename", "after rename"])
def test_killed_program_leaves_a_whole_checkpoint_or_none(moment, run, tmp_path):
    output = tmp_path / "merged"
    ended = run_with_signal(moment, "SIGKILL", run, output)
    assert ended.returncode == -signal.SIGKILL
    assert output.exists() == (moment == "after rename")
    for left in set(tmp_path.iterdir()) - {output}:
        assert ocp.utils.is_tmp_checkpoint(left)
    if not output.exists():
        average(run, "--part=params", "--output", output)
    folders = [run / str(step) for step in STEPS]
    assert bits(restore(output)) == bits(average_checkpoints(folders, part="params"))
    assert len(made_from(output)["checkpoints"]) == 3
