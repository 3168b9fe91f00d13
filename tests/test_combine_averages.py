# SPDX-License-Identifier: Apache-2.0
"""`combine_averages`: exact sums, dtypes, shardings, one tree at a time, errors."""

import re
import weakref
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from asgd_optax import combine_averages
from asgd_optax._posthoc.combine_averages import _JaxSum, _Kind
from tests.support import enable_x64

# Sums of these lose all but the last digits.
COEFFICIENTS = [1 / 3, -1234.5678, 1233.2345, np.pi, 1e-9, -0.1]
BITS_64 = [np.float64, np.complex128]


def arrays(dtype, shape=(64,), seed=0):
    """One for every coefficient, near to each other as averages of one run are."""
    rng = np.random.default_rng(seed)
    base = rng.standard_normal(shape)
    near = [base + 1e-3 * rng.standard_normal(shape) for _ in COEFFICIENTS]
    if jnp.issubdtype(dtype, jnp.complexfloating):
        near = [x + 1j * np.flip(x) for x in near]
    return [np.asarray(x, dtype=dtype) for x in near]


def exact_sum(numbers, coefficients=COEFFICIENTS):
    """Of real arrays, rounded once, to float64; and the sum of absolute values."""
    terms = [
        [Fraction(float(c)) * Fraction(float(v)) for v in x.reshape(-1)]
        for x, c in zip(numbers, coefficients, strict=True)
    ]
    columns = list(zip(*terms, strict=True))
    shape = numbers[0].shape
    total = np.array([float(sum(column)) for column in columns]).reshape(shape)
    size = np.array([float(sum(map(abs, column))) for column in columns])
    return total, size.reshape(shape)


def assert_rounded_once(found, numbers, unit):
    """The result is the exact sum's rounding, but for `unit` of all that goes in."""
    for part in (np.real, np.imag):
        total, size = exact_sum([part(x).astype(np.float64) for x in numbers])
        precision = jnp.finfo(found.dtype)
        half = float(precision.eps) / 2 * np.abs(total) * (1 + 1e-6)
        error = np.abs(part(found).astype(np.float64) - total)
        np.testing.assert_array_less(error, half + unit * size + float(precision.tiny))


