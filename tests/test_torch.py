# SPDX-License-Identifier: Apache-2.0
"""Moves of a run between torch and here: recorded, and live where torch is."""

import copy
import functools
import json
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

from asgd_optax import ASGDState, CompensatedMean, asgd, averaged_params
from asgd_optax.torch import (
    hyperparams_from_torch,
    state_from_torch,
    state_to_torch,
)
from tests.support import bits, precision_of, train_step
from tools.record_interop_fixtures import (
    BACK,
    CASES,
    END,
    OUT,
    RECIPE,
    SHAPES,
    array_of,
    default_dtype_for,
    draw_run,
    read_fixtures,
    train_torch,
)

NAMES = list(SHAPES)

# The runs that go on here as they would have in torch.
IDENTICAL = [
    "float64",
    "float32",
    "complex128",
    "complex64",
    "before t0",
    "maximize",
    "scheduler",
]

HYPERPARAMS = {
    "learning_rate": 0.1,
    "lambd": 0.02,
    "alpha": 0.6,
    "t0": 5.0,
    "weight_decay": 0.1,
}


def to_params(weights):
    """Transposes, stacks and renames."""
    return {
        "conv": {"kernel": weights["conv.weight"].transpose(2, 3, 1, 0)},
        "blocks": np.stack([weights[f"blocks.{i}.weight"].T for i in range(2)]),
        "shift": weights["bias"],
    }


def from_params(params):
    weights = {f"blocks.{i}.weight": params["blocks"][i].T for i in range(2)}
    weights["conv.weight"] = params["conv"]["kernel"].transpose(3, 2, 0, 1)
    return weights | {"bias": params["shift"]}


def on_device(tree):
    """As a JAX training has its parameters: in its own dtypes."""
    return jax.tree.map(lambda x: jnp.array(x, copy=True), tree)


def tolerance(case):
    eps = float(jnp.finfo(case.dtype).eps)
    return 300 * eps if eps > 1e-10 else 1e-12


@functools.cache
def _recorded():
    return read_fixtures()


@pytest.fixture
def recorded():
    """The snapshots, to be spoilt at will."""
    return copy.deepcopy(_recorded()[1])


def transformation(case, state_dict):
    """The transformation for a state of torch, and its hyperparameters."""
    state_dict = copy.deepcopy(state_dict)
    sign = 1.0
    if case.arguments.get("maximize"):
        with pytest.raises(ValueError, match=r"optax.scale\(-1.0\)"):
            hyperparams_from_torch(state_dict)
        for group in state_dict["param_groups"]:  # as that error says
            group["maximize"] = False
        sign = -1.0
    hyperparams = hyperparams_from_torch(state_dict)
    own = dict(hyperparams)
    if case.gamma is not None:
        rates = np.cumprod([case.arguments["lr"], *[case.gamma] * END])
        assert hyperparams["learning_rate"] == rates[OUT]
        own["learning_rate"] = lambda n: jnp.asarray(rates)[jnp.maximum(n - 1, 0)]
        hyperparams["learning_rate"] = rates[BACK]
    return optax.chain(optax.scale(sign), asgd(**own)), hyperparams


compiled_step = jax.jit(train_step, static_argnums=0)


def train_here(tx, params, opt_state, gradients, first, last):
    for step in range(first, last):
        grads = to_params({name: g[step] for name, g in gradients.items()})
        params, opt_state = compiled_step(tx, params, opt_state, grads)
    return params, opt_state


def go_on(case, snapshot, gradients):
    """From `OUT` to `BACK` here; the hyperparameters are those to hand back."""
    tx, hyperparams = transformation(case, snapshot.state_dict)
    params = on_device(to_params(snapshot.weights))
    state = state_from_torch(snapshot.state_dict, NAMES, to_params)
    opt_state = (*tx.init(params)[:-1], state)
    params, opt_state = train_here(tx, params, opt_state, gradients, OUT, BACK)
    return params, opt_state[-1], hyperparams


def take_over_groups(snapshot, names):
    """A transformation and its state for groups that differ, as documented.

    Args:
      snapshot: a run of torch, with a group for each label of `names`.
      names: by label; the other parameters are left as they are.
    """
    label_of = {name: label for label, own in names.items() for name in own}
    labels = {
        "conv": {"kernel": label_of.get("conv.weight", "left")},
        "blocks": label_of["blocks.0.weight"],
        "shift": label_of["bias"],
    }
    transforms = {"left": optax.set_to_zero()}
    states = {"left": optax.MaskedState(optax.EmptyState())}
    for label, group in zip(names, snapshot.state_dict["param_groups"], strict=True):

        def own_params(averages, label=label):
            params = to_params(snapshot.weights | averages)
            return jax.tree.map(
                lambda x, own: x if own == label else optax.MaskedNode(), params, labels
            )

        part = snapshot.state_dict | {"param_groups": [group]}
        transforms[label] = asgd(**hyperparams_from_torch(part))
        state = state_from_torch(part, names[label], own_params)
        states[label] = optax.MaskedState(state)
    return optax.partition(transforms, labels), optax.PartitionState(states)


def averages_in(state_dict, names=NAMES):
    """By name, as NumPy arrays; a state dict of tensors or of arrays."""
    averages = (state_dict["state"][i]["ax"] for i in range(len(names)))
    arrays = (array_of(x) if hasattr(x, "detach") else x for x in averages)
    return dict(zip(names, arrays, strict=True))


def test_fixtures_are_of_these_cases():
    assert _recorded()[0] == RECIPE, "run tools/record_interop_fixtures.py"


@pytest.mark.parametrize("name", [*IDENTICAL, "bfloat16"])
def test_carries_over_exactly(name, recorded):
    weights, state_dict = recorded[name][0]
    with precision_of(CASES[name].dtype):
        state = state_from_torch(state_dict, NAMES, to_params)
        params = on_device(to_params(weights))
        fresh = asgd(**HYPERPARAMS).init(params)
        assert jax.tree.structure(state) == jax.tree.structure(fresh)
        for own, expected in zip(*map(jax.tree.leaves, (state, fresh)), strict=True):
            assert (own.shape, own.dtype, own.weak_type) == (
                expected.shape,
                expected.dtype,
                expected.weak_type,
            )
        averages = to_params(averages_in(state_dict))
        widened = jax.tree.map(lambda x, own: x.astype(own.dtype), averages, state.ax)
        assert bits(state.ax) == bits(widened)
        if name == "before t0":
            assert bits(state.ax) == bits(params)
        first = state_dict["state"][0]
        assert (state.step, state.eta, state.mu) == (OUT, first["eta"], first["mu"])


