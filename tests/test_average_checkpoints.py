# SPDX-License-Identifier: Apache-2.0
"""`average_checkpoints`: what it reads, sums, restores and compares."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

import asgd_optax.checkpoints
from asgd_optax import average_iterates, averaged_params
from asgd_optax.checkpoints import average_checkpoints, decay_coefficients
from tests.support import bits, enable_x64

COEFFICIENTS = [0.5, -1.25, 1.75]
OPTIONS = ocp.CheckpointManagerOptions(step_prefix="ckpt", step_format_fixed_length=8)


def save(path, tree):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, tree)
    return path


def save_step(folder, step, **kwargs):
    with ocp.CheckpointManager(folder, options=OPTIONS) as manager:
        manager.save(step, **kwargs)
    return folder / f"ckpt_{step:08d}"


def make_tree(i):
    """Return a tree with every kind of leaf; trees differ only in their values."""
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
        "a/b": jnp.asarray(matrix[0], jnp.float32),
        "count": i,
        "rate": i / 2,
    }


def key_data(tree):
    """Return `tree` with the data of its typed PRNG keys."""

    def f(leaf):
        is_key = jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.prng_key)
        return jax.random.key_data(leaf) if is_key else leaf

    return jax.tree.map(f, tree)


def assert_average(found, trees):
    """Assert that `found` is the sum of the trees, to the rounding of its dtype."""
    leaves = [jax.tree.leaves(key_data(tree)) for tree in trees]
    found = jax.tree.leaves(found)
    assert len(found) == len(leaves[0])
    for actual, *terms in zip(found, *leaves, strict=True):
        terms = [np.asarray(term) for term in terms]
        assert actual.dtype == terms[0].dtype
        assert actual.shape == terms[0].shape
        if not jnp.issubdtype(actual.dtype, jnp.inexact):
            np.testing.assert_array_equal(actual, terms[-1])
            continue
        expected = sum(
            c * term.astype(np.complex128)
            for c, term in zip(COEFFICIENTS, terms, strict=True)
        )
        # One rounding of each product and sum, and one of the result.
        summed_in = np.float32 if isinstance(actual, jax.Array) else np.float64
        sizes = [abs(c * t) for c, t in zip(COEFFICIENTS, terms, strict=True)]
        error = 2 * len(terms) * np.finfo(summed_in).eps * sum(sizes)
        error = error + 2 * float(jnp.finfo(actual.dtype).eps) * abs(expected)
        actual = np.asarray(actual).astype(np.complex128)
        assert np.all(abs(actual - expected) <= error)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Return the folders of three checkpoints and what was saved in them."""
    folder = tmp_path_factory.mktemp("run")
    trees = [make_tree(i) for i in range(3)]
    return [save(folder / str(i), tree) for i, tree in enumerate(trees)], trees


def test_average_has_every_kind_of_leaf_as_numpy(run):
    paths, trees = run
    found = average_checkpoints(paths, COEFFICIENTS)
    assert_average(found, trees)
    assert all(isinstance(x, np.ndarray | np.generic) for x in jax.tree.leaves(found))
    assert found["state"][0].keys() == {"step", "none", "empty"}
    assert found["state"][0]["none"] is None
    assert found["count"] == 2
    np.testing.assert_array_equal(found["rng"]["typed"], [0, 2])


def test_coefficients_are_uniform_by_default_and_paths_may_be_relative(
    run, monkeypatch
):
    paths, trees = run
    monkeypatch.chdir(paths[0].parent)
    found = average_checkpoints(["0", Path("1"), "./2"], part="params/float32")
    expected = np.mean([np.float64(t["params"]["float32"]) for t in trees], 0)
    np.testing.assert_allclose(found, expected, rtol=2e-7)
    assert found.dtype == np.float32


def test_average_of_one_checkpoint_is_exact(run):
    paths, trees = run
    for several in ([paths[1]], (paths[1],) * 3, iter([paths[1]])):
        found = average_checkpoints(several)
        assert bits(found["params"]) == bits(trees[1]["params"])


@pytest.mark.parametrize(
    ("part", "keys"),
    [
        ("params", ["params"]),
        ("state/1/float64", ["state", 1, "float64"]),
        (("state", 1), ["state", 1]),
        (["state", "0"], ["state", 0]),
        ("rate", ["rate"]),
        ("rng/typed", ["rng", "typed"]),
        ((), []),
        (("a/b",), ["a/b"]),
    ],
    ids=str,
)
def test_part_selects_a_subtree(run, part, keys):
    paths, trees = run
    for key in keys:
        trees = [tree[key] for tree in trees]
    assert_average(average_checkpoints(paths, COEFFICIENTS, part=part), trees)