@pytest.mark.parametrize(
    "dtype",
    [jnp.float16, jnp.bfloat16, *map(np.dtype, ["f4", "f8", "c8", "c16"])],
    ids=str,
)
def test_jax_arrays_are_summed_exactly(dtype):
    """To 2^-34 of what goes in for float32, 2^-76 for float64: half as much again."""
    numbers = arrays(dtype)
    wide = dtype in BITS_64
    with enable_x64(wide):
        found = combine_averages(map(jnp.asarray, numbers), COEFFICIENTS)
        assert isinstance(found, jax.Array)
        assert found.dtype == dtype
        found = np.asarray(found)
    assert_rounded_once(found, numbers, 2.0**-76 if wide else 2.0**-34)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_coefficient_of_half_as_many_bits_is_not_rounded(dtype):
    """Nor are its products: what is left of their difference is exact."""
    number = float(2 ** ((np.finfo(dtype).nmant + 1) // 2) // 3 * 2 + 1)
    x = np.random.default_rng(0).uniform(1, 2, 500).astype(dtype)
    product = x * dtype(number)
    exact = [
        Fraction(float(a)) * Fraction(number) - Fraction(float(b))
        for a, b in zip(x, product, strict=True)
    ]
    with enable_x64(dtype == np.float64):
        found = combine_averages(map(jnp.asarray, (x, product)), [number, -1])
        np.testing.assert_array_equal(found, np.array(exact, dtype=float))


@pytest.mark.parametrize(
    "dtype", [jnp.bfloat16, *map(np.dtype, ["f2", "f4", "c8"])], ids=str
)
def test_numpy_arrays_are_summed_in_float64(dtype):
    numbers = arrays(dtype)
    found = combine_averages(iter(numbers), COEFFICIENTS)
    assert type(found) is np.ndarray
    assert found.dtype == dtype
    assert_rounded_once(found, numbers, 2.0**-50)


@pytest.mark.parametrize("dtype", BITS_64)
def test_numpy_arrays_of_64_bits_are_compensated(dtype):
    """What is left is the rounding of the products: that of the sums is not."""
    numbers = arrays(dtype)
    found = combine_averages(iter(numbers), COEFFICIENTS)
    assert found.dtype == dtype
    assert_rounded_once(found, numbers, 2.0**-53)
    many = [np.full(3, 0.1)] * 10_000
    found = combine_averages(many, np.full(10_000, 2.0**-13))
    np.testing.assert_array_equal(found, np.full(3, 0.1 * 10_000 / 2**13))


@pytest.mark.parametrize("asarray", [np.asarray, jnp.asarray])
def test_equal_trees_make_the_same_tree(asarray):
    """Bit for bit, though a third is no float: what is rounded is what comes out."""
    tree = {"w": asarray(arrays(np.float32)[0]), "none": None, "empty": asarray([])}
    found = combine_averages([tree] * 3, [1 / 3, 1 / 3, 1 - 1 / 3 - 1 / 3])
    np.testing.assert_array_equal(found["w"], tree["w"])
    assert jax.tree.structure(found) == jax.tree.structure(tree)
    assert found["empty"].shape == (0,)


def test_leaves_of_all_kinds():
    """What is not floating or complex is the last's, whatever it is."""

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
    wanted = tree(6) | {k: tree(2)[k] for k in ("count", "mask", "key", "name")}
    for name, leaf in wanted.items():
        if name == "key":
            assert jnp.array_equal(*map(jax.random.key_data, (found[name], leaf)))
            continue
        np.testing.assert_array_equal(found[name], leaf)
        assert getattr(found[name], "dtype", None) == getattr(
            leaf, "dtype", None if name == "name" else np.float64
        )
        assert isinstance(found[name], type(leaf))
    assert type(found["numpy"]) is type(found["0-d"]) is np.ndarray


@pytest.mark.parametrize("asarray", [np.asarray, jnp.asarray])
def test_infinities_and_nans_show_where_they_are(asarray):
    row = np.array([1.0, np.inf, -np.inf, np.nan, 3e38, -0.0], np.float32)
    for dtype in (np.float32, np.float64):
        with enable_x64(dtype == np.float64):
            trees = [asarray(row.astype(dtype))] * 2
            found = np.asarray(combine_averages(trees, [2.0, 2.0]))
        wanted = (
            row.astype(dtype) * 4
            if dtype == np.float64
            else [4, np.inf, -np.inf, np.nan, np.inf, 0]
        )
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("asarray", [np.asarray, jnp.array])
def test_one_tree_at_a_time_is_held(asarray):
    earlier = []

    def tree():
        leaf = asarray(np.ones(100, np.float32))
        earlier.append(weakref.ref(leaf))
        return {"w": leaf, "count": asarray(len(earlier))}

    def trees():
        for _ in range(4):
            assert all(ref() is None for ref in earlier)
            yield tree()

    found = combine_averages(trees(), [0.25] * 4)
    assert len(earlier) == 4
    np.testing.assert_array_equal(found["w"], np.ones(100))


def test_shardings_are_those_of_the_first():
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("x", "y"))
    put = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))  # noqa: E731
    numbers = arrays(np.float32, (8, 4))
    plain = combine_averages(map(jnp.asarray, numbers), COEFFICIENTS)
    specs = [("x", "y"), ("x",), (), ("y", "x"), ("x", "y"), (None, "y")]
    trees = [put(x, *spec) for x, spec in zip(numbers, specs, strict=True)]
    trees[3] = numbers[3]
    found = combine_averages(trees, COEFFICIENTS)
    assert found.sharding == trees[0].sharding
    np.testing.assert_array_equal(found, plain)
    device = jax.devices()[5]
    there = [jax.device_put(x, device) for x in numbers]
    assert combine_averages(there, COEFFICIENTS).devices() == {device}


if hasattr(jax, "memory"):  # older jax tells no memory spaces apart

    def test_host_memory_stays_host_memory():
        sharding = jax.sharding.SingleDeviceSharding(
            jax.devices()[0], memory_kind="pinned_host"
        )
        numbers = arrays(np.float32)
        there = [jax.device_put(x, sharding) for x in numbers]
        found = combine_averages(there, COEFFICIENTS)
        assert found.sharding == sharding
        plain = combine_averages(map(jnp.asarray, numbers), COEFFICIENTS)
        np.testing.assert_array_equal(found, plain)


def test_inside_of_jit():
    numbers = arrays(np.float32)
    plain = combine_averages(map(jnp.asarray, numbers), COEFFICIENTS)
    found = jax.jit(lambda trees: combine_averages(trees, COEFFICIENTS))(numbers)
    np.testing.assert_array_equal(found, plain)


