# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that Orbax saved, averaged: what is read, compared and refused."""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

import asgd_optax
from asgd_optax import average_iterates, averaged_params
from asgd_optax.checkpoints import average_checkpoints, decay_coefficients
from asgd_optax.checkpoints._combine_checkpoints import combine_checkpoints
from asgd_optax.checkpoints._orbax_checkpoints import read
from tests.support import bits, enable_x64

COEFFICIENTS = [0.5, -1.25, 1.75]


def save(path, tree):
    """A folder as `StandardCheckpointer` writes it."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, tree)
    return path


def arrays(i):
    """Of every kind that a checkpoint holds; the i-th of several alike."""
    rng = np.random.default_rng(i)
    matrix = rng.standard_normal((4, 6))
    return {
        "params": {
            "float32": jnp.asarray(matrix, jnp.float32),
            "bfloat16": jnp.asarray(matrix, jnp.bfloat16),
            "float16": jnp.asarray(matrix, jnp.float16),
            "complex": jnp.asarray(matrix + 1j * matrix[::-1], jnp.complex64),
            "scalar": jnp.asarray(float(i), jnp.float32),
        },
        "state": (
            {"step": jnp.asarray(100 * i), "none": None, "empty": ()},
            {"float64": matrix, "mask": np.array([True, i % 2 == 0])},
        ),
        "rng": {"typed": jax.random.key(i), "raw": jax.random.PRNGKey(i + 10)},
        "count": i,
        "rate": i / 2,
    }


def expected(leaves, coefficients=COEFFICIENTS):
    """One leaf of several checkpoints, in float64 and rounded once; ints: the last."""
    leaf = np.asarray(leaves[-1])
    if not jnp.issubdtype(leaf.dtype, jnp.inexact):
        return leaf
    wide = np.complex128 if leaf.dtype.kind == "c" else np.float64
    terms = zip(coefficients, leaves, strict=True)
    return sum(c * np.asarray(x).astype(wide) for c, x in terms).astype(leaf.dtype)


def assert_average(found, trees):
    """`found` has the leaves of the trees' average, to a rounding."""
    assert len(jax.tree.leaves(found)) == len(jax.tree.leaves(trees[0]))
    for actual, *leaves in zip(
        jax.tree.leaves(found), *map(jax.tree.leaves, trees), strict=True
    ):
        if jnp.issubdtype(getattr(leaves[0], "dtype", None), jax.dtypes.prng_key):
            leaves = [jax.random.key_data(leaf) for leaf in leaves]
        wanted = expected(leaves)
        assert actual.dtype == wanted.dtype
        assert actual.shape == wanted.shape
        if jnp.issubdtype(wanted.dtype, jnp.inexact):
            eps = float(jnp.finfo(wanted.dtype).eps)
            np.testing.assert_allclose(
                *(np.asarray(x).astype(np.complex128) for x in (actual, wanted)),
                rtol=2 * eps,
                atol=1e-12,
            )
        else:
            np.testing.assert_array_equal(actual, wanted)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folders of three checkpoints, and what was saved."""
    folder = tmp_path_factory.mktemp("run")
    trees = [arrays(i) for i in range(3)]
    return [save(folder / str(i), tree) for i, tree in enumerate(trees)], trees


def test_every_kind_of_leaf(run):
    paths, trees = run
    found = average_checkpoints(paths, COEFFICIENTS)
    assert_average(found, trees)
    assert all(isinstance(x, np.ndarray | np.generic) for x in jax.tree.leaves(found))
    # As it lies there: in dicts and lists.
    assert found["state"][0].keys() == {"step", "none", "empty"}
    assert found["state"][0]["none"] is None
    assert found["count"] == 2
    np.testing.assert_array_equal(found["rng"]["typed"], [0, 2])
    assert found["rate"] == 0.5 * 0 - 1.25 * 0.5 + 1.75 * 1


def test_uniform_by_default(run):
    paths, trees = run
    found = average_checkpoints([str(path) for path in paths], part="params/float32")
    wanted = np.mean([np.float64(t["params"]["float32"]) for t in trees], 0)
    np.testing.assert_allclose(found, wanted, rtol=2e-7)
    assert found.dtype == np.float32


def test_one_path_and_paths_given_twice(run):
    paths, trees = run
    for several in ([paths[1]], (paths[1],) * 3, iter([paths[1]])):
        found = average_checkpoints(several)
        assert bits(found["params"]) == bits(trees[1]["params"])
    found = average_checkpoints([paths[0], paths[0], paths[2]], [-1.0, 1.0, 1.0])
    assert bits(found["params"]) == bits(trees[2]["params"])


def test_relative_paths(run, monkeypatch):
    paths, trees = run
    monkeypatch.chdir(paths[0].parent)
    assert_average(average_checkpoints(["0", Path("1"), "./2"], COEFFICIENTS), trees)


@pytest.mark.parametrize(
    ("part", "of"),
    [
        ("params", lambda tree: tree["params"]),
        ("state/1/float64", lambda tree: tree["state"][1]["float64"]),
        (("state", 1), lambda tree: tree["state"][1]),
        (["state", "0"], lambda tree: tree["state"][0]),
        ("rate", lambda tree: tree["rate"]),
        ("rng/typed", lambda tree: tree["rng"]["typed"]),
        ((), lambda tree: tree),
        (None, lambda tree: tree),
    ],
    # Not of the functions, whose names differ in every worker.
    ids=lambda value: "" if callable(value) else str(value),
)
def test_parts(run, part, of):
    paths, trees = run
    found = average_checkpoints(paths, COEFFICIENTS, part=part)
    assert_average(found, [of(tree) for tree in trees])


def test_a_part_without_arrays(run):
    paths, _ = run
    assert average_checkpoints(paths, part="state/0/empty") == ()
    assert average_checkpoints(paths, part="state/0/none") is None


def test_keys_with_a_slash(tmp_path):
    paths = [save(tmp_path / str(i), {"a/b": {"c": np.full(2, i)}}) for i in (1, 2)]
    found = average_checkpoints(paths, part=("a/b", "c"))
    np.testing.assert_array_equal(found, [2, 2])  # integers: the last


if sys.platform == "linux":

    def bytes_read():
        with open("/proc/self/io") as counts:
            return int(counts.readline().removeprefix("rchar: "))

    def test_no_other_part_is_read(tmp_path):
        numbers = np.random.default_rng(0).standard_normal(2**22)
        tree = {"params": np.ones(100), "other": numbers}
        path = save(tmp_path / "1", tree)
        before = bytes_read()
        average_checkpoints([path], part="params")
        part = bytes_read() - before
        average_checkpoints([path])
        whole = bytes_read() - before - part
        assert whole > numbers.nbytes / 2
        assert part < numbers.nbytes / 8


def manager_step(folder, step, **kwargs):
    with ocp.CheckpointManager(folder, options=OPTIONS) as manager:
        manager.save(step, **kwargs)
    return folder / f"ckpt_{step:08d}"


OPTIONS = ocp.CheckpointManagerOptions(step_prefix="ckpt", step_format_fixed_length=8)


def test_a_step_with_one_item(run, tmp_path):
    """Its name is Orbax's own, with or without metrics beside it; or one's own."""
    _, trees = run
    first, second, third = (ocp.args.StandardSave(tree) for tree in trees)
    unnamed = manager_step(tmp_path / "unnamed", 10, args=first)
    measured = manager_step(tmp_path / "measured", 20, args=second, metrics={"a": 1.0})
    named = manager_step(tmp_path / "named", 30, args=ocp.args.Composite(train=third))
    paths = [unnamed, measured, named]
    assert_average(average_checkpoints(paths, COEFFICIENTS), trees)
    found = average_checkpoints(paths, COEFFICIENTS, part="params")
    assert_average(found, [tree["params"] for tree in trees])
    for part in ("train", "train/params"):
        found = average_checkpoints([named], part=part)
        wanted = trees[2] if part == "train" else trees[2]["params"]
        assert bits(jax.tree.leaves(found)[1]) == bits(jax.tree.leaves(wanted)[1])


def test_a_step_with_several_items(run, tmp_path):
    _, trees = run
    paths = [
        manager_step(
            tmp_path / "run",
            i,
            args=ocp.args.Composite(
                weights=ocp.args.StandardSave(tree["params"]),
                state=ocp.args.PyTreeSave(tree["state"]),
                config=ocp.args.JsonSave({"i": i}),
            ),
        )
        for i, tree in enumerate(trees)
    ]
    found = average_checkpoints(paths, COEFFICIENTS, part="weights")
    assert_average(found, [tree["params"] for tree in trees])
    found = average_checkpoints(paths, COEFFICIENTS, part="state/1/float64")
    assert_average(found, [tree["state"][1]["float64"] for tree in trees])
    for part in (None, "params/float32"):
        message = "'state', 'weights': the first key of part must be one of them; got"
        with pytest.raises(ValueError, match=re.escape(f"{message} {part!r}")):
            average_checkpoints(paths, part=part)


def trained(model, tx, steps):
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    grads = jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param))
    for _ in range(steps):
        optimizer.update(model, grads)
    return {"model": nnx.state(model), "opt_state": optimizer.opt_state}


def test_what_nnx_saves(tmp_path):
    """A list of layers, BatchNorm's statistics, and an average in an optimizer."""
    tx = optax.chain(optax.sgd(0.1), average_iterates())

    class Model(nnx.Module):
        def __init__(self):
            rngs = nnx.Rngs(0)
            layers = [nnx.Linear(3, 2, rngs=rngs), nnx.BatchNorm(2, rngs=rngs)]
            self.layers = nnx.List(layers)

    states = [trained(Model(), tx, steps) for steps in (1, 4)]
    paths = [save(tmp_path / str(i), state) for i, state in enumerate(states)]
    found = average_checkpoints(paths, [-2, 3], part="model/layers/0/kernel/value")
    kernels = [
        np.asarray(state["model"]["layers"][0]["kernel"][...]) for state in states
    ]
    np.testing.assert_allclose(found, 3 * kernels[1] - 2 * kernels[0], rtol=1e-6)

    like = jax.tree.map(jnp.zeros_like, states[0]["model"])
    found = average_checkpoints(paths, [-2, 3], part="model", like=like)
    assert jax.tree.structure(found) == jax.tree.structure(like)
    np.testing.assert_allclose(
        found["layers"][0]["kernel"][...], 3 * kernels[1] - 2 * kernels[0], rtol=1e-6
    )
    nnx.update(Model(), found)

    like = averaged_params(states[0]["opt_state"])
    found = average_checkpoints(paths, part="opt_state/1/average", like=like)
    assert jax.tree.structure(found) == jax.tree.structure(like)
    means = [averaged_params(state["opt_state"]) for state in states]
    for actual, first, last in zip(*map(jax.tree.leaves, (found, *means)), strict=True):
        np.testing.assert_allclose(actual, (first + last) / 2, rtol=1e-6)