@pytest.mark.parametrize("name", IDENTICAL)
def test_goes_on_as_torch_did(name, recorded):
    case = CASES[name]
    _, gradients = draw_run(case)
    before, after = recorded[name]
    with precision_of(case.dtype):
        params, state, _ = go_on(case, before, gradients)
        rtol = tolerance(case)
        chex.assert_trees_all_close(from_params(params), after.weights, rtol=rtol)
        chex.assert_trees_all_close(
            from_params(state.ax), averages_in(after.state_dict), rtol=rtol
        )
        first = after.state_dict["state"][0]
        assert state.step == BACK == first["step"]
        assert state.mu == first["mu"]
        eps = jnp.finfo(case.dtype).eps
        np.testing.assert_allclose(state.eta, first["eta"], 4 * float(eps))


def test_groups_that_differ_are_refused(recorded):
    state_dict = recorded["groups"][0].state_dict
    with pytest.raises(
        ValueError,
        match=r"groups differ: lr is 0.1 in param_groups\[0\] \('conv.weight', 'blocks"
        r".0.weight', 'blocks.1.weight'\) .* in param_groups\[1\] \('bias'\):.*parti",
    ):
        state_from_torch(state_dict, NAMES, to_params)
    with pytest.raises(ValueError, match=r"groups differ: lr.*param_groups\[1\]"):
        hyperparams_from_torch(state_dict)


@pytest.mark.parametrize(
    ("name", "apart"),
    [
        ("groups", {"decayed": NAMES[:3], "free": NAMES[3:]}),
        ("a late gradient", {"early": NAMES[:3], "late": NAMES[3:]}),
        ("never a gradient", {"trained": NAMES[1:]}),
    ],
)
def test_parts_go_on_under_partition(name, apart, recorded):
    before, after = recorded[name]
    _, gradients = draw_run(CASES[name])
    if name != "groups":
        (group,) = before.state_dict["param_groups"]
        group["param_names"] = NAMES  # as torch notes them, if it is told them
        before.state_dict["param_groups"] = [
            group | {"params": [NAMES.index(name) for name in own]}
            for own in apart.values()
        ]
    with precision_of("float64"):
        params = on_device(to_params(before.weights))
        tx, opt_state = take_over_groups(before, apart)
        fresh = tx.init(params)
        assert jax.tree.structure(opt_state) == jax.tree.structure(fresh)
        params, opt_state = train_here(tx, params, opt_state, gradients, OUT, BACK)
        chex.assert_trees_all_close(from_params(params), after.weights, rtol=1e-12)
        averages = from_params(averaged_params(opt_state, params))
        kept = after.state_dict["state"]
        for id_, entry in kept.items():
            np.testing.assert_allclose(averages[NAMES[id_]], entry["ax"], 1e-12)
        assert len(kept) == sum(map(len, apart.values()))


def test_groups_that_agree_make_one_state(recorded):
    _, state_dict = recorded["float64"][0]
    expected = state_from_torch(state_dict, NAMES, to_params)
    (group,) = state_dict["param_groups"]
    state_dict["param_groups"] = [
        group | {"params": ids} for ids in ([0], [], [1, 2, 3])
    ]
    state = state_from_torch(state_dict, NAMES, to_params)
    assert bits(state) == bits(expected)
    assert hyperparams_from_torch(state_dict) == HYPERPARAMS


def test_a_state_of_torch_1_8(recorded):
    """Which kept numbers, and knew fewer arguments."""
    _, state_dict = recorded["float64"][0]
    expected = state_from_torch(state_dict, NAMES, to_params)
    for entry in state_dict["state"].values():
        entry |= {"step": int(entry["step"])}
        entry |= {key: float(entry[key]) for key in ("eta", "mu")}
    for key in ("foreach", "maximize", "differentiable", "capturable"):
        del state_dict["param_groups"][0][key]
    assert hyperparams_from_torch(state_dict) == HYPERPARAMS
    assert bits(state_from_torch(state_dict, NAMES, to_params)) == bits(expected)


def test_numbers_agree_up_to_the_dtype_to_which_torch_cast_them(recorded):
    _, state_dict = recorded["float64"][0]
    expected = state_from_torch(state_dict, NAMES, to_params)
    # So torch loads the state of bfloat16 parameters, in a model with others.
    for key in ("eta", "mu"):
        state_dict["state"][0][key] = state_dict["state"][0][key].astype(
            ml_dtypes.bfloat16
        )
    state = state_from_torch(state_dict, NAMES, to_params)
    assert (state.eta, state.mu) == (expected.eta, expected.mu)
    state_dict["state"][0]["eta"] = np.array(0.2, ml_dtypes.bfloat16)
    with pytest.raises(ValueError, match=r"eta is 0.09.* and 0.2.* 'conv.weight'.*one"):
        state_from_torch(state_dict, NAMES, to_params)


@pytest.mark.parametrize(("roundings", "agree"), [(4, True), (5, False)])
def test_numbers_agree_up_to_a_few_roundings(roundings, agree, recorded):
    _, state_dict = recorded["float64"][0]
    for entry in state_dict["state"].values():
        entry["mu"] = 0.5
    state_dict["state"][3]["mu"] = 0.5 * (1 + roundings * np.finfo(float).eps)
    if agree:
        assert state_from_torch(state_dict, NAMES, to_params).mu == 0.5
    else:
        with pytest.raises(ValueError, match=r"mu is 0.5 for .* and 0.50+6 for 'bias'"):
            state_from_torch(state_dict, NAMES, to_params)


def test_hyperparams():
    group = {"lr": np.array([0.5], "float32"), "lambd": 0, "alpha": 1, "t0": np.inf}
    group |= {"weight_decay": np.float64(0.25), "params": [0]}
    state_dict = {"state": {}, "param_groups": [group]}
    found = hyperparams_from_torch(state_dict)
    expected = {
        "learning_rate": 0.5,
        "lambd": 0.0,
        "alpha": 1.0,
        "t0": float("inf"),
        "weight_decay": 0.25,
    }
    assert found == expected
    assert {type(value) for value in found.values()} == {float}
    asgd(**found)


