# SPDX-License-Identifier: Apache-2.0
"""Moving a run between `torch.optim.ASGD` and `asgd`, recorded and with live torch."""

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
from tests.pages import HOW_TO, blocks_of, run
from tests.support import bits, precision_of, stacked, train_step
from tools.record_torch_state_fixtures import (
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

# Runs that continue in JAX as they would have in torch.
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
    """Transpose, stack and rename."""
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
    return jax.tree.map(lambda x: jnp.array(x, copy=True), tree)


def tolerance(case):
    eps = float(jnp.finfo(case.dtype).eps)
    return 300 * eps if eps > 1e-10 else 1e-12


@functools.cache
def _recorded():
    return read_fixtures()


@pytest.fixture
def recorded():
    """The recorded snapshots, as copies that a test may change."""
    return copy.deepcopy(_recorded()[1])


def a_state(**changes):
    params = on_device(to_params(draw_run(CASES["float32"])[0]))
    return asgd(**HYPERPARAMS).init(params)._replace(**changes)


def transformation(case, state_dict):
    """Return the transformation for a state of torch, and the hyperparameters."""
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


def train_here(tx, params, opt_state, gradients, first=OUT, last=BACK):
    for step in range(first, last):
        grads = to_params({name: g[step] for name, g in gradients.items()})
        params, opt_state = compiled_step(tx, params, opt_state, grads)
    return params, opt_state


def continue_here(case, snapshot, gradients):
    """Train from `OUT` to `BACK`; return params, state and hyperparameters."""
    tx, hyperparams = transformation(case, snapshot.state_dict)
    params = on_device(to_params(snapshot.weights))
    state = state_from_torch(snapshot.state_dict, NAMES, to_params)
    opt_state = (*tx.init(params)[:-1], state)
    params, opt_state = train_here(tx, params, opt_state, gradients)
    return params, opt_state[-1], hyperparams


def take_over_groups(snapshot, names):
    """Take over groups with the guide's function; freeze parameters without a label.

    Args:
      snapshot: a run of torch, with one group for each label in `names`.
      names: parameter names by label.
    """
    page = HOW_TO / "move_a_torch_job.md"
    (block,) = [b for b in blocks_of(page) if "def take_over_groups" in b]
    namespace = {"asgd": asgd, "jax": jax, "optax": optax}
    run(block, page, namespace)
    label_of = {name: label for label, own in names.items() for name in own}
    labels = {
        "conv": {"kernel": label_of.get("conv.weight", "frozen")},
        "blocks": label_of["blocks.0.weight"],
        "shift": label_of["bias"],
    }
    transforms, states = namespace["take_over_groups"](
        snapshot.state_dict, names, snapshot.weights, to_params, labels
    )
    transforms["frozen"] = optax.set_to_zero()
    states["frozen"] = optax.MaskedState(optax.EmptyState())
    return optax.partition(transforms, labels), optax.PartitionState(states)


def averages_in(state_dict):
    """Return the averages in a state dict of tensors or arrays, as arrays by name."""
    averages = (state_dict["state"][i]["ax"] for i in range(len(NAMES)))
    arrays = (array_of(x) if hasattr(x, "detach") else x for x in averages)
    return dict(zip(NAMES, arrays, strict=True))


def assert_snapshots_close(actual, expected, rtol):
    chex.assert_trees_all_close(actual.weights, expected.weights, rtol=rtol)
    averages = averages_in(actual.state_dict)
    chex.assert_trees_all_close(averages, averages_in(expected.state_dict), rtol=rtol)


def test_fixtures_match_the_recipe():
    assert _recorded()[0] == RECIPE, "run tools/record_torch_state_fixtures.py"


@pytest.mark.parametrize("name", [*IDENTICAL, "bfloat16"])
def test_state_from_torch_is_exact(name, recorded):
    weights, state_dict = recorded[name][0]
    with precision_of(CASES[name].dtype):
        state = state_from_torch(state_dict, NAMES, to_params)
        params = on_device(to_params(weights))
        fresh = asgd(**HYPERPARAMS).init(params)
        chex.assert_trees_all_equal_structs(state, fresh)
        chex.assert_trees_all_equal_shapes_and_dtypes(state, fresh)
        assert not any(leaf.weak_type for leaf in jax.tree.leaves(state))
        averages = to_params(averages_in(state_dict))
        widened = jax.tree.map(lambda x, own: x.astype(own.dtype), averages, state.ax)
        assert bits(state.ax) == bits(widened)
        if name == "before t0":
            assert bits(state.ax) == bits(params)
        first = state_dict["state"][0]
        assert (state.step, state.eta, state.mu) == (OUT, first["eta"], first["mu"])


@pytest.mark.parametrize("name", IDENTICAL)
def test_run_continues_as_torch_did(name, recorded):
    case = CASES[name]
    _, gradients = draw_run(case)
    before, after = recorded[name]
    with precision_of(case.dtype):
        params, state, _ = continue_here(case, before, gradients)
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


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("groups", {"decayed": NAMES[:3], "free": NAMES[3:]}),
        ("a late gradient", {"early": NAMES[:3], "late": NAMES[3:]}),
        ("never a gradient", {"trained": NAMES[1:]}),
    ],
)
def test_parts_continue_as_torch_did_under_partition(name, parts, recorded):
    before, after = recorded[name]
    _, gradients = draw_run(CASES[name])
    if name != "groups":
        (group,) = before.state_dict["param_groups"]
        group["param_names"] = NAMES  # torch has them if it received names
        before.state_dict["param_groups"] = [
            group | {"params": [NAMES.index(name) for name in own]}
            for own in parts.values()
        ]
    with precision_of("float64"):
        params = on_device(to_params(before.weights))
        tx, opt_state = take_over_groups(before, parts)
        chex.assert_trees_all_equal_structs(opt_state, tx.init(params))
        params, opt_state = train_here(tx, params, opt_state, gradients)
        chex.assert_trees_all_close(from_params(params), after.weights, rtol=1e-12)
        averages = from_params(averaged_params(opt_state, params))
        entries = after.state_dict["state"]
        for id_, entry in entries.items():
            np.testing.assert_allclose(averages[NAMES[id_]], entry["ax"], 1e-12)
        assert len(entries) == sum(map(len, parts.values()))