def on_mesh(shape, tree, spec):
    devices = np.array(jax.devices()[: np.prod(shape)]).reshape(shape)
    sharding = NamedSharding(Mesh(devices, ("x", "y")), PartitionSpec(*spec))
    return jax.tree.map(lambda x: jax.device_put(x, sharding), tree)


def matrices(i, dtype="float32"):
    rng = np.random.default_rng(i)
    return {"a": {"b": jnp.asarray(rng.standard_normal((8, 16)), dtype)}}


@pytest.mark.parametrize("abstract", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_onto_another_mesh(abstract, dtype, tmp_path):
    """Saved from eight devices; onto all, four and two of them in other layouts."""
    trees = [matrices(i, dtype) for i in range(3)]
    paths = [
        save(tmp_path / str(i), on_mesh((4, 2), tree, ("x", "y")))
        for i, tree in enumerate(trees)
    ]
    on_host = average_checkpoints(paths, COEFFICIENTS)
    assert_average(on_host, trees)
    for shape, spec in [((4, 2), ("y", "x")), ((2, 2), ("x",)), ((2, 1), (None, "x"))]:
        like = on_mesh(shape, matrices(9, dtype), spec)
        target = (
            jax.tree.map(ocp.tree.to_shape_dtype_struct, like) if abstract else like
        )
        found = average_checkpoints(paths, COEFFICIENTS, like=target)
        assert_average(found, trees)
        assert found["a"]["b"].sharding == like["a"]["b"].sharding
        assert bits(average_checkpoints(paths[:1], like=target)) == bits(trees[0])


def test_targets_of_many_kinds(run):
    """Typed nodes; NumPy where there is no sharding; keys typed, and as integers."""
    paths, trees = run
    sharding = SingleDeviceSharding(jax.devices()[5])
    like = {
        **trees[0],
        "params": {
            name: jax.ShapeDtypeStruct(
                x.shape, x.dtype, sharding=None if name == "float16" else sharding
            )
            for name, x in trees[0]["params"].items()
        },
    }
    found = average_checkpoints(paths, COEFFICIENTS, like=like)
    assert jax.tree.structure(found) == jax.tree.structure(like)
    assert type(found["state"]) is tuple
    assert found["params"]["complex"].sharding == sharding
    assert type(found["params"]["float16"]) is np.ndarray
    assert type(found["state"][1]["float64"]) is np.ndarray
    assert found["rng"]["typed"].dtype == jax.random.key(0).dtype
    assert type(found["rate"]) is np.float64
    assert type(found["count"]) is np.int64
    found["rng"]["typed"] = jax.random.key_data(found["rng"]["typed"])
    assert_average(found, trees)

    key = jax.eval_shape(lambda: jax.random.key(0))
    found = average_checkpoints(paths, part="rng/typed", like=key)
    assert bits(jax.random.key_data(found)) == bits(np.array([0, 2], np.uint32))
    assert found.devices() == {jax.devices()[0]}

    like = {"typed": np.zeros(2, np.uint32), "raw": jnp.zeros(2, jnp.uint32)}
    found = average_checkpoints(paths, part="rng", like=like)
    assert bits(found["typed"]) == bits(np.array([0, 2], np.uint32))
    assert isinstance(found["typed"], np.ndarray)
    assert isinstance(found["raw"], jax.Array)
    like = {"typed": jax.device_put(like["raw"], sharding), "raw": like["typed"]}
    found = average_checkpoints(paths, part="rng", like=like)
    assert found["typed"].sharding == sharding
    assert bits(found["typed"]) == bits(np.array([0, 2], np.uint32))
    assert isinstance(found["raw"], np.ndarray)


SAVED = {"a": np.ones((2, 3), np.float32), "b": [np.ones(2), np.arange(2)], "c": 1.5}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"d": np.ones(1)}, " has a leaf 'p/d', which {} has not"),
        ({"b": np.ones(2)}, " has no leaf 'p/b/0', which {} has"),
        ({"b": [np.ones(2)]}, " has no leaf 'p/b/1', which {} has"),
        (
            {"a": np.ones((3, 2), np.float32)},
            ": 'p/a' has shape (3, 2), that of {} (2, 3)",
        ),
        ({"a": np.ones((2, 3))}, ": 'p/a' has dtype float64, that of {} float32"),
        (
            {"b": [np.ones(2), np.ones(2, np.int32)]},
            ": 'p/b/1' has dtype int32, that of {} int64",
        ),
        ({"c": 1}, ": 'p/c' has dtype int64, that of {} float64"),
    ],
)
def test_what_differs_is_named_before_anything_is_read(
    change, message, tmp_path, monkeypatch
):
    first = save(tmp_path / "first", {"p": SAVED})
    other = save(tmp_path / "other", {"p": SAVED | change})

    def refuse(*_):
        raise AssertionError("something was read")

    monkeypatch.setattr("asgd_optax.checkpoints._orbax_checkpoints.read", refuse)
    message = message.format(first)
    with pytest.raises(ValueError, match=re.escape(f"{other}{message}")):
        average_checkpoints([first, first, other], part="p")
    with pytest.raises(ValueError, match=re.escape(f"{other}{message}")):
        average_checkpoints([first, other], part="p")
    with pytest.raises(ValueError, match=re.escape(f"like{message}")):
        average_checkpoints([first], part="p", like=SAVED | change)


