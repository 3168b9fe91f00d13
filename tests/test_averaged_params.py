# SPDX-License-Identifier: Apache-2.0
"""`averaged_params`: what the battery does not cover, its errors above all."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from asgd_optax import (
    ASGDState,
    CompensatedMean,
    asgd,
    average_iterates,
    averaged_params,
    track_random_scaling,
)
from tests.support import bits, precision_of, random_tree, train_step


def trained(tx, params, steps=4):
    state = tx.init(params)
    for _ in range(steps):
        params, state = train_step(tx, params, state, params)
    return params, state


def test_it_is_the_state_s_average():
    params, state = trained(asgd(0.1, t0=0), random_tree(0, "float32"))
    assert bits(averaged_params(state)) == bits(state.ax)
    assert bits(averaged_params(state, params)) == bits(state.ax)
    assert bits(params) != bits(state.ax)


@pytest.mark.parametrize(
    "dtype", ["float16", "bfloat16", "float32", "float64", "complex64", "complex128"]
)
def test_it_has_the_dtype_of_params(dtype):
    with precision_of(dtype):
        params, state = trained(asgd(0.1, t0=0), random_tree(0, dtype))
        average = averaged_params(state, params)
        for x, own in zip(*map(jax.tree.leaves, (average, state.ax)), strict=True):
            assert x.dtype == dtype
            assert bits(x) == bits(own.astype(dtype))


def test_it_is_the_value_of_a_compensated_mean():
    params, state = trained(asgd(0.1, t0=0, compensated=True), jnp.ones(3))
    assert isinstance(state.ax, CompensatedMean)
    assert bits(averaged_params(state, params)) == bits(state.ax.value)


def test_under_jit():
    tx = optax.chain(optax.clip(1.0), asgd(0.1, t0=0))
    params, state = trained(tx, random_tree(0, "float32"))
    assert bits(jax.jit(averaged_params)(state, params)) == bits(
        averaged_params(state, params)
    )


@pytest.mark.parametrize(
    "wrap",
    [
        lambda tx: optax.chain(optax.identity(), optax.chain(tx)),
        lambda tx: optax.named_chain(("first", optax.identity()), ("asgd", tx)),
        lambda tx: optax.MultiSteps(optax.masked(tx, True), 1),
        lambda tx: optax.apply_if_finite(optax.partition({0: tx}, 0), 2),
        lambda tx: optax.inject_hyperparams(lambda scale: optax.chain(tx))(scale=1.0),
        lambda tx: optax.chain(optax.masked(optax.chain(tx), {"w": True})),
    ],
    ids=["chain", "named_chain", "MultiSteps", "apply_if_finite", "inject", "masked"],
)
def test_nestings(wrap):
    params = {"w": jnp.arange(3.0)}
    p, state = trained(wrap(asgd(0.1, t0=0)), params)
    expected_p, expected = trained(asgd(0.1, t0=0), params)
    np.testing.assert_allclose(p["w"], expected_p["w"], rtol=1e-6)
    for average in (averaged_params(state), averaged_params(state, p)):
        np.testing.assert_allclose(average["w"], expected.ax["w"], rtol=1e-6)


def test_groups_with_averages_of_different_kinds_merge():
    params = random_tree(0, "float32")
    adam = optax.chain(optax.adam(0.1), average_iterates(start=1))
    sgd = asgd(0.1, t0=0)
    tx = optax.partition({"sgd": sgd, "adam": adam}, {"a": "sgd", "b": "adam"})
    params["b"][0] = jnp.ones(4)
    p, state = trained(tx, params)
    (sgd_p, sgd_state), (adam_p, adam_state) = (
        trained(sgd, params),
        trained(adam, params),
    )
    expected = {
        "a": averaged_params(sgd_state, sgd_p)["a"],
        "b": averaged_params(adam_state, adam_p)["b"],
    }
    assert bits(averaged_params(state, p)) == bits(expected)
    assert bits(averaged_params(state)) == bits(expected)


def test_no_averaging_state():
    with pytest.raises(ValueError, match="no averaging state"):
        averaged_params(optax.adam(0.1).init(jnp.ones(3)))
    # A dictionary of the same fields is no state: its types are lost.
    state = asgd().init(jnp.ones(3))
    with pytest.raises(ValueError, match="no averaging state"):
        averaged_params(state._asdict())


def test_two_averages_of_one_leaf():
    tx = optax.named_chain(("first", asgd(0.1)), ("second", asgd(0.1)))
    params = {"w": jnp.ones(3)}
    state = tx.init(params)
    with pytest.raises(
        ValueError,
        match=r"opt_state\['first'\] and .*\['w'\].*\(opt_state\['second'\], p",
    ):
        averaged_params(state, params)
    assert bits(averaged_params(state["second"], params)) == bits(params)


def test_a_leaf_that_nothing_averages():
    params = {"w": jnp.ones(3), "b": {"x": jnp.zeros(2), "y": jnp.zeros(2)}}
    state = optax.masked(asgd(0.1), {"w": True, "b": False}).init(params)
    with pytest.raises(ValueError, match=r"\['b'\].*pass `params`"):
        averaged_params(state)
    assert bits(averaged_params(state, params)) == bits(params)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"w": jnp.ones(4)}, r"\['w'\] has shape \(3,\), the parameter \(4,\)"),
        ({"w": jnp.ones(3), "b": jnp.ones(1)}, "differ in structure"),
        ({"v": jnp.ones(3)}, "lacks .*'v'.* and has .*'w'.* besides"),
        ({"w": {"x": jnp.ones(3)}}, r"differ in structure at \['w'\]"),
        ({"w": {"x": jnp.ones(3)}, "z": jnp.ones(1)}, r"in structure at \['w'\]"),
        (jnp.ones(3), "differ in structure at the parameters: .* has .*'w'.* besides"),
    ],
)
def test_params_that_do_not_fit(params, message):
    state = asgd().init({"w": jnp.ones(3)})
    with pytest.raises(ValueError, match=message):
        averaged_params(state, params)


@pytest.mark.parametrize(
    ("params", "average", "error", "message"),
    [
        ({"b": jnp.zeros((2, 3))}, {"b": (jnp.ones(3),) * 2}, ValueError, "structure"),
        ({"b": (jnp.ones(3),) * 2}, {"b": jnp.zeros((2, 3))}, ValueError, "structure"),
        ({"b": jnp.sin}, {"b": jnp.ones(())}, TypeError, r"\['b'\] is float32, the"),
        ({"b": "float32"}, {"b": jnp.ones(())}, TypeError, "the parameter str"),
        (True, jnp.ones(()), TypeError, "the parameters is float32, .* bool"),
        ({"b": jnp.ones(3, int)}, {"b": jnp.ones(3)}, TypeError, r"\['b'\] .* int32"),
        (
            {"b": jnp.ones(3)},
            {"b": jnp.ones(3, complex)},
            TypeError,
            r"\['b'\] is complex64, the parameter float32",
        ),
        ({"b": jnp.ones(3)}, {"b": None, "c": jnp.ones(3)}, ValueError, "structure"),
    ],
)
def test_an_average_of_something_else(params, average, error, message):
    with pytest.raises(error, match=message):
        averaged_params(asgd().init(average), params)


def test_many_misfits_make_a_short_message():
    state = asgd().init({f"w{i}": jnp.ones(1) for i in range(100)})
    with pytest.raises(ValueError, match=r"lacks .*97 more.* and has") as raised:
        averaged_params(state, {f"v{i}": jnp.ones(1) for i in range(100)})
    assert len(str(raised.value)) < 500
    params = {f"w{i}": jnp.ones(1) for i in range(4)}
    message = r"at \['w1'\]: .*\['w3'\]\"\] and has \[\] besides"  # all of them
    with pytest.raises(ValueError, match=message):
        averaged_params(asgd().init({"w0": jnp.ones(1)}), params)


def test_none_in_the_average_is_taken_from_params():
    """As `equinox.filter` leaves it where a leaf is static."""
    trained_part = {"w": jnp.ones(3, jnp.bfloat16), "f": None, "p": None, "n": None}
    whole = trained_part | {"f": jax.nn.relu, "p": 0.5, "n": 7}
    p, state = trained(asgd(0.1, t0=0), trained_part)
    average = averaged_params(state, whole | {"w": p["w"]})
    assert bits(average["w"]) == bits(state.ax["w"].astype(jnp.bfloat16))
    assert average["f"] is jax.nn.relu
    assert type(average["p"]) is float
    assert average["p"] == 0.5
    assert type(average["n"]) is int
    assert averaged_params(state) == state.ax


def test_none_where_params_have_a_subtree():
    state = asgd().init({"w": jnp.ones(3), "static": None})
    params = {"w": jnp.zeros(3), "static": {"a": 1, "b": ["text", None]}}
    average = averaged_params(state, params)
    assert average["static"] == params["static"]
    assert bits(average["w"]) == bits(jnp.ones(3))


class Pair:
    """A node that gives both of its children one key."""

    def __init__(self, x, y):
        self.x, self.y = x, y


jax.tree_util.register_pytree_with_keys(
    Pair,
    lambda pair: ([(jax.tree_util.DictKey("k"), c) for c in (pair.x, pair.y)], None),
    lambda _, children: Pair(*children),
)


def test_children_of_one_key():
    params = {"pair": Pair(jnp.ones(3), jnp.zeros(2)), "w": jnp.ones(())}
    p, state = trained(asgd(0.1, t0=0), params)
    for average in (averaged_params(state), averaged_params(state, p)):
        assert isinstance(average["pair"], Pair)
        assert bits(average) == bits(state.ax)
    masked = optax.masked(asgd(0.1, t0=0), {"pair": Pair(True, False), "w": True})
    p, state = trained(masked, params)
    average = averaged_params(state, p)
    assert bits(average["pair"].x) == bits(state.inner_state.ax["pair"].x)
    assert bits(average["pair"].y) == bits(p["pair"].y)


def test_a_mask_above_children_of_one_key_is_refused():
    """Of which child a leaf below it is cannot be told."""
    params = Pair({"w": jnp.ones(2)}, {"w": jnp.zeros(2)})
    state = optax.masked(asgd(), Pair(False, True)).init(params)
    with pytest.raises(ValueError, match=r"differ in structure at \['k'\]\['w'\]"):
        averaged_params(state, params)


class Valued(NamedTuple):
    """A field that is called as the key of an NNX variable's array."""

    value: Any
    other: Any