def test_a_parameter_without_a_gradient_takes_the_weights_handed_in(recorded):
    weights, state_dict = recorded["never a gradient"][0]
    with pytest.raises(ValueError, match=r"no average of 'conv.weight'.*weights="):
        state_from_torch(state_dict, NAMES, to_params)
    # More than is needed does no harm: a model's buffers, say.
    buffers = {"norm.num_batches_tracked": np.array(3)}
    state = state_from_torch(state_dict, NAMES, to_params, weights=weights | buffers)
    averages = from_params(state.ax)
    np.testing.assert_array_equal(
        averages["conv.weight"], weights["conv.weight"].astype("float32")
    )
    kept = state_dict["state"]
    np.testing.assert_array_equal(averages["bias"], kept[3]["ax"].astype("float32"))
    assert state.step == OUT


def test_an_optimizer_that_made_no_step_is_a_fresh_one(recorded):
    weights, state_dict = recorded["float64"][0]
    fresh = asgd(**HYPERPARAMS).init(on_device(to_params(weights)))
    for state in ({}, {id_: {} for id_ in range(len(NAMES))}):  # as torch leaves it
        unused = state_dict | {"state": state}
        taken = state_from_torch(unused, NAMES, to_params, weights=weights)
        assert bits(taken) == bits(fresh)
        with pytest.raises(ValueError, match="no average of 'conv.weight'"):
            state_from_torch(unused, NAMES, to_params)


def test_shares_no_memory_with_the_state_dict(recorded):
    _, state_dict = recorded["float32"][0]
    before = bits(state_dict)

    def spoil(averages):
        params = to_params(averages)
        for average in averages.values():
            average *= 2  # which torch's own must not see
        return params

    state_from_torch(state_dict, NAMES, spoil)
    assert bits(state_dict) == before
    state = state_from_torch(state_dict, NAMES, to_params)
    expected = bits(state)
    for entry in state_dict["state"].values():
        entry["ax"] *= 2
    assert bits(state) == expected


def test_another_kind_of_average(recorded):
    _, state_dict = recorded["float32"][0]
    state = state_from_torch(state_dict, NAMES, to_params)
    tx = asgd(**HYPERPARAMS, compensated=True)
    compensated = state._replace(ax=tx.init(state.ax).ax)
    assert isinstance(compensated.ax, CompensatedMean)
    assert bits(compensated.ax.value) == bits(state.ax)
    params = on_device(to_params(recorded["float32"][0].weights))
    assert jax.tree.structure(compensated) == jax.tree.structure(tx.init(params))


def network():
    """A module of Flax with the parameters of `to_params`."""
    from flax import nnx

    class Network(nnx.Module):
        def __init__(self):
            kernel = {"kernel_size": (2, 3), "use_bias": False}
            self.conv = nnx.Conv(1, 2, **kernel, rngs=nnx.Rngs(0))
            self.blocks = nnx.Param(jnp.ones((2, 3, 2)))
            self.shift = nnx.Param(jnp.ones(2))

    return Network()


@pytest.mark.flax
@pytest.mark.parametrize("before_asgd", [[], [optax.clip_by_global_norm(0.5)]])
def test_an_nnx_optimizer_goes_on_as_plain_optax(before_asgd, recorded):
    from flax import nnx

    _, gradients = draw_run(CASES["float32"])
    snapshot, after = recorded["float32"]
    tx = asgd(**hyperparams_from_torch(snapshot.state_dict))
    tx = optax.chain(*before_asgd, tx) if before_asgd else tx
    params = on_device(to_params(snapshot.weights))
    state = state_from_torch(snapshot.state_dict, NAMES, to_params)
    opt_state = (*tx.init(params)[:-1], state) if before_asgd else state

    model = network()
    nnx.update(model, params)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    if before_asgd:
        nnx.update(optimizer.opt_state[-1], nnx.state(state))
    else:
        nnx.update(optimizer.opt_state, nnx.state(state))

    @nnx.jit
    def train_step(model, optimizer, grads):
        optimizer.update(model, grads)

    for step in range(OUT, BACK):
        grads = to_params({name: g[step] for name, g in gradients.items()})
        variables = jax.tree.map(nnx.Param, on_device(grads))
        train_step(model, optimizer, nnx.State(variables))
        params, opt_state = train_here(tx, params, opt_state, gradients, step, step + 1)
        assert bits(nnx.state(model, nnx.Param)) == bits(params)
        assert bits(optimizer.opt_state) == bits(opt_state)
    assert bits(averaged_params(optimizer.opt_state, params)) == bits(
        averaged_params(opt_state, params)
    )
    if not before_asgd:
        chex.assert_trees_all_close(
            from_params(params), after.weights, rtol=tolerance(CASES["float32"])
        )


@pytest.mark.flax
def test_an_average_that_the_state_lacks_is_left_to_nnx_as_the_weights(recorded):
    from flax import nnx

    weights, state_dict = recorded["float32"][0]
    state_dict["param_groups"][0]["params"] = [1, 2, 3]  # a frozen convolution
    state = state_from_torch(
        state_dict,
        NAMES[1:],
        lambda w: {k: v for k, v in to_params(weights | w).items() if k != "conv"},
    )
    model = network()
    nnx.update(model, on_device(to_params(weights)))
    optimizer = nnx.Optimizer(model, asgd(), wrt=nnx.Param)
    nnx.update(optimizer.opt_state, nnx.state(state))
    averages = averaged_params(optimizer.opt_state, nnx.state(model, nnx.Param))
    kernel = model.conv.kernel[...]
    assert bits(averages["conv"]["kernel"]) == bits(kernel)
    assert bits(averages["shift"]) == bits(state.ax["shift"])


def _entry(id_, **changes):
    return lambda d: d["state"][id_].update(changes)


def _group(**changes):
    return lambda d: d["param_groups"][0].update(changes)


def _without(id_, key):
    return lambda d: d["state"][id_].pop(key)


def _cut(*ids):
    """One group made into several, with these ids."""

    def spoil(d):
        (group,) = d["param_groups"]
        d["param_groups"] = [group | {"params": own} for own in ids]

    return spoil


def _through_json(d):
    d["state"] = {str(id_): entry for id_, entry in d["state"].items()}