def test_part_without_arrays_is_returned_as_saved(run):
    paths, _ = run
    assert average_checkpoints(paths, part="state/0/empty") == ()
    assert average_checkpoints(paths, part="state/0/none") is None


if sys.platform == "linux":

    def test_only_the_part_is_read(tmp_path):
        def bytes_read():
            counts = Path("/proc/self/io").read_text()
            return int(counts.splitlines()[0].removeprefix("rchar: "))

        numbers = np.random.default_rng(0).standard_normal(2**22)
        path = save(tmp_path / "1", {"params": np.ones(100), "other": numbers})
        before = bytes_read()
        average_checkpoints([path], part="params")
        part = bytes_read() - before
        average_checkpoints([path])
        whole = bytes_read() - before - part
        assert whole > numbers.nbytes / 2
        assert part < numbers.nbytes / 8


def test_step_with_one_item_needs_no_item_name(run, tmp_path):
    _, trees = run
    first, second, third = (ocp.args.StandardSave(tree) for tree in trees)
    named = ocp.args.Composite(train=third)
    paths = [
        save_step(tmp_path / "unnamed", 10, args=first),
        save_step(tmp_path / "measured", 20, args=second, metrics={"a": 1.0}),
        save_step(tmp_path / "named", 30, args=named),
    ]
    for part, of in ((None, trees), ("params", [tree["params"] for tree in trees])):
        assert_average(average_checkpoints(paths, COEFFICIENTS, part=part), of)
    found = average_checkpoints(paths[2:], part="train/params")
    assert bits(found) == bits(trees[2]["params"])


def test_step_with_several_items_needs_an_item_name(run, tmp_path):
    _, trees = run
    items = [
        ocp.args.Composite(
            weights=ocp.args.StandardSave(tree["params"]),
            state=ocp.args.PyTreeSave(tree["state"]),
            config=ocp.args.JsonSave({"i": 1}),
        )
        for tree in trees
    ]
    paths = [save_step(tmp_path / "run", i, args=item) for i, item in enumerate(items)]
    found = average_checkpoints(paths, COEFFICIENTS, part="weights")
    assert_average(found, [tree["params"] for tree in trees])
    found = average_checkpoints(paths, COEFFICIENTS, part="state/1/float64")
    assert_average(found, [tree["state"][1]["float64"] for tree in trees])
    for part in (None, "params/float32"):
        with pytest.raises(ValueError, match="must begin with 'state', 'weights'"):
            average_checkpoints(paths, part=part)


def test_average_of_nnx_states(tmp_path):
    """Average a model and the average that its optimizer keeps."""

    class Model(nnx.Module):
        def __init__(self):
            self.layers = nnx.List([nnx.Linear(3, 2, rngs=nnx.Rngs(0))])

    def trained(steps):
        model = Model()
        tx = optax.chain(optax.sgd(0.1), average_iterates())
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        for _ in range(steps):
            optimizer.update(model, jax.tree.map(jnp.ones_like, nnx.state(model)))
        return {"model": nnx.state(model), "opt_state": optimizer.opt_state}

    states = [trained(steps) for steps in (1, 4)]
    paths = [save(tmp_path / str(i), state) for i, state in enumerate(states)]
    like = states[0]["model"]
    found = average_checkpoints(paths, part="model", like=like)
    nnx.update(Model(), found)
    means = [averaged_params(state["opt_state"]) for state in states]
    found_mean = average_checkpoints(paths, part="opt_state/1/average", like=means[0])
    for average, first, second in (
        (found, like, states[1]["model"]),
        (found_mean, *means),
    ):
        expected = jax.tree.map(lambda a, b: (a + b) / 2, first, second)
        assert jax.tree.structure(average) == jax.tree.structure(first)
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), average, expected
        )


def on_mesh(shape, tree, *spec):
    devices = np.array(jax.devices()[: np.prod(shape)]).reshape(shape)
    sharding = NamedSharding(Mesh(devices, ("x", "y")), PartitionSpec(*spec))
    return jax.tree.map(lambda x: jax.device_put(x, sharding), tree)