def test_a_field_called_value():
    params = Valued(jnp.ones(2), {"a": jnp.ones(3)})
    p, state = trained(optax.masked(asgd(0.1, t0=0), Valued(False, True)), params)
    average = averaged_params(state, p)
    assert bits(average) == bits(Valued(p.value, state.inner_state.ax.other))
    with pytest.raises(ValueError, match=r"lacks \[\"\.other\['b'\]\"\]"):
        averaged_params(state, p._replace(other=p.other | {"b": jnp.ones(4)}))
    with pytest.raises(ValueError, match=r"at \.value: .*has \['\.value'\]"):
        averaged_params(asgd().init(params), params._replace(value={"x": jnp.ones(2)}))


def test_variables_and_plain_arrays_go_together():
    """As NNX keeps them: the array of a variable is its field `value`."""
    plain = {"layer": {"w": jnp.ones(2), "b": jnp.ones(3)}}
    boxed = jax.tree.map(lambda x: Valued(x, None), plain)
    for average, params in ((plain, boxed), (boxed, plain)):
        zeros = jax.tree.map(jnp.zeros_like, params)
        assert bits(averaged_params(asgd().init(average), zeros)) == bits(params)


def test_keys_that_print_alike_are_told_apart():
    with pytest.raises(ValueError, match=r"lacks .*DictKey.* has .*SequenceKey"):
        averaged_params(asgd().init([jnp.ones(2)]), {0: jnp.ones(2)})
    with pytest.raises(ValueError, match="lacks") as raised:
        averaged_params(asgd().init([1.0] * 4), dict.fromkeys(range(4), 1.0))
    for kind in ("DictKey", "SequenceKey"):
        assert str(raised.value).count(kind) == 3