NOT_FINITE = np.array([1.0, np.nan])
LISTED = " ('conv.weight', 'blocks.0.weight', 'blocks.1.weight', ...)"
PARAMS = r"param_groups\[0\]\['params'\]"
PARAM_NAMES = r"param_groups\[0\]\['param_names'\]"


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (_without(3, "ax"), ValueError, r"^the state of 'bias' has no 'ax'"),
        (_without(0, "mu"), ValueError, r"^the state of 'conv.weight' has no 'mu'"),
        (_entry(3, ax=NOT_FINITE), ValueError, "average of 'bias' is not finite"),
        (_entry(3, ax=1j * NOT_FINITE), ValueError, "average of 'bias' is not finite"),
        (_entry(3, ax=np.arange(2)), ValueError, "average of 'bias' is int64"),
        (_entry(3, ax="text"), ValueError, "average of 'bias' is <U4"),
        (_entry(3, ax=[[1.0], [1.0, 2.0]]), ValueError, "average of 'bias' cannot be"),
        (_entry(3, ax=np.ones(3)), ValueError, r"shape \(3,\), its weights \(2,\)"),
        (_entry(3, step=12), ValueError, "'conv.weight' is at step 15, 'bias' at"),
        (_entry(3, step=1.5), ValueError, "step of 'bias' must be a whole number"),
        (_entry(0, step=2.0**31), ValueError, "step of 'conv.weight' must be a whole"),
        (_entry(0, step=-1), ValueError, "step of 'conv.weight' must be a whole"),
        (_entry(2, eta=np.inf), ValueError, "the eta of 'blocks.1.weight' must be fin"),
        (
            _entry(2, mu=np.nan),
            ValueError,
            "mu of 'blocks.1.weight' must not be .* NaN",
        ),
        (_entry(2, mu=0.5), ValueError, "mu is 0.1 for .* 0.5 for 'blocks.1.weight'"),
        (_entry(2, eta=np.ones(2)), TypeError, "the eta of 'blocks.1.weight' must be"),
        (
            _entry(2, eta="fast"),
            TypeError,
            "the eta of 'blocks.1.weight' must be a num",
        ),
        (lambda d: d["state"].update({1: 3}), ValueError, "'blocks.0.weight' is a int"),
        (_group(lr=-1.0), ValueError, r"lr in param_groups\[0\].*must not be negative"),
        (_group(t0=np.nan), ValueError, "t0 in .* must not be negative or NaN"),
        (_group(alpha=None), TypeError, "^alpha in .* must be a number; got None"),
        (_group(params=[0, 1, 2]), ValueError, "^4 names for 3 parameters: 'bias' is"),
        (
            _group(params=[0, 1, 2, 3, 4]),
            ValueError,
            "^4 names for 5 parameters: the one after 'bias' has none",
        ),
        (
            _group(param_names=["conv.weight", "bias", "blocks.0.weight", "x"]),
            ValueError,
            "names holds 'blocks.0.weight' where torch has 'bias'",
        ),
        (lambda d: d.pop("state"), ValueError, r"it has \['param_groups'\]"),
        (lambda d: d.update(param_groups=[]), ValueError, "its 'state' and 'param_"),
        (lambda d: d.update(param_groups=None), ValueError, "its 'state' and 'param_"),
        (
            lambda d: d.update(param_groups=[None]),
            TypeError,
            r"^param_groups\[0\] must be a dictionary; got None",
        ),
        (
            lambda d: d["param_groups"][0].pop("params"),
            ValueError,
            r"^param_groups\[0\] has no 'params'",
        ),
        # Ids: a list of numbers, each once.
        (_group(params=None), TypeError, f"^{PARAMS} must be a list; got None"),
        (_group(params="0123"), TypeError, f"^{PARAMS} must be a list; got '0123'"),
        (_group(params=4), TypeError, f"^{PARAMS} must be a list; got 4"),
        (_group(params=[[0], 1, 2, 3]), TypeError, f"^{PARAMS} must hold .*; got a li"),
        (_group(params=[0, 1, 2, None]), TypeError, f"^{PARAMS} must hold .* NoneType"),
        (_group(params=[0.0, 1, 2, 3]), TypeError, f"^{PARAMS} must hold .* a float"),
        (_group(params=[0, True, 2, 3]), TypeError, f"^{PARAMS} must hold .* a bool"),
        (
            _group(params=[*map(np.ones, range(4))]),  # as optimizer.param_groups
            TypeError,
            rf"^{PARAMS} must hold .* optimizer.state_dict\(\) .* a ndarray",
        ),
        (
            _group(params=[0, 1, 1, 3]),  # of one shape
            ValueError,
            f"^{PARAMS} holds 1, which {PARAMS} holds already",
        ),
        (
            _cut([0, 1], [2, 1]),
            ValueError,
            rf"^param_groups\[1\]\['params'\] holds 1, which {PARAMS} holds already",
        ),
        (_through_json, ValueError, "^state has '0' where .* 0: JSON"),
        # Names, where torch was told them.
        (_group(param_names=5), TypeError, f"^{PARAM_NAMES} must be a list of strings"),
        (_group(param_names="bias"), TypeError, f"^{PARAM_NAMES} must be a list of st"),
        (
            _group(param_names=[0, 1, 2, 3]),
            TypeError,
            f"^{PARAM_NAMES} .* strings; got",
        ),
        (
            _group(maximize="no"),
            TypeError,
            "^maximize in .* must be True or False; got",
        ),
        (
            _group(maximize=None),
            TypeError,
            "^maximize in .* must be True or False; got",
        ),
        (_group(maximize=np.ones(2, bool)), TypeError, "^maximize in .* must be True"),
        (_group(lr=True), TypeError, "^lr in .* must be a number; got True"),
        (_group(lr=np.ones(2)), TypeError, "^lr in .* must be a number; got"),
        # Numbers that no run of torch comes to.
        (_entry(3, step=None), TypeError, "^the step of 'bias' must be a number; got"),
        (_entry(3, step=True), TypeError, "^the step of 'bias' must be a number; got"),
        (_entry(3, step="15"), TypeError, "^the step of 'bias' must be a number; got"),
        (
            _entry(3, step=np.nan),
            ValueError,
            "^the step of 'bias' must be a whole numb",
        ),
        (
            _entry(3, step=np.inf),
            ValueError,
            "^the step of 'bias' must be a whole numb",
        ),
        (_entry(3, eta=None), TypeError, "^the eta of 'bias' must be a number; got"),
        (_entry(3, eta=-0.1), ValueError, "^the eta of 'bias' must not be negative"),
        (
            _entry(3, eta=1e300),
            ValueError,
            "^the eta of 'bias' must be finite in float",
        ),
        (_entry(3, mu=-0.1), ValueError, "^the mu of 'bias' must not be negative"),
        (_entry(3, mu=1.5), ValueError, "^the mu of 'bias' must be at most 1; got 1.5"),
        (_entry(3, ax=None), ValueError, "^the average of 'bias' is object, not float"),
    ],
)
def test_a_bad_state_is_refused(spoil, error, message, recorded):
    weights, state_dict = recorded["float64"][0]
    spoil(state_dict)
    converted = []

    def watched(averages):
        converted.append(averages)
        return to_params(averages)

    with pytest.raises(error, match=message) as raised:
        state_from_torch(state_dict, NAMES, watched, weights=weights)
    assert converted == []
    assert "\n" not in str(raised.value)