def test_a_target_is_not_padded_nor_cut_nor_cast(tmp_path):
    path = save(tmp_path / "1", {"w": jnp.ones((4, 4))})
    for like in (jnp.ones((4, 8)), jnp.ones((2, 4)), jnp.ones((4, 4), jnp.bfloat16)):
        with pytest.raises(ValueError, match="like: 'w' has"):
            average_checkpoints([path], like={"w": like})


def test_a_target_of_64_bits(tmp_path):
    """Of NumPy, or refused where JAX would make 32 of them."""
    path = save(tmp_path / "1", {"w": np.arange(3.0)})
    sharding = SingleDeviceSharding(jax.devices()[0])
    like = {"w": jax.ShapeDtypeStruct((3,), np.float64, sharding=sharding)}
    with pytest.raises(ValueError, match="like: 'w' is float64, of which JAX makes no"):
        average_checkpoints([path], like=like)
    with enable_x64(True):
        found = average_checkpoints([path], like=like)["w"]
        assert isinstance(found, jax.Array)
        assert found.dtype == np.float64
    like = {"w": jax.ShapeDtypeStruct((3,), np.float64)}
    assert average_checkpoints([path], like=like)["w"].dtype == np.float64


def test_a_key_is_not_made_of_integers(tmp_path):
    path = save(tmp_path / "1", {"k": jax.random.PRNGKey(0)})
    with pytest.raises(
        ValueError,
        match=re.escape(f"'k' is a key of random numbers, that of {path} is"),
    ):
        average_checkpoints([path], like={"k": jax.random.key(0)})