def test_averages_that_differ_among_themselves():
    tx = optax.partition({"a": asgd(), "b": asgd()}, {"w": "a", "v": "b"})
    state = tx.init({"w": jnp.ones(2), "v": jnp.ones(2)})
    inner = state.inner_states
    other = optax.MaskedState(asgd().init({"u": jnp.ones(3)}))
    state = state._replace(inner_states=inner | {"b": other})
    with pytest.raises(ValueError, match="^the averages differ .*pass `params`$"):
        averaged_params(state)


def test_an_abstract_average():
    params = {"b": jnp.ones(2)}
    with pytest.raises(TypeError, match=r"^the average of \['b'\] is abstract"):
        averaged_params(jax.eval_shape(asgd().init, params), params)


@pytest.mark.parametrize("tx", [asgd(), optax.masked(asgd(), True)])
def test_a_tree_as_deep_as_jax_takes(tx):
    params = jnp.ones(())
    for _ in range(600):
        params = {"a": params, "b": None}
    state = tx.init(params)
    for average in (averaged_params(state), averaged_params(state, params)):
        assert bits(average) == bits(params)
        assert jax.tree.structure(average) == jax.tree.structure(params)


def test_groups_at_different_depths_merge():
    """Prefix masks: one group ends where another has a subtree with gaps of its own."""
    params = {"a": {"x": jnp.ones(1), "y": jnp.ones(2)}, "b": jnp.ones(3)}
    labels = {"a": {"x": "one", "y": "two"}, "b": "three"}
    tx = optax.partition({label: asgd() for label in ("one", "two", "three")}, labels)
    state = tx.init(params)
    for average in (averaged_params(state), averaged_params(state, params)):
        assert bits(average) == bits(params)
        assert jax.tree.structure(average) == jax.tree.structure(params)


