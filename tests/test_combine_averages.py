# SPDX-License-Identifier: Apache-2.0
"""`combine_averages`: accuracy, dtypes, shardings, one tree at a time, errors."""

import re
import weakref
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from asgd_optax import combine_averages
from tests.support import precision_of

# Terms of very different sizes that nearly cancel.
COEFFICIENTS = [1 / 3, -1234.5678, 1233.2345, np.pi, 1e-9, -0.1]
DTYPES = [jnp.bfloat16, *map(np.dtype, ["f2", "f4", "f8", "c8", "c16"])]


def similar_arrays(dtype, shape=(64,)):
    """Return one array per coefficient, close to each other as averages of a run."""
    rng = np.random.default_rng(0)
    base = rng.standard_normal(shape)
    arrays = [base + 1e-3 * rng.standard_normal(shape) for _ in COEFFICIENTS]
    if jnp.issubdtype(dtype, jnp.complexfloating):
        arrays = [x + 1j * np.flip(x) for x in arrays]
    return [np.asarray(x, dtype=dtype) for x in arrays]


def assert_rounded_sum(found, arrays, unit):
    """Assert the error of a sum: half a unit of the result, `unit` of each term."""
    for part in (np.real, np.imag):
        columns = zip(*(part(x).astype(np.float64) for x in arrays), strict=True)
        for value, column in zip(part(found), columns, strict=True):
            terms = [
                Fraction(c) * Fraction(float(x))
                for c, x in zip(COEFFICIENTS, column, strict=True)
            ]
            total, size = float(sum(terms)), float(sum(map(abs, terms)))
            half = float(jnp.finfo(found.dtype).eps) / 2 * abs(total)
            assert abs(float(value) - total) <= half + unit * size


# Six products and five additions, each rounded, as are the coefficients in float32.
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_jax_arrays_are_summed_in_float32_or_wider(dtype):
    arrays = similar_arrays(dtype)
    with precision_of(dtype):
        found = combine_averages(map(jnp.asarray, arrays), COEFFICIENTS)
        assert isinstance(found, jax.Array)
        assert found.dtype == dtype
        unit = 2.0**-53 if jnp.finfo(dtype).bits == 64 else 2.0**-24
        assert_rounded_sum(np.asarray(found), arrays, 8 * unit)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_numpy_arrays_are_summed_in_float64(dtype):
    arrays = similar_arrays(dtype)
    found = combine_averages(iter(arrays), COEFFICIENTS)
    assert type(found) is np.ndarray
    assert found.dtype == dtype
    assert_rounded_sum(found, arrays, 8 * 2.0**-53)


def test_longdouble_arrays_are_summed_in_their_own_width():
    tiny = np.finfo(np.longdouble).eps
    ones = np.ones(3, np.longdouble)
    found = combine_averages([ones, ones * tiny], [1.0, 1.0])
    assert found.dtype == np.longdouble
    np.testing.assert_array_equal(found, ones + tiny)


def test_large_numpy_arrays_are_summed_in_all_chunks():
    x = np.random.default_rng(0).standard_normal((3, 100_003)).astype(np.float32)
    found = combine_averages([x, x[::-1]], [2.0, 1.0])
    exact = 2 * x.astype(np.float64) + x[::-1]
    np.testing.assert_array_equal(found, exact.astype(np.float32))


@pytest.mark.parametrize("asarray", [np.asarray, jnp.asarray])
def test_result_has_the_structure_of_the_averages(asarray):
    tree = {"w": asarray([1.0, 2.0]), "none": None, "empty": asarray([])}
    found = combine_averages([tree] * 3, [0.25, 0.25, 0.5])
    assert jax.tree.structure(found) == jax.tree.structure(tree)
    np.testing.assert_array_equal(found["w"], tree["w"])
    assert found["empty"].shape == (0,)