def test_equal_groups_make_one_state(recorded):
    _, state_dict = recorded["float64"][0]
    expected = state_from_torch(state_dict, NAMES, to_params)
    (group,) = state_dict["param_groups"]
    state_dict["param_groups"] = [
        group | {"params": ids} for ids in ([0], [], [1, 2, 3])
    ]
    state = state_from_torch(state_dict, NAMES, to_params)
    assert bits(state) == bits(expected)
    assert hyperparams_from_torch(state_dict) == HYPERPARAMS


def test_state_of_torch_1_8_is_read(recorded):
    """Torch 1.8 kept Python numbers and had fewer arguments."""
    _, state_dict = recorded["float64"][0]
    expected = state_from_torch(state_dict, NAMES, to_params)
    for entry in state_dict["state"].values():
        entry["step"] = int(entry["step"])
        entry |= {key: float(entry[key]) for key in ("eta", "mu")}
    (group,) = state_dict["param_groups"]
    group["t0"] = 5
    for key in ("foreach", "maximize", "differentiable", "capturable"):
        del group[key]
    hyperparams = hyperparams_from_torch(state_dict)
    assert hyperparams == HYPERPARAMS
    assert {type(value) for value in hyperparams.values()} == {float}
    assert bits(state_from_torch(state_dict, NAMES, to_params)) == bits(expected)


def test_eta_and_mu_are_read_in_the_most_precise_dtype(recorded):
    _, state_dict = recorded["float64"][0]
    expected = state_from_torch(state_dict, NAMES, to_params)
    # Torch casts them so when it loads the state of a bfloat16 parameter.
    first = state_dict["state"][0]
    first |= {key: first[key].astype(ml_dtypes.bfloat16) for key in ("eta", "mu")}
    state = state_from_torch(state_dict, NAMES, to_params)
    assert (state.eta, state.mu) == (expected.eta, expected.mu)
    first["eta"] = np.array(0.2, ml_dtypes.bfloat16)
    with pytest.raises(ValueError, match=r"eta is 0.09.* but 0.2.* for 'conv.weight'"):
        state_from_torch(state_dict, NAMES, to_params)


def test_parameter_without_a_gradient_gets_its_weights(recorded):
    weights, state_dict = recorded["never a gradient"][0]
    with pytest.raises(ValueError, match=r"no average of 'conv.weight'.*weights="):
        state_from_torch(state_dict, NAMES, to_params)
    buffers = {"norm.num_batches_tracked": np.array(3)}
    state = state_from_torch(state_dict, NAMES, to_params, weights=weights | buffers)
    averages = from_params(state.ax)
    expected = {"conv.weight": weights["conv.weight"]}
    expected |= {NAMES[i]: entry["ax"] for i, entry in state_dict["state"].items()}
    for name in NAMES:
        np.testing.assert_array_equal(averages[name], np.float32(expected[name]))
    assert state.step == OUT