def test_the_state_of_another_optimizer_is_refused(recorded):
    _, state_dict = recorded["Adam"][0]
    message = (
        r"param_groups\[0\].* has no 'lambd', 'alpha', 't0': this is not the state"
    )
    with pytest.raises(ValueError, match=message):
        hyperparams_from_torch(state_dict)
    with pytest.raises(ValueError, match=message) as raised:
        state_from_torch(state_dict, NAMES, to_params)
    assert "'conv.weight'" in str(raised.value)
    state_dict["param_groups"][0] |= {"lambd": 0.0, "alpha": 0.0, "t0": 0.0}
    with pytest.raises(
        ValueError, match=r"'conv.weight' has no 'eta', 'mu', 'ax', but"
    ):
        state_from_torch(state_dict, NAMES, to_params)


def test_parameters_at_different_steps_are_refused(recorded):
    _, state_dict = recorded["a late gradient"][0]
    message = "'conv.weight' is at step 15, 'bias' at step 12.*optax.partition"
    with pytest.raises(ValueError, match=message):
        state_from_torch(state_dict, NAMES, to_params)


@pytest.mark.parametrize("state_dict", [None, [], 3, "state.pt"])
def test_no_state_dict_at_all(state_dict):
    for read in (
        hyperparams_from_torch,
        lambda state_dict: state_from_torch(state_dict, NAMES, to_params),
    ):
        with pytest.raises(
            TypeError, match=r"^state_dict must be what optimizer.state"
        ):
            read(state_dict)
    with pytest.raises(ValueError, match=r"it has \['model', 'optimizer'\]"):
        hyperparams_from_torch({"model": {}, "optimizer": {}})


@pytest.mark.parametrize(
    ("names", "error", "message"),
    [
        ("bias", TypeError, "^names must be a list of strings; got 'bias'"),
        (None, TypeError, "^names must be a list of strings; got None"),
        (4, TypeError, "^names must be a list of strings; got 4"),
        (np.array("w"), TypeError, "^names must be a list of strings; got array"),
        (b"bias", TypeError, "^names must be a list of strings; got b'bias'"),
        # In what order?
        (set(NAMES), TypeError, "^names must be a list of strings; got {"),
        ([*NAMES[:3], 3], TypeError, "^names must be strings; got 3"),
        ([*NAMES[:3], NAMES[0]], ValueError, "holds 'conv.weight' more than once"),
        (NAMES[:3], ValueError, r"after 'blocks.1.weight', of shape \(2,\), has none"),
        ([*NAMES, "norm.mean"], ValueError, "'norm.mean' is one too many.*buffers"),
        ([], ValueError, "^0 names for 4 parameters: the first, of shape"),
    ],
)
def test_bad_names_are_refused(names, error, message, recorded):
    with pytest.raises(error, match=message):
        state_from_torch(recorded["float64"][0].state_dict, names, to_params)


@pytest.mark.parametrize(
    ("convert", "error", "message"),
    [
        (lambda w: {"x": w["bias"]}, ValueError, "made 2 numbers of 26.*'conv.weight'"),
        (lambda w: w | {"tied": w["bias"]}, ValueError, "made 28 numbers of 26"),
        (lambda w: None, ValueError, "made 0 numbers of 26"),
        (
            lambda w: w | {"bias": w["bias"].astype(int)},
            TypeError,
            r"\['bias'\] is int",
        ),
        (lambda w: w | {"bias": "text"}, TypeError, r"\['bias'\] is"),
        (
            lambda w: w | {"bias": w["bias"] * [1.0, 1e300]},
            ValueError,
            r"\['bias'\] is not finite in float32",
        ),
        (lambda w: {"x": w["head.bias"]}, KeyError, "head.bias"),
        (lambda w: w["bias"].reshape(3), ValueError, r"(?s)reshape.*'bias': \(2,\)"),
    ],
)
def test_a_conversion_that_does_not_fit_is_refused(convert, error, message, recorded):
    with pytest.raises(error, match=message) as raised:
        state_from_torch(recorded["float64"][0].state_dict, NAMES, convert)
    if error is KeyError:
        assert "of shapes" in raised.value.__notes__[0]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"to_params": None}, TypeError, "^to_params must be a function; got None"),
        ({"to_params": NAMES}, TypeError, r"^to_params must be a function; got \["),
        ({"weights": 5}, TypeError, "^weights must be a mapping .* by name; got 5"),
        ({"weights": NAMES}, TypeError, r"^weights must be a mapping .*; got \['conv"),
        (
            {"weights": {"bias": [[1.0], [1.0, 2.0]]}},
            ValueError,
            r"^weights\['bias'\] cannot be read as an array",
        ),
        (
            {"weights": {"bias": None}},
            ValueError,
            r"^the average of 'bias' has shape \(2,\), its weights \(\)",
        ),
    ],
)
def test_arguments_that_do_not_serve_are_named(changes, error, message, recorded):
    state_dict = recorded["float64"][0].state_dict
    arguments = {"state_dict": state_dict, "names": NAMES, "to_params": to_params}
    with pytest.raises(error, match=message):
        state_from_torch(**(arguments | changes))