def test_leaves_keep_their_types_and_other_leaves_come_from_the_last_tree():
    def tree(i):
        return {
            "jax": jnp.full((2, 3), i, jnp.bfloat16),
            "numpy": np.asfortranarray(np.full((3, 2), i, np.float32)),
            "strided": np.arange(12.0).reshape(3, 4)[:, ::2] * i,
            "scalar": np.float32(i),
            "python": float(i),
            "0-d": np.array(float(i)),
            "complex strided": (np.arange(6.0)[::2] + 1j) * i,
            "count": jnp.asarray(i),
            "mask": np.array([bool(i % 2)]),
            "key": jax.random.key(i),
            "name": f"step {i}",
        }

    found = combine_averages([tree(1), tree(2)], [-4, 5])
    expected = tree(6) | {k: tree(2)[k] for k in ("count", "mask", "key", "name")}
    for t in (found, expected):
        t["key"] = jax.random.key_data(t["key"])
    for name, leaf in expected.items():
        np.testing.assert_array_equal(found[name], leaf)
        assert isinstance(found[name], type(leaf))
        if name not in ("python", "name"):
            assert found[name].dtype == leaf.dtype
    assert type(found["numpy"]) is type(found["0-d"]) is np.ndarray


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("asarray", [np.asarray, jnp.asarray])
def test_infinities_and_nans_stay_in_their_elements(asarray, dtype):
    row = np.array([1.0, np.inf, -np.inf, np.nan, np.finfo(dtype).max, -0.0], dtype)
    with precision_of(dtype):
        found = combine_averages([asarray(row)] * 2, [2.0, 2.0])
        wanted = [4, np.inf, -np.inf, np.nan, np.inf, 0]
        np.testing.assert_array_equal(found, np.array(wanted, dtype))


@pytest.mark.parametrize("asarray", [np.asarray, jnp.asarray])
def test_nan_stays_in_its_part_of_a_complex_number(asarray):
    x = asarray(np.array([complex(np.inf, 1), complex(2, np.nan)], np.complex64))
    found = np.asarray(combine_averages([x, x], [1.0, 2.0]))
    np.testing.assert_array_equal(found.real, [np.inf, 6])
    np.testing.assert_array_equal(found.imag, [3, np.nan])


@pytest.mark.parametrize("asarray", [np.asarray, jnp.array])
def test_one_tree_of_a_generator_is_held_at_a_time(asarray):
    earlier = []

    def trees():
        for i in range(4):
            assert all(ref() is None for ref in earlier)
            leaf = asarray(np.ones(100, np.float32))
            earlier.append(weakref.ref(leaf))
            tree = [{"w": leaf, "count": asarray(i)}]
            del leaf
            yield tree.pop()

    found = combine_averages(trees(), [0.25] * 4)
    assert len(earlier) == 4
    np.testing.assert_array_equal(found["w"], np.ones(100))


def test_result_has_the_sharding_of_the_first_tree():
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("x", "y"))
    specs = [("x", "y"), ("x",), (), ("y", "x"), ("x", "y"), (None, "y")]
    arrays = similar_arrays(np.float32, (8, 4))
    trees = [
        jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))
        for x, spec in zip(arrays, specs, strict=True)
    ]
    trees[3] = arrays[3]
    found = combine_averages(trees, COEFFICIENTS)
    assert found.sharding == trees[0].sharding
    plain = combine_averages(map(jnp.asarray, arrays), COEFFICIENTS)
    np.testing.assert_array_equal(found, plain)
    device = jax.devices()[5]
    there = [jax.device_put(x, device) for x in arrays]
    assert combine_averages(there, COEFFICIENTS).devices() == {device}


if hasattr(jax, "memory"):  # older versions of jax do not distinguish memory spaces

    @pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
    def test_result_stays_in_host_memory(dtype):
        sharding = jax.sharding.SingleDeviceSharding(
            jax.devices()[0], memory_kind="pinned_host"
        )
        arrays = similar_arrays(dtype)
        there = [jax.device_put(x, sharding) for x in arrays]
        found = combine_averages(there, COEFFICIENTS)
        assert found.sharding == sharding
        plain = combine_averages(map(jnp.asarray, arrays), COEFFICIENTS)
        np.testing.assert_array_equal(found, plain)