def test_optimizer_before_its_first_step_gives_the_initial_state(recorded):
    weights, state_dict = recorded["float64"][0]
    fresh = asgd(**HYPERPARAMS).init(on_device(to_params(weights)))
    state_dict["state"] = {}
    state = state_from_torch(state_dict, NAMES, to_params, weights=weights)
    assert bits(state) == bits(fresh)


def test_state_shares_no_memory_with_the_state_dict(recorded):
    _, state_dict = recorded["float32"][0]
    before = bits(state_dict)

    def change(averages):
        params = to_params(averages)
        for average in averages.values():
            average *= 2
        return params

    state_from_torch(state_dict, NAMES, change)
    assert bits(state_dict) == before
    state = state_from_torch(state_dict, NAMES, to_params)
    expected = bits(state)
    for entry in state_dict["state"].values():
        entry["ax"] *= 2
    assert bits(state) == expected


@pytest.mark.flax
def test_nnx_optimizer_continues_as_plain_optax(recorded):
    from flax import nnx

    class Network(nnx.Module):
        def __init__(self):
            self.conv = nnx.Dict(kernel=nnx.Param(jnp.ones((2, 3, 1, 2))))
            self.blocks = nnx.Param(jnp.ones((2, 3, 2)))
            self.shift = nnx.Param(jnp.ones(2))

    weights, state_dict = recorded["float32"][0]
    state = state_from_torch(state_dict, NAMES, to_params)
    params = on_device(to_params(weights))
    clip = optax.clip_by_global_norm(0.5)
    tx = optax.chain(clip, asgd(**hyperparams_from_torch(state_dict)))
    opt_state = (*tx.init(params)[:-1], state)
    model = Network()
    nnx.update(model, params)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    nnx.update(optimizer.opt_state[-1], nnx.state(state))

    grads = on_device(params)
    optimizer.update(model, nnx.State(jax.tree.map(nnx.Param, grads)))
    params, opt_state = train_step(tx, params, opt_state, grads)
    assert bits(nnx.state(model, nnx.Param)) == bits(params)
    assert bits(optimizer.opt_state) == bits(opt_state)


def entry_with(id_, **changes):
    return lambda state_dict: state_dict["state"][id_].update(changes)


def group_with(**changes):
    return lambda state_dict: state_dict["param_groups"][0].update(changes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (entry_with(3, ax=np.array([1.0, np.nan])), "average of 'bias' is not finite"),
        (entry_with(3, ax=np.ones(3)), r"shape \(3,\), but .* shape \(2,\)"),
        (entry_with(3, step=12.0), "'conv.weight' at 15, 'bias' at 12;.*partition"),
        (entry_with(2, mu=0.5), "mu is 0.1 for .* but 0.5 for 'blocks.1.weight'"),
        (group_with(params=[0, 1, 2]), "got 4 names .* for 3 parameters.*no buffers"),
        (
            group_with(param_names=["conv.weight", "bias", "blocks.0.weight", "x"]),
            "in torch's order: got 'blocks.0.weight' where torch has 'bias'",
        ),
        (
            lambda state_dict: state_dict.pop("param_groups"),
            r"got the keys \['state'\]",
        ),
    ],
)
def test_state_from_torch_explains_what_is_wrong(change, message, recorded):
    weights, state_dict = recorded["float64"][0]
    change(state_dict)
    with pytest.raises(ValueError, match=message):
        state_from_torch(state_dict, NAMES, to_params, weights=weights)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("groups", r"lr is 0.1 in .*\[0\], but 0.05 in .*\[1\];.*optax.partition"),
        ("Adam", r"torch.optim.ASGD, but .*\[0\] lacks \['lambd', 'alpha', 't0'\]"),
    ],
)
def test_different_groups_and_other_optimizers_raise(name, message, recorded):
    _, state_dict = recorded[name][0]
    with pytest.raises(ValueError, match=message):
        hyperparams_from_torch(state_dict)
    with pytest.raises(ValueError, match=message):
        state_from_torch(state_dict, NAMES, to_params)


@pytest.mark.parametrize(
    "names", [NAMES[:3], [*NAMES, "norm.mean"], [*NAMES[:3], NAMES[0]]]
)
def test_wrong_number_of_names_raises(names, recorded):
    with pytest.raises(ValueError, match=r"^expected one name per parameter: got \d"):
        state_from_torch(recorded["float64"][0].state_dict, names, to_params)