def test_what_is_not_there(run, tmp_path):
    paths, _ = run
    missing = tmp_path / "missing"
    with pytest.raises(FileNotFoundError, match=re.escape(str(missing))):
        average_checkpoints([*paths, missing])
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(
        ValueError, match=re.escape(f"{file} is no checkpoint, but a f")
    ):
        average_checkpoints([*paths, file])
    for folder in (tmp_path, tmp_path / "other"):
        folder.mkdir(exist_ok=True)
        with pytest.raises(ValueError, match=re.escape(f"{folder} is no checkpoint:")):
            average_checkpoints([*paths, folder])


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("weights", "no 'weights' in its tree: there is 'count', 'params', 'rate',"),
        ("params/w", "no 'w' in params: there is 'bfloat16', 'complex', 'float16',"),
        ("state/2", "no '2' in state: there is '0', '1'"),
        ("state/-1", "no '-1' in state"),
        ("rate/x", "no 'x' in rate: there is nothing below it"),
        ("params/", "no '' in params"),
        ("", "no '' in its tree"),
    ],
)
def test_a_part_that_is_not_there(run, part, message):
    paths, _ = run
    with pytest.raises(ValueError, match=re.escape(f"{paths[0]} has {message}")):
        average_checkpoints(paths, part=part)


def test_an_unfinished_save(run, tmp_path):
    paths, _ = run
    unfinished = tmp_path / "3.orbax-checkpoint-tmp-1234"
    shutil.copytree(paths[1], unfinished)
    with pytest.raises(ValueError, match=re.escape(f"{unfinished} is unfinished")):
        average_checkpoints([*paths, unfinished])