@pytest.mark.parametrize("abstract", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_like_restores_onto_another_mesh(abstract, dtype, tmp_path):
    """Save from eight devices, restore onto eight, four and two."""
    trees = [
        {"a": {"b": jax.random.normal(jax.random.key(i), (8, 16), dtype)}}
        for i in range(3)
    ]
    paths = [
        save(tmp_path / str(i), on_mesh((4, 2), tree, "x", "y"))
        for i, tree in enumerate(trees)
    ]
    for shape, spec in [((4, 2), ("y", "x")), ((2, 2), ("x",)), ((2, 1), (None, "x"))]:
        like = on_mesh(shape, trees[0], *spec)
        sharding = like["a"]["b"].sharding
        if abstract:
            like = jax.tree.map(ocp.tree.to_shape_dtype_struct, like)
        found = average_checkpoints(paths, COEFFICIENTS, like=like)
        assert_average(found, trees)
        assert found["a"]["b"].sharding == sharding
        assert bits(average_checkpoints(paths[:1], like=like)) == bits(trees[0])


def test_like_decides_the_kind_of_each_leaf(run):
    """Restore onto a device, as NumPy without a sharding, as keys and as integers."""
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
    assert found["params"]["complex"].sharding == sharding
    assert type(found["params"]["float16"]) is np.ndarray
    assert type(found["state"][1]["float64"]) is np.ndarray
    assert found["rng"]["typed"].dtype == jax.random.key(0).dtype
    assert type(found["rate"]) is np.float64
    assert type(found["count"]) is np.int64
    assert_average(key_data(found), trees)

    key = jax.eval_shape(lambda: jax.random.key(0))
    found = average_checkpoints(paths, part="rng/typed", like=key)
    assert bits(jax.random.key_data(found)) == bits(np.array([0, 2], np.uint32))
    like = {"typed": np.zeros(2, np.uint32), "raw": jnp.zeros(2, jnp.uint32)}
    found = average_checkpoints(paths, part="rng", like=like)
    assert bits(found["typed"]) == bits(np.array([0, 2], np.uint32))
    assert isinstance(found["typed"], np.ndarray)
    assert isinstance(found["raw"], jax.Array)
    like = jax.device_put(jnp.zeros(2, jnp.uint32), sharding)
    found = average_checkpoints(paths, part="rng/typed", like=like)
    assert found.sharding == sharding
    assert bits(found) == bits(np.array([0, 2], np.uint32))


SAVED = {"a": np.ones((2, 3), np.float32), "b": [np.ones(2), np.arange(2)], "c": 1.5}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"d": np.ones(1)}, "unexpected in {}: ['d']"),
        ({"b": [np.ones(2)]}, "missing from {}: ['b']['1']"),
        (
            {"a": np.ones((3, 2), np.float32)},
            "{}['a'] has shape (3, 2), but {first}['a'] has shape (2, 3)",
        ),
        ({"a": np.ones((2, 3))}, "{}['a'] is float64, but {first}['a'] is float32"),
        ({"c": 1}, "{}['c'] is int64, but {first}['c'] is float64"),
    ],
)
def test_leaf_that_differs_is_named_before_reading(
    change, message, tmp_path, monkeypatch
):
    first = save(tmp_path / "first", {"p": SAVED})
    other = save(tmp_path / "other", {"p": SAVED | change})
    monkeypatch.setattr("asgd_optax.checkpoints._orbax.read", None)
    names = {"first": f"{first}['p']"}
    expected = re.escape(message.format(f"{other}['p']", **names))
    with pytest.raises(ValueError, match=expected):
        average_checkpoints([first, first, other], part="p")
    expected = re.escape(message.format("like", **names))
    with pytest.raises(ValueError, match=expected):
        average_checkpoints([first], part="p", like=SAVED | change)


def test_like_of_64_bits_needs_x64(tmp_path):
    path = save(tmp_path / "1", {"w": np.arange(3.0)})
    sharding = SingleDeviceSharding(jax.devices()[0])
    like = {"w": jax.ShapeDtypeStruct((3,), np.float64, sharding=sharding)}
    with pytest.raises(ValueError, match=r"like\['w'\] is float32, but .* is float64"):
        average_checkpoints([path], like=like)
    with enable_x64(True):
        found = average_checkpoints([path], like=like)["w"]
        assert isinstance(found, jax.Array)
        assert found.dtype == np.float64