@pytest.mark.parametrize("noted", [["weight"] * 4, [f"m.{name}" for name in NAMES]])
def test_names_that_torch_does_not_know_are_accepted(noted, recorded):
    _, state_dict = recorded["float64"][0]
    expected = state_from_torch(state_dict, NAMES, to_params)
    state_dict["param_groups"][0]["param_names"] = noted
    assert bits(state_from_torch(state_dict, NAMES, to_params)) == bits(expected)


@pytest.mark.parametrize(
    ("convert", "error", "message"),
    [
        (lambda w: {"x": w["bias"]}, ValueError, "26 numbers; it returned 2.*'conv"),
        (lambda w: w | {"tied": w["bias"]}, ValueError, "26 numbers; it returned 28"),
        (lambda w: w | {"bias": w["bias"] > 0}, TypeError, r"\['bias'\] \(bool\)"),
        (lambda w: {"x": w["head.bias"]}, KeyError, "head.bias"),
    ],
)
def test_wrong_to_params_raises(convert, error, message, recorded):
    with pytest.raises(error, match=message) as raised:
        state_from_torch(recorded["float64"][0].state_dict, NAMES, convert)
    if error is KeyError:
        assert "'bias': (2,)" in raised.value.__notes__[0]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"state": (a_state(),)}, TypeError, r"an ASGDState, such as opt_state\[-1\]"),
        ({"state": stacked([a_state()] * 3)}, ValueError, r"one run.*shape \(3,\)"),
        ({"names": [*NAMES[1:], "x"]}, ValueError, r"\['x'\].*: \['conv.weight'\]"),
        ({"names": [*NAMES, "bias"]}, ValueError, "exactly `names`, each once"),
        (
            {"from_params": lambda p: from_params(p) | {"bias": np.array([1, np.inf])}},
            ValueError,
            "the average of 'bias' is not finite",
        ),
        ({"learning_rate": -1.0}, ValueError, "^learning_rate must not be negative"),
        ({"learning_rate": lambda n: 0.1}, TypeError, "^learning_rate must be a num"),
    ],
)
def test_state_to_torch_explains_what_is_wrong(changes, error, message):
    arguments = {"state": a_state(), "names": NAMES, "from_params": from_params}
    with pytest.raises(error, match=message):
        state_to_torch(**(arguments | HYPERPARAMS | changes))


def test_only_state_to_torch_needs_torch(monkeypatch, recorded):
    monkeypatch.setitem(sys.modules, "torch", None)
    hyperparams = hyperparams_from_torch(recorded["float32"][0].state_dict)
    state = state_from_torch(recorded["float32"][0].state_dict, NAMES, to_params)
    with pytest.raises(ImportError, match=r"needs PyTorch.*pip install '\.\[torch\]'"):
        state_to_torch(state, NAMES, from_params, **hyperparams)


def test_package_does_not_import_torch():
    code = "import asgd_optax, sys; assert 'asgd_optax.torch' not in sys.modules"
    code += "; import asgd_optax.torch; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


# The remaining tests need a live torch.


@pytest.mark.torch
@pytest.mark.parametrize("name", IDENTICAL)
def test_run_there_and_back_ends_as_in_torch_alone(name):
    pytest.importorskip("torch")
    case = CASES[name]
    weights, gradients = draw_run(case)
    alone = train_torch(case, weights, gradients, last=END)
    snapshot = train_torch(case, weights, gradients, last=OUT)
    with precision_of(case.dtype), default_dtype_for(case.dtype):
        params, state, hyperparams = continue_here(case, snapshot, gradients)
        exported = state_to_torch(
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
        other, weights, gradients, first=BACK, last=END, state_dict=exported
    )
    assert_snapshots_close(again, alone, tolerance(case))


@pytest.mark.torch
def test_groups_there_and_back_end_as_in_torch_alone():
    pytest.importorskip("torch")
    case = CASES["groups"]
    weights, gradients = draw_run(case)
    alone = train_torch(case, weights, gradients, last=END)
    snapshot = train_torch(case, weights, gradients, last=OUT)
    names = {"decayed": NAMES[:-1], "free": NAMES[-1:]}
    exported = {"state": {}, "param_groups": []}
    with precision_of(case.dtype), default_dtype_for(case.dtype):
        params = on_device(to_params(snapshot.weights))
        tx, opt_state = take_over_groups(snapshot, names)
        params, opt_state = train_here(tx, params, opt_state, gradients)
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
            done = len(exported["state"])
            ids = [done + id_ for id_ in part["state"]]
            exported["state"] |= dict(zip(ids, part["state"].values(), strict=True))
            exported["param_groups"] += [part["param_groups"][0] | {"params": ids}]
    again = train_torch(
        case, weights, gradients, first=BACK, last=END, state_dict=exported
    )
    assert_snapshots_close(again, alone, 1e-12)