def test_a_fallback_of_another_structure_is_passed_over():
    params = {"w": jnp.ones(3), "b": jnp.ones(2)}
    flat = optax.flatten(track_random_scaling())
    tx = optax.chain(optax.masked(asgd(), {"w": True, "b": False}), flat)
    state = tx.init(params)
    assert bits(averaged_params(state, params)) == bits(params)
    with pytest.raises(ValueError, match=r"nothing averages \['b'\]"):
        averaged_params(state)
    with pytest.raises(ValueError, match="differ in structure"):
        averaged_params(state[1], params)


def test_a_fallback_fills_what_is_masked():
    params = {"w": jnp.ones(3), "b": jnp.ones(2)}
    first = optax.masked(asgd(), {"w": True, "b": False})
    state = optax.chain(first, track_random_scaling()).init(params)
    for average in (averaged_params(state), averaged_params(state, params)):
        assert bits(average) == bits(params)


def test_a_state_that_has_lost_its_types():
    state = optax.chain(asgd()).init(jnp.ones(3))
    with pytest.raises(ValueError, match=r"`optimizer.opt_state`.*with a target"):
        averaged_params((state[0]._asdict(),))


@pytest.mark.flax
def test_equinox():
    import equinox as eqx

    class Model(eqx.Module):
        layers: list
        drop: eqx.nn.Dropout

        def __init__(self, key):
            self.layers = [eqx.nn.MLP(2, 1, 3, 1, key=key), jax.nn.relu]
            self.drop = eqx.nn.Dropout(0.5)

    model = Model(jax.random.key(0))
    trained_part, static = eqx.partition(model, eqx.is_inexact_array)
    p, state = trained(optax.chain(asgd(0.1, t0=0)), trained_part)
    average = averaged_params(state, eqx.combine(p, static))
    assert jax.tree.structure(average) == jax.tree.structure(model)
    assert average.drop.p == 0.5
    assert average.layers[1] is jax.nn.relu
    averaged_part, static_part = eqx.partition(average, eqx.is_inexact_array)
    assert bits(averaged_part) == bits(state[0].ax)
    assert bits(averaged_part) != bits(p)
    assert jax.tree.leaves(static_part) == jax.tree.leaves(static)
    assert bits(averaged_params(state)) == bits(averaged_part)


@pytest.mark.flax
def test_the_state_of_an_nnx_optimizer_has_lost_its_types():
    from flax import nnx

    model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, asgd(), wrt=nnx.Param)
    with pytest.raises(ValueError, match="pass `optimizer.opt_state`"):
        averaged_params(nnx.state(optimizer))


@pytest.mark.flax
def test_the_tree_type_is_that_of_params():
    from flax.core import FrozenDict

    params = {"w": jnp.ones(3, jnp.bfloat16), "b": jnp.ones((), jnp.float16)}
    _, state = trained(asgd(0.1, t0=0), params)
    frozen = FrozenDict(params)
    average = averaged_params(state, frozen)
    assert jax.tree.structure(average) == jax.tree.structure(frozen)
    assert average["w"].dtype == jnp.bfloat16
    assert average["b"].dtype == jnp.float16


def test_a_state_of_numpy_arrays_serves():
    """As a checkpoint restores it."""
    _, state = trained(asgd(0.1, t0=0), {"w": jnp.ones(3)})
    restored = jax.tree.map(np.asarray, state)
    assert isinstance(restored, ASGDState)
    assert bits(averaged_params(restored)) == bits(averaged_params(state))