def test_nothing_given_is_changed():
    kept = [jnp.ones(3), jnp.ones(3)]
    combine_averages(kept, [0.5, 0.5])
    numbers = [np.ones(3), np.ones(3)]
    found = combine_averages(numbers, [1.0, 0.0])
    found[:] = 7
    for x in (*kept, *numbers):
        np.testing.assert_array_equal(x, np.ones(3))


def test_a_sum_is_bound_to_no_device_to_which_the_averages_are_not():
    """It goes with what lies on another, as they would."""
    found = combine_averages([jnp.ones(3)], [2.0])
    there = jax.device_put(jnp.ones(3), jax.devices()[1])
    assert (found + there).devices() == there.devices()


def test_a_sum_is_kept_in_place():
    """Its two arrays become those of the next: there are not four at a time."""
    total = _JaxSum(_Kind((3,), np.dtype(np.float32)))
    total.add(0.5, jnp.ones(3))
    before = total.parts
    total.add(0.5, jnp.ones(3))
    assert len(before) == 2
    assert all(x.is_deleted() for x in before)


TREE = {"a": jnp.ones(2), "b": [np.ones(3, np.float32), jnp.arange(2)]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"c": 1.0}, "averages[0] has no leaf ['c']"),
        ({"b": 1.0}, "averages[1] has no leaf ['b'][0]"),
        ({"b": tuple(TREE["b"])}, "averages[1] and averages[0] differ in structure"),
        (
            {"a": jnp.ones(3)},
            "averages[1]['a'] has shape (3,), averages[0]['a'] (2,)",
        ),
        (
            {"a": jnp.ones(2, jnp.bfloat16)},
            "averages[1]['a'] has dtype bfloat16, averages[0]['a'] float32",
        ),
        (
            {"b": [np.ones(3), jnp.arange(2)]},
            "averages[1]['b'][0] has dtype float64, averages[0]['b'][0] float32",
        ),
        (
            {"b": [np.ones(3, np.float32), jnp.ones(2)]},
            "averages[1]['b'][1] has dtype float32, averages[0]['b'][1] int32",
        ),
        ({"a": "one"}, "averages[1]['a'] has shape (), averages[0]['a'] (2,)"),
    ],
)
def test_misfits_are_named(change, message):
    other = TREE | change
    for trees in ([TREE, other], iter([TREE, other])):
        with pytest.raises(ValueError, match=re.escape(message)):
            combine_averages(trees, [0.5, 0.5])


@pytest.mark.parametrize("number", [1, 3])
def test_numbers_of_trees(number):
    with pytest.raises(ValueError, match=f"there are {number} averages, and 2 coeff"):
        combine_averages([TREE] * number, [0.5, 0.5])
    with pytest.raises(ValueError, match=r"no averages\[1\]|an averages\[2\]"):
        combine_averages(iter([TREE] * number), [0.5, 0.5])


@pytest.mark.parametrize(
    ("coefficients", "error", "message"),
    [
        ([], ValueError, "one or more numbers in a row"),
        (1.0, ValueError, r"in a row; got shape \(\)"),
        ([[1.0]], ValueError, r"in a row; got shape \(1, 1\)"),
        ([1.0, np.nan], ValueError, "must be finite"),
        (["1"], TypeError, "must be real numbers"),
        ([1j], TypeError, "must be real numbers"),
        ([[1.0], [1.0, 2.0]], TypeError, "must be real numbers"),
        (None, TypeError, "must be real numbers"),
    ],
)
def test_coefficients_are_checked(coefficients, error, message):
    with pytest.raises(error, match=message):
        combine_averages([TREE], coefficients)


def test_what_is_no_sequence_of_trees():
    with pytest.raises(TypeError, match="must be several pytrees; got one dict"):
        combine_averages(TREE, [0.5, 0.5])
    with pytest.raises(TypeError, match="must be several pytrees; got one ndarray"):
        combine_averages(np.ones((2, 3)), [0.5, 0.5])
    with pytest.raises(ValueError, match="must be concrete"):
        jax.jit(lambda c: combine_averages([TREE, TREE], c))(jnp.ones(2))


def test_errors_of_a_generator_come_through():
    def trees():
        yield TREE
        raise OSError("the disk")

    with pytest.raises(OSError, match="the disk"):
        combine_averages(trees(), [0.5, 0.5])