def test_like_with_a_key_raises_for_saved_integers(tmp_path):
    path = save(tmp_path / "1", {"k": jax.random.PRNGKey(0)})
    with pytest.raises(ValueError, match=re.escape(f"PRNG key at k, but {path} has")):
        average_checkpoints([path], like={"k": jax.random.key(0)})


def test_path_without_a_finished_checkpoint_is_named(run, tmp_path):
    paths, _ = run
    missing, empty = tmp_path / "missing", tmp_path / "empty"
    empty.mkdir()
    unfinished = tmp_path / "3.orbax-checkpoint-tmp-1234"
    shutil.copytree(paths[1], unfinished)
    broken = shutil.copytree(paths[1], tmp_path / "broken")
    (broken / "_METADATA").write_text("{")
    for path, error, message in (
        (missing, FileNotFoundError, f"no checkpoint folder {missing}"),
        (empty, ValueError, f"{empty} is not an Orbax checkpoint"),
        (unfinished, ValueError, f"{unfinished} is unfinished"),
        (broken, ValueError, f"cannot read the metadata of {broken}"),
    ):
        with pytest.raises(error, match=re.escape(message)):
            average_checkpoints([*paths, path])


@pytest.mark.parametrize("like", [None, {"w": jnp.ones(10**5)}])
def test_checkpoint_with_truncated_data_is_named(like, tmp_path):
    numbers = np.random.default_rng(0).random(10**5, np.float32)
    paths = [save(tmp_path / str(i), {"w": numbers}) for i in range(2)]
    data = max(paths[1].glob("**/d/*"), key=lambda path: path.stat().st_size)
    os.truncate(data, data.stat().st_size // 2)
    with pytest.raises(ValueError, match=re.escape(f"cannot read {paths[1]}")):
        average_checkpoints(paths, like=like)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("weights", "'weights' in {}; available: 'a/b', 'count', 'params', 'rate', 'r"),
        ("params/w", "'w' in {}['params']; available: 'bfloat16', 'complex', 'float16"),
        ("state/2", "'2' in {}['state']; available: '0', '1'"),
        ("state/-1", "'-1' in {}['state']"),
        ("rate/x", "'x' in {}['rate']; available: none"),
        ("", "'' in {}"),
    ],
)
def test_missing_part_is_named(run, part, message):
    paths, _ = run
    expected = re.escape("no key " + message.format(paths[0]))
    with pytest.raises(ValueError, match=expected):
        average_checkpoints(paths, part=part)


@pytest.mark.parametrize(
    ("paths", "coefficients", "error", "message"),
    [
        ("run/1", None, TypeError, "a sequence of paths; got the path 'run/1'"),
        (Path("run/1"), None, TypeError, "paths must be a sequence of paths; got"),
        ([], None, ValueError, "paths must be one or more; got none"),
        (["a"], [0.5, 0.5], ValueError, "got 1 paths but 2 coefficients"),
        (["a", "b"], [0.5, np.nan], ValueError, "coefficients must be finite"),
        (["a", "b"], ["1", "2"], TypeError, "coefficients must be real numbers"),
    ],
)
def test_bad_arguments_raise_before_reading(paths, coefficients, error, message):
    with pytest.raises(error, match=re.escape(message)):
        average_checkpoints(paths, coefficients)


if sys.platform == "linux":

    def test_memory_does_not_grow_with_the_number_of_checkpoints(tmp_path):
        """glibc keeps freed arrays of 4 MiB in every thread that has read some."""
        program = """
import sys
from pathlib import Path
from asgd_optax.checkpoints import average_checkpoints

def peak():
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024

large, small = ([Path(folder)] for folder in sys.argv[1:])
average_checkpoints(small)
before = peak()
average_checkpoints(large * 12)
print(peak() - before)
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
        assert int(out) < 4 * numbers.nbytes


def test_missing_orbax_is_named_with_the_extra(run, monkeypatch):
    monkeypatch.delitem(sys.modules, "asgd_optax.checkpoints._orbax", raising=False)
    monkeypatch.delattr(asgd_optax.checkpoints, "_orbax", raising=False)
    monkeypatch.setitem(sys.modules, "orbax.checkpoint", None)
    with pytest.raises(ModuleNotFoundError, match=r"orbax\.checkpoint.*\[checkpoints"):
        average_checkpoints(run[0])
    assert len(decay_coefficients(3)) == 3