def test_uncommitted_averages_give_an_uncommitted_sum():
    found = combine_averages([jnp.ones(3)], [2.0])
    there = jax.device_put(jnp.ones(3), jax.devices()[1])
    assert (found + there).devices() == there.devices()


def test_trees_may_be_traced():
    trees = [jnp.array([1.0, 2.0]), jnp.array([4.0, -8.0])]
    found = jax.jit(lambda trees: combine_averages(trees, [0.5, 0.25]))(trees)
    np.testing.assert_array_equal(found, [1.5, -1.0])


@pytest.mark.parametrize("asarray", [np.array, jnp.array])
def test_result_is_a_copy(asarray):
    kept = [asarray(np.ones(3)), asarray(np.ones(3))]
    for coefficients in ([1.0, 0.0], [0.5, 0.5]):
        found = combine_averages(kept, coefficients)
        if isinstance(found, np.ndarray):
            found[:] = 7
        else:
            found.delete()
    np.testing.assert_array_equal(kept, np.ones((2, 3)))


TREE = {"a": jnp.ones(2), "b": [np.ones(3, np.float32), jnp.arange(2)]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"c": 1.0}, "unexpected in averages[1]: ['c']"),
        ({"b": 1.0}, "missing from averages[1]: ['b'][0], ['b'][1]"),
        ({"a": jnp.ones(3)}, "averages[1]['a'] has shape (3,), but averages[0]['a']"),
        (
            {"a": jnp.ones(2, jnp.bfloat16)},
            "averages[1]['a'] is bfloat16, but averages[0]['a'] is float32",
        ),
        (
            {"b": [np.ones(3), jnp.arange(2)]},
            "averages[1]['b'][0] is float64, but averages[0]['b'][0] is float32",
        ),
        (
            {"b": [np.ones(3, np.float32), jnp.ones(2)]},
            "averages[1]['b'][1] is float32, but averages[0]['b'][1] is int32",
        ),
    ],
)
def test_error_names_the_leaf_that_differs(change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        combine_averages([TREE, TREE | change], [0.5, 0.5])


@pytest.mark.parametrize("number", [1, 3])
def test_number_of_trees_must_be_that_of_the_coefficients(number):
    expected = "expected one coefficient per average: got"
    with pytest.raises(ValueError, match=f"{expected} {number} averages but 2 coef"):
        combine_averages([TREE] * number, [0.5, 0.5])
    with pytest.raises(ValueError, match=f"{expected} (1|more than 2) averages but 2"):
        combine_averages(iter([TREE] * number), [0.5, 0.5])


@pytest.mark.parametrize(
    ("coefficients", "error", "message"),
    [
        ([], ValueError, "one or more numbers"),
        (1.0, ValueError, r"in one dimension; got shape \(\)"),
        ([[1.0]], ValueError, r"in one dimension; got shape \(1, 1\)"),
        ([1.0, np.nan], ValueError, "must be finite"),
        (["1"], TypeError, "must be real numbers"),
        ([1j], TypeError, "must be real numbers"),
        ([[1.0], [1.0, 2.0]], TypeError, "must be real numbers"),
        (None, TypeError, "must be real numbers"),
    ],
)
def test_coefficients_must_be_finite_real_numbers(coefficients, error, message):
    with pytest.raises(error, match=message):
        combine_averages([TREE], coefficients)


def test_coefficients_must_be_concrete():
    with pytest.raises(ValueError, match="must be concrete"):
        jax.jit(lambda c: combine_averages([TREE, TREE], c))(jnp.ones(2))


def test_averages_must_be_several_trees():
    with pytest.raises(TypeError, match="generator of pytrees; got one dict"):
        combine_averages(TREE, [0.5, 0.5])
    with pytest.raises(TypeError, match="generator of pytrees; got one ndarray"):
        combine_averages(np.ones((2, 3)), [0.5, 0.5])


def test_errors_of_a_generator_pass_through():
    def trees():
        yield TREE
        raise OSError("disk failure")

    with pytest.raises(OSError, match="disk failure"):
        combine_averages(trees(), [0.5, 0.5])