@pytest.mark.torch
@pytest.mark.parametrize("name", CASES)
def test_live_torch_agrees_with_the_recorded_states(name, recorded):
    pytest.importorskip("torch")
    case = CASES[name]
    snapshot = train_torch(case, *draw_run(case), last=OUT)
    before = recorded[name][0]
    as_json = json.loads(json.dumps(snapshot.state_dict["param_groups"]))
    assert as_json == before.state_dict["param_groups"]
    if name in IDENTICAL:
        assert_snapshots_close(snapshot, before, tolerance(case))
    else:
        rtol = tolerance(case) if case.dtype != "bfloat16" else 0.01
        chex.assert_trees_all_close(snapshot.weights, before.weights, rtol=rtol)


@pytest.mark.torch
@pytest.mark.parametrize("dtype", ["float32", "float64", "complex64", "bfloat16"])
def test_state_to_torch_equals_torchs_own_state(dtype):
    torch = pytest.importorskip("torch")
    case = CASES[dtype]
    snapshot = train_torch(case, *draw_run(case), last=OUT)
    with precision_of(dtype), default_dtype_for(dtype):
        state = state_from_torch(snapshot.state_dict, NAMES, to_params)
        if dtype == "bfloat16":  # a 16-bit model may cast its averages back
            state = state._replace(
                ax=jax.tree.map(lambda x: x.astype(jnp.bfloat16), state.ax)
            )
        hyperparams = hyperparams_from_torch(snapshot.state_dict)
        # Transposed views of the state's own memory.
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
    before = bits(state)
    for entry in found["state"].values():
        entry["ax"].zero_()
    assert bits(state) == before


@pytest.mark.torch
def test_state_to_torch_exports_the_value_of_a_compensated_average():
    pytest.importorskip("torch")
    value = to_params(draw_run(CASES["float32"])[0])
    residual = jax.tree.map(lambda x: np.full_like(x, 1e-9), value)
    state = a_state(ax=CompensatedMean(value, residual))
    found = state_to_torch(state, NAMES, from_params, **HYPERPARAMS)
    assert bits(averages_in(found)) == bits(from_params(value))


@pytest.mark.torch
@pytest.mark.parametrize("foreach", [False, True])
def test_torch_counts_on_from_a_step_beyond_float32(foreach):
    torch = pytest.importorskip("torch")
    state = ASGDState(jnp.asarray(2**24 + 1), 0.5, 1.0, jnp.ones(2))
    arguments = HYPERPARAMS | {"lambd": 0.0}
    exported = state_to_torch(state, ["w"], lambda ax: {"w": ax}, **arguments)
    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.ASGD([parameter], foreach=foreach)
    exported["param_groups"][0]["foreach"] = foreach
    optimizer.load_state_dict(exported)
    parameter.grad = torch.ones(2)
    optimizer.step()
    state_dict = optimizer.state_dict()
    again = state_from_torch(state_dict, ["w"], lambda w: w["w"])
    assert again.step == 2**24 + 2
    assert again.mu == np.float32(1 / (2**24 + 2 - 5))
    state_dict["state"][0]["step"] = torch.tensor(2.0**24)  # a counter that stopped
    assert state_from_torch(state_dict, ["w"], lambda w: w["w"]).step == 2**24


@pytest.mark.torch
def test_model_with_buffers_and_tied_weights_is_read():
    torch = pytest.importorskip("torch")
    layers = torch.nn.Embedding(5, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 5)
    model = torch.nn.Sequential(*layers)
    model[2].weight = model[0].weight
    names = [name for name, _ in model.named_parameters()]
    lr = torch.tensor(0.125)
    optimizer = torch.optim.ASGD(model.named_parameters(), lr=lr, t0=0, foreach=True)
    model(torch.arange(5)).square().sum().backward()
    optimizer.step()
    state_dict, weights = optimizer.state_dict(), model.state_dict()
    assert hyperparams_from_torch(state_dict)["learning_rate"] == 0.125
    state = state_from_torch(state_dict, names, dict, weights=weights)
    average = optimizer.state[model[2].weight]["ax"]
    np.testing.assert_array_equal(state.ax["0.weight"], average)
    # The model's state dict has the buffers, and the tied weight twice.
    with pytest.raises(ValueError, match="got 8 names .* for 4 parameters"):
        state_from_torch(state_dict, list(weights), dict)