@pytest.mark.parametrize("as_id", [np.int64, str])
def test_ids_may_be_numbers_of_numpy_or_names(as_id, recorded):
    _, state_dict = recorded["float64"][0]
    expected = state_from_torch(state_dict, NAMES, to_params)
    (group,) = state_dict["param_groups"]
    group["params"] = [as_id(id_) for id_ in group["params"]]
    state_dict["state"] = {as_id(i): e for i, e in state_dict["state"].items()}
    assert bits(state_from_torch(state_dict, NAMES, to_params)) == bits(expected)
    assert hyperparams_from_torch(state_dict) == HYPERPARAMS


def test_names_that_torch_has_twice_do_no_harm(recorded):
    """As of the parameters of two modules, each told without its prefix."""
    _, state_dict = recorded["float64"][0]
    expected = state_from_torch(state_dict, NAMES, to_params)
    for noted in (["weight"] * 4, [], None):
        state_dict["param_groups"][0]["param_names"] = noted
        assert bits(state_from_torch(state_dict, NAMES, to_params)) == bits(expected)


@pytest.mark.parametrize(
    "changes", [{"params": None}, {"params": [0, 1, 1, 3]}, {"maximize": "no"}]
)
def test_hyperparams_are_read_as_strictly(changes, recorded):
    _, state_dict = recorded["float64"][0]
    state_dict["param_groups"][0].update(changes)
    with pytest.raises((TypeError, ValueError)) as expected:
        state_from_torch(state_dict, NAMES, to_params)
    with pytest.raises(expected.type) as found:
        hyperparams_from_torch(state_dict)
    assert str(found.value) == str(expected.value).replace(LISTED, "")


def test_shapes_that_do_not_fit_the_params_are_told_by_the_update(recorded):
    weights, state_dict = recorded["float32"][0]
    params = on_device(to_params(weights))
    state = state_from_torch(state_dict, NAMES, lambda w: w | {"bias": w["bias"][None]})
    with pytest.raises(ValueError, match=r"state.ax has no leaf \['blocks'\]"):
        asgd().update(params, state, params)


def a_state(**changes):
    params = on_device(to_params(draw_run(CASES["float32"])[0]))
    return asgd(**HYPERPARAMS).init(params)._replace(**changes)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"state": (a_state(),)}, TypeError, r"an ASGDState, such as opt_state\[-1\]"),
        ({"state": a_state(step=jnp.zeros(3))}, ValueError, r"shape \(3,\).*one run"),
        *(
            ({"state": a_state(step=step)}, ValueError, "^state.step must be a whole")
            for step in (-3, 2.7, jnp.float32(2.7), np.nan, np.inf, 2**31)
        ),
        *(
            ({"state": a_state(step=step)}, TypeError, "^state.step must be a number")
            for step in (None, True, "5", 3j)
        ),
        ({"state": a_state(eta=np.nan)}, ValueError, "^state.eta must not be .* NaN"),
        ({"state": a_state(eta=-1.0)}, ValueError, "^state.eta must not be negative"),
        ({"state": a_state(eta=None)}, TypeError, "^state.eta must be a number"),
        ({"state": a_state(mu=np.inf)}, ValueError, "^state.mu must be finite"),
        ({"state": a_state(mu=2.0)}, ValueError, "^state.mu must be at most 1; got 2"),
        ({"names": None}, TypeError, "^names must be a list of strings; got None"),
        ({"names": set(NAMES)}, TypeError, "^names must be a list of strings; got {"),
        ({"from_params": None}, TypeError, "^from_params must be a function; got None"),
        ({"maximize": "no"}, TypeError, "^maximize must be True or False; got 'no'"),
        ({"maximize": None}, TypeError, "^maximize must be True or False; got None"),
        ({"lambd": None}, TypeError, "^lambd must be a number; got None"),
        ({"names": "bias"}, TypeError, "names must be a list of strings"),
        ({"names": [*NAMES, "bias"]}, ValueError, "'bias' more than once"),
        ({"names": NAMES[1:]}, ValueError, r"lacks \[\] and has \['conv.weight'\]"),
        ({"names": [*NAMES, "x"]}, ValueError, r"lacks \['x'\] and has \[\] besides"),
        ({"from_params": jax.tree.leaves}, TypeError, "a mapping .* got a list"),
        (
            {"from_params": lambda p: from_params(p) | {"bias": NOT_FINITE}},
            ValueError,
            "the average of 'bias' is not finite",
        ),
        ({"learning_rate": -1.0}, ValueError, "^learning_rate must not be negative"),
        ({"learning_rate": lambda n: 0.1}, TypeError, "^learning_rate must be a num"),
        ({"t0": np.nan}, ValueError, "^t0 must not be negative or NaN"),
    ],
)
def test_a_state_that_cannot_go_to_torch_is_refused(changes, error, message):
    arguments = {"state": a_state(), "names": NAMES, "from_params": from_params}
    with pytest.raises(error, match=message):
        state_to_torch(**(arguments | HYPERPARAMS | changes))


def test_a_traced_argument_cannot_go_to_torch():
    state = a_state()
    arguments = {"names": NAMES, "from_params": from_params} | HYPERPARAMS

    @jax.jit
    def hand_back(changes):
        state_to_torch(**({"state": state} | arguments | changes))

    with pytest.raises(TypeError, match="^learning_rate is traced: torch's state is"):
        hand_back({"learning_rate": 0.1})
    with pytest.raises(TypeError, match="^state.step is traced: torch's state is"):
        hand_back({"state": state})


def test_only_the_way_back_needs_torch(monkeypatch, recorded):
    monkeypatch.setitem(sys.modules, "torch", None)
    hyperparams = hyperparams_from_torch(recorded["float32"][0].state_dict)
    state = state_from_torch(recorded["float32"][0].state_dict, NAMES, to_params)
    with pytest.raises(ImportError, match=r"needs PyTorch: pip install .*\[torch\]"):
        state_to_torch(state, NAMES, from_params, **hyperparams)


def test_is_not_imported_with_the_package():
    code = "import asgd_optax, sys; assert 'asgd_optax.torch' not in sys.modules"
    code += "; import asgd_optax.torch; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


# What follows needs a live torch.