def test_broken_metadata(run, tmp_path):
    paths, _ = run
    for name, text in [("no_json", "{"), ("other_json", json.dumps({"a": 1}))]:
        broken = shutil.copytree(paths[1], tmp_path / name)
        (broken / "_METADATA").write_text(text)
        message = f"{broken}: its metadata cannot be read"
        with pytest.raises(ValueError, match=re.escape(message)):
            average_checkpoints([*paths, broken])


@pytest.mark.parametrize("how", ["cut", "gone"])
def test_broken_data(how, tmp_path):
    trees = [{"w": jnp.asarray(np.random.default_rng(i).random(10**5))} for i in (0, 1)]
    paths = [save(tmp_path / str(i), tree) for i, tree in enumerate(trees)]
    data = max(paths[1].glob("**/d/*"), key=lambda path: path.stat().st_size)
    if how == "cut":
        os.truncate(data, data.stat().st_size // 2)
    else:
        data.unlink()
    for like in (None, trees[0]):
        with pytest.raises(ValueError, match=re.escape(f"{paths[1]} cannot be read")):
            average_checkpoints(paths, like=like)


@pytest.mark.parametrize(
    ("paths", "coefficients", "error", "message"),
    [
        ("run/1", None, TypeError, "paths must be several; got 'run/1'"),
        (Path("run/1"), None, TypeError, "paths must be several; got PosixPath("),
        ([], None, ValueError, "paths must be one or more; got none"),
        (["a"], [0.5, 0.5], ValueError, "there are 1 paths, and 2 coefficients"),
        (["a", "b"], 0.5, ValueError, "one or more numbers in a row; got shape ()"),
    ],
)
def test_bad_arguments(paths, coefficients, error, message):
    with pytest.raises(error, match=re.escape(message)):
        average_checkpoints(paths, coefficients)


def test_coefficients_are_checked_before_anything_is_read(run, monkeypatch):
    paths, _ = run
    monkeypatch.setattr("asgd_optax.checkpoints._orbax_checkpoints.find_part", None)
    with pytest.raises(ValueError, match="coefficients must be finite"):
        average_checkpoints(paths, [1.0, np.nan, 0.0])
    with pytest.raises(TypeError, match="coefficients must be real numbers"):
        average_checkpoints(paths, ["1", "2", "3"])
    with pytest.raises(TypeError, match="part must be a string or a tuple of keys"):
        average_checkpoints(paths, part=3)


@pytest.mark.parametrize("groups", [1, 4])
def test_what_is_held(groups, tmp_path, monkeypatch):
    """Of a checkpoint that is one group, none beside it; else two groups at a time."""
    trees = [{str(n): np.full(8, float(n + i)) for n in range(12)} for i in range(3)]
    paths = [save(tmp_path / str(i), tree) for i, tree in enumerate(trees)]
    earlier, begun = [], []

    def alive(at_most):
        """The groups held; a thread that has read has a moment to let go of them."""
        for _ in range(200):
            held = [refs for refs in earlier if any(ref() is not None for ref in refs)]
            if len(held) <= at_most:
                break
            time.sleep(0.01)
        return len(held)

    def recording(part, leaves, targets=None):
        begun.append((part.path, *leaves))
        # In a thread of its own it may begin before the one but last is let go.
        at_most = 0 if groups == 1 or targets else 2
        assert alive(at_most) <= at_most
        found = read(part, leaves, targets)
        earlier.append([weakref.ref(value) for value in found.values()])
        return found

    monkeypatch.setattr("asgd_optax.checkpoints._orbax_checkpoints.read", recording)
    monkeypatch.setattr("asgd_optax.checkpoints._combine_checkpoints._LEAST", 1)
    monkeypatch.setattr("asgd_optax.checkpoints._combine_checkpoints._GROUPS", groups)
    told = []
    for like in (None, trees[0]):
        found = combine_checkpoints(
            paths, COEFFICIENTS, like=like, progress=lambda *told_: told.append(told_)
        )
        assert_average(found, trees)
        assert alive(0) == 0
        # All leaves of all checkpoints, once, a group after another.
        assert len(begun) == len(told) == 3 * groups
        assert len({leaf for _, *leaves in begun for leaf in leaves}) == 12
        assert len({(path, leaf) for path, *leaves in begun for leaf in leaves}) == 36
        assert [path.name for path, *_ in begun] == ["0", "1", "2"] * groups
        size = 12 * 8 * 8
        assert told == [
            (n * size // groups, 3 * size) for n in range(1, 3 * groups + 1)
        ]
        for kept in (earlier, begun, told):
            kept.clear()


def test_a_group_of_more_than_half_is_not_read_ahead(tmp_path, monkeypatch):
    """It would be held together with another one."""
    path = save(tmp_path / "1", {"a": np.ones(1), "b": np.ones(100)})
    threads = []

    def recording(*arguments):
        threads.append(threading.current_thread())
        return read(*arguments)

    monkeypatch.setattr("asgd_optax.checkpoints._orbax_checkpoints.read", recording)
    monkeypatch.setattr("asgd_optax.checkpoints._combine_checkpoints._LEAST", 1)
    monkeypatch.setattr("asgd_optax.checkpoints._combine_checkpoints._GROUPS", 101)
    average_checkpoints([path])
    assert threads == 2 * [threading.current_thread()]


def test_a_reader_that_fails(run, monkeypatch):
    """Its error comes through, from its thread too."""
    paths, _ = run

    def failing(part, *arguments):
        if part.path.name == "2":
            raise ValueError(f"{part.path} cannot be read")
        return read(part, *arguments)

    monkeypatch.setattr("asgd_optax.checkpoints._orbax_checkpoints.read", failing)
    for least in (1, 2**26):
        monkeypatch.setattr("asgd_optax.checkpoints._combine_checkpoints._LEAST", least)
        with pytest.raises(ValueError, match=re.escape(f"{paths[2]} cannot be read")):
            average_checkpoints(paths)


if platform.libc_ver()[0] == "glibc":

    def test_memory_does_not_grow_with_the_checkpoints(tmp_path):
        """Arrays of 4 MiB: what glibc keeps of them, unless it is asked."""
        program = """
import sys
from pathlib import Path
from asgd_optax.checkpoints import average_checkpoints, decay_coefficients

def peak():
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024

large, small = ([Path(folder)] for folder in sys.argv[1:])
average_checkpoints(small)
before = peak()
average_checkpoints(large)
one = peak() - before
average_checkpoints(large * 12)
print(one, peak() - before)
"""
        numbers = np.random.default_rng(0).random((16, 2**20), np.float32)
        large = {f"leaf {n}": row for n, row in enumerate(numbers)}
        small = {name: row[:1000] for name, row in large.items()}
        paths = [save(tmp_path / "large", large), save(tmp_path / "small", small)]
        out = subprocess.run(
            [sys.executable, "-c", program, *paths],
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
            stdout=subprocess.PIPE,
            check=True,
        ).stdout
        one, twelve = (int(number) / numbers.nbytes for number in out.split())
        # The sum, in float64, is twice what one is; reading takes up to twice as much.
        assert one > 3
        assert twelve < 5.5


def test_without_orbax(run, monkeypatch):
    """The error says what to install; the coefficients do without."""
    for name in ("_combine_checkpoints", "_orbax_checkpoints"):
        monkeypatch.delitem(sys.modules, f"asgd_optax.{name}", raising=False)
        monkeypatch.delattr(asgd_optax, name, raising=False)
    monkeypatch.setitem(sys.modules, "orbax.checkpoint", None)
    message = "needs orbax.checkpoint: pip install 'asgd_optax[checkpoints]'"
    with pytest.raises(ModuleNotFoundError, match=re.escape(message)):
        average_checkpoints(run[0])
    assert len(decay_coefficients(3)) == 3