@pytest.mark.torch
@pytest.mark.parametrize("name", IDENTICAL)
def test_there_and_back(name):
    """15 steps in torch, 15 here and 10 in torch are 40 in torch."""
    pytest.importorskip("torch")
    case = CASES[name]
    weights, gradients = draw_run(case)
    alone = train_torch(case, weights, gradients, last=END)
    snapshot = train_torch(case, weights, gradients, last=OUT)
    with precision_of(case.dtype), default_dtype_for(case.dtype):
        params, state, hyperparams = go_on(case, snapshot, gradients)
        handed_back = state_to_torch(
            state,
            NAMES,
            from_params,
            **hyperparams,
            maximize=case.arguments.get("maximize", False),
        )
        weights = {name: np.array(x) for name, x in from_params(params).items()}
    # Loading replaces the arguments with which an optimizer was made.
    other = case._replace(arguments={"lr": 9.0, "lambd": 9.0, "t0": 0})
    again = train_torch(
        other, weights, gradients, first=BACK, last=END, state_dict=handed_back
    )
    chex.assert_trees_all_close(again.weights, alone.weights, rtol=tolerance(case))
    averages = averages_in(again.state_dict)
    chex.assert_trees_all_close(
        averages, averages_in(alone.state_dict), rtol=tolerance(case)
    )
    (own,) = again.state_dict["param_groups"]
    (expected,) = alone.state_dict["param_groups"]
    for key in ("lr", "lambd", "alpha", "t0", "weight_decay", "maximize"):
        assert own[key] == pytest.approx(expected[key], rel=1e-13)


@pytest.mark.torch
def test_groups_there_and_back():
    pytest.importorskip("torch")
    case = CASES["groups"]
    weights, gradients = draw_run(case)
    alone = train_torch(case, weights, gradients, last=END)
    snapshot = train_torch(case, weights, gradients, last=OUT)
    names = {"decayed": NAMES[:-1], "free": NAMES[-1:]}
    handed_back = {"state": {}, "param_groups": []}
    with precision_of(case.dtype), default_dtype_for(case.dtype):
        params = on_device(to_params(snapshot.weights))
        tx, opt_state = take_over_groups(snapshot, names)
        params, opt_state = train_here(tx, params, opt_state, gradients, OUT, BACK)
        weights = {name: np.array(x) for name, x in from_params(params).items()}
        groups = snapshot.state_dict["param_groups"]
        for (label, own), group in zip(names.items(), groups, strict=True):
            inner = opt_state.inner_states[label]
            part = state_to_torch(
                inner.inner_state._replace(ax=averaged_params(inner, params)),
                own,
                lambda ax, own=own: {name: from_params(ax)[name] for name in own},
                **hyperparams_from_torch({"state": {}, "param_groups": [group]}),
            )
            done = len(handed_back["state"])
            ids = [done + id_ for id_ in part["state"]]
            handed_back["state"] |= dict(zip(ids, part["state"].values(), strict=True))
            handed_back["param_groups"] += [part["param_groups"][0] | {"params": ids}]
    again = train_torch(
        case, weights, gradients, first=BACK, last=END, state_dict=handed_back
    )
    chex.assert_trees_all_close(again.weights, alone.weights, rtol=1e-12)
    averages = averages_in(again.state_dict)
    chex.assert_trees_all_close(averages, averages_in(alone.state_dict), rtol=1e-12)


@pytest.mark.torch
@pytest.mark.parametrize("name", CASES)
def test_live_torch_is_as_recorded(name, recorded):
    """And tensors are read as their arrays are."""
    torch = pytest.importorskip("torch")
    case = CASES[name]
    snapshot = train_torch(case, *draw_run(case), last=OUT)
    before = recorded[name][0]
    as_json = json.loads(json.dumps(snapshot.state_dict["param_groups"]))
    assert as_json == before.state_dict["param_groups"]
    rtol = tolerance(case) if case.dtype != "bfloat16" else 0.01
    chex.assert_trees_all_close(snapshot.weights, before.weights, rtol=rtol)
    if name in IDENTICAL:
        chex.assert_trees_all_close(
            averages_in(snapshot.state_dict), averages_in(before.state_dict), rtol=rtol
        )
    for entry in snapshot.state_dict["state"].values():
        assert all(isinstance(value, torch.Tensor) for value in entry.values())


@pytest.mark.torch
@pytest.mark.parametrize("name", [*IDENTICAL, "bfloat16"])
def test_tensors_and_arrays_make_the_same_state(name):
    pytest.importorskip("torch")
    case = CASES[name]
    _, state_dict = train_torch(case, *draw_run(case), last=OUT)
    arrays = {
        id_: {key: array_of(tensor) for key, tensor in entry.items()}
        for id_, entry in state_dict["state"].items()
    }
    with precision_of(case.dtype):
        of_tensors = state_from_torch(state_dict, NAMES, to_params)
        of_arrays = state_from_torch(state_dict | {"state": arrays}, NAMES, to_params)
    assert bits(of_tensors) == bits(of_arrays)


@pytest.mark.torch
@pytest.mark.parametrize("dtype", ["float32", "float64", "complex64", "bfloat16"])
def test_the_state_handed_back_is_as_torchs_own(dtype):
    torch = pytest.importorskip("torch")
    case = CASES[dtype]
    snapshot = train_torch(case, *draw_run(case), last=OUT)
    with precision_of(dtype), default_dtype_for(dtype):
        state = state_from_torch(snapshot.state_dict, NAMES, to_params)
        if dtype == "bfloat16":  # which a model in 16 bits may convert back to
            state = state._replace(
                ax=jax.tree.map(lambda x: x.astype(jnp.bfloat16), state.ax)
            )
        hyperparams = hyperparams_from_torch(snapshot.state_dict)
        # Views of the state's own memory, transposed.
        arrays = jax.tree.map(np.asarray, state.ax)
        found = state_to_torch(
            state, NAMES, lambda ax: from_params(arrays), **hyperparams
        )
    assert found["param_groups"] == snapshot.state_dict["param_groups"]
    assert found["state"].keys() == snapshot.state_dict["state"].keys()
    for id_, entry in snapshot.state_dict["state"].items():
        assert found["state"][id_].keys() == entry.keys()
        for key, tensor in entry.items():
            own = found["state"][id_][key]
            assert own.dtype == tensor.dtype
            assert own.is_contiguous()
            assert torch.equal(own, tensor)
    storages = [x.data_ptr() for e in found["state"].values() for x in e.values()]
    assert len(set(storages)) == 4 * len(NAMES)
    # Torch writes to its tensors.
    before = bits(state)
    for entry in found["state"].values():
        entry["ax"].zero_()
    assert bits(state) == before


@pytest.mark.torch
def test_of_a_compensated_average_the_value_is_handed_back():
    pytest.importorskip("torch")
    value = to_params(draw_run(CASES["float32"])[0])
    residual = jax.tree.map(lambda x: np.full_like(x, 1e-9), value)
    state = a_state(ax=CompensatedMean(value, residual))
    found = state_to_torch(state, NAMES, from_params, **HYPERPARAMS)
    assert bits(averages_in(found)) == bits(from_params(value))


@pytest.mark.torch
def test_tensors_of_every_sort_are_read():
    torch = pytest.importorskip("torch")

    def read(ax, dtype=None):
        entry = {"step": torch.tensor(3.0), "eta": torch.tensor(0.1)}
        entry |= {"mu": torch.tensor(1.0), "ax": ax}
        group = torch.optim.ASGD([torch.zeros(1)]).state_dict()["param_groups"]
        state_dict = {"state": {0: entry}, "param_groups": group}
        return state_from_torch(state_dict, ["w"], lambda w: w["w"]).ax

    z = torch.tensor([1 + 2j, 3 - 1j])
    np.testing.assert_array_equal(read(z.conj()), [1 - 2j, 3 + 1j])
    np.testing.assert_array_equal(read(z.conj().imag), [-2, 1])
    leaf = torch.nn.Parameter(torch.tensor([1.5, 2.5]))
    np.testing.assert_array_equal(read(leaf), [1.5, 2.5])
    np.testing.assert_array_equal(read(leaf * 2), [3, 5])
    for dtype in (torch.bfloat16, torch.float16):
        average = read(leaf.to(dtype))
        assert average.dtype == jnp.float32
        np.testing.assert_array_equal(average, [1.5, 2.5])
    for bad in (torch.zeros(2, device="meta"), torch.eye(2).to_sparse()):
        with pytest.raises(ValueError, match="the average of 'w' cannot be read"):
            read(bad)


@pytest.mark.torch
def test_arguments_of_torch_that_say_nothing_about_the_state():
    torch = pytest.importorskip("torch")
    parameter = torch.nn.Parameter(torch.ones(3))
    expected = None
    for options in ({}, {"capturable": False}, {"foreach": True}, {"foreach": False}):
        optimizer = torch.optim.ASGD(
            [("w", parameter)], lr=torch.tensor(0.125), t0=0, **options
        )
        parameter.grad = torch.ones(3)
        optimizer.step()
        state_dict = optimizer.state_dict()
        state_dict["param_groups"][0]["capturable"] = True
        hyperparams = hyperparams_from_torch(state_dict)
        assert hyperparams["learning_rate"] == 0.125
        state = state_from_torch(state_dict, ["w"], lambda w: w)
        assert state.step == 1
        expected = expected or hyperparams
        assert hyperparams == expected


@pytest.mark.torch
def test_a_model_with_buffers_and_tied_weights():
    torch = pytest.importorskip("torch")
    model = torch.nn.ModuleDict(
        {
            "embedding": torch.nn.Embedding(5, 3),
            "norm": torch.nn.BatchNorm1d(3),
            "head": torch.nn.Linear(3, 5),
        }
    )
    model["head"].weight = model["embedding"].weight
    optimizer = torch.optim.ASGD(model.parameters(), lr=0.1, t0=0)
    for tokens in torch.arange(12).reshape(3, 4) % 5:
        optimizer.zero_grad()
        logits = model["head"](model["norm"](model["embedding"](tokens)))
        torch.nn.functional.cross_entropy(logits, tokens).backward()
        optimizer.step()
    state_dict = optimizer.state_dict()

    def convert(averages):
        return {
            "embedding": averages["embedding.weight"],
            "norm": [averages["norm.weight"], averages["norm.bias"]],
            "head_bias": averages["head.bias"],
        }

    names = [name for name, _ in model.named_parameters()]
    state = state_from_torch(state_dict, names, convert, weights=model.state_dict())
    average = optimizer.state[model["head"].weight]["ax"]
    np.testing.assert_array_equal(state.ax["embedding"], average)
    # Those of the state dict are more: the buffers, and the tied weight twice.
    with pytest.raises(ValueError, match="8 names for 4 .*buffers, and tied weights"):
        state_from_torch(state_dict, list(model.state_dict()), convert)


@pytest.mark.torch
@pytest.mark.parametrize("foreach", [False, True])
def test_torch_counts_on_where_its_own_counter_stops(foreach):
    torch = pytest.importorskip("torch")
    # An odd number, of which there is none in float32.
    state = ASGDState(jnp.asarray(2**24 + 1), 0.5, 1.0, jnp.ones(2))
    arguments = HYPERPARAMS | {"lambd": 0.0}
    handed = state_to_torch(state, ["w"], lambda ax: {"w": ax}, **arguments)
    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.ASGD([parameter], foreach=foreach)
    handed["param_groups"][0]["foreach"] = foreach
    optimizer.load_state_dict(handed)
    parameter.grad = torch.ones(2)
    optimizer.step()
    state_dict = optimizer.state_dict()
    again = state_from_torch(state_dict, ["w"], lambda w: w["w"])
    assert again.step == 2**24 + 2
    assert again.mu == np.float32(1 / (2**24 + 2 - 5))
    state_dict["state"][0]["step"] = torch.tensor(2.0**24)  # a counter that stopped
    assert state_from_torch(state_dict, ["w"], lambda w: w["w"]).step == 2**24


@pytest.mark.torch
def test_torch_and_we_read_a_state_of_torch_1_8():
    torch = pytest.importorskip("torch")
    entry = {"step": 7, "eta": 0.05, "mu": 0.25, "ax": torch.tensor([1.0, 2.0])}
    group = {"lr": 0.1, "lambd": 1e-4, "alpha": 0.75, "t0": 3.0, "weight_decay": 0}
    state_dict = {"state": {0: entry}, "param_groups": [group | {"params": [0]}]}
    optimizer = torch.optim.ASGD([torch.nn.Parameter(torch.zeros(2))])
    optimizer.load_state_dict(copy.deepcopy(state_dict))
    todays = optimizer.state_dict()
    assert torch.is_tensor(todays["state"][0]["eta"])
    states = [state_from_torch(d, ["w"], dict) for d in (state_dict, todays)]
    assert bits(states[0]) == bits(states[1])
    assert hyperparams_from_torch(state_dict) == hyperparams_from_torch(todays)
