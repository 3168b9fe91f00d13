# SPDX-License-Identifier: Apache-2.0
"""`update_batch_stats` against plain float64 NumPy, and `averaged_model`."""

import functools
import subprocess
import sys

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import core, linen, nnx

import asgd_optax
from asgd_optax import asgd, average_iterates, averaged_params
from asgd_optax.flax import averaged_model, update_batch_stats

pytestmark = pytest.mark.flax

FEATURES = 3
SIZES = (5, 5, 2)  # the last batch is smaller
# By default Flax computes E[x^2] - E[x]^2, and cancellation takes its digits.
ACCURATE = {"use_fast_variance": False}


def make_batches(dtype=np.float32, sizes=SIZES):
    rng = np.random.default_rng(0)
    return [
        rng.normal(b, 2.0, (n, FEATURES)).astype(dtype) for b, n in enumerate(sizes)
    ]


class NNXBlock(nnx.Module):
    def __init__(self, rngs, **options):
        self.linear = nnx.Linear(FEATURES, FEATURES, rngs=rngs)
        self.norm = nnx.BatchNorm(FEATURES, rngs=rngs, **ACCURATE, **options)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x, **options):
        return self.dropout(nnx.relu(self.norm(self.linear(x), **options)))


class Calls(nnx.Variable):
    """State that is neither a parameter nor BatchNorm's."""


class NNXNet(nnx.Module):
    """Two BatchNorms at different depths, dropout, and state of its own."""

    def __init__(self, **options):
        rngs = nnx.Rngs(0)
        self.blocks = nnx.List([NNXBlock(rngs, **options), NNXBlock(rngs, **options)])
        self.calls = Calls(jnp.zeros([], jnp.int32))

    def __call__(self, x, **options):
        self.calls[...] += 1
        for block in self.blocks:
            x = block(x, **options)
        return x


class LinenBlock(linen.Module):
    options: dict

    @linen.compact
    def __call__(self, x, **options):
        x = linen.Dense(FEATURES, name="linear")(x)
        x = linen.BatchNorm(name="norm", **ACCURATE, **self.options)(x, **options)
        self.sow("intermediates", "normalised", x)
        return linen.relu(x)


class LinenNet(linen.Module):
    options: dict

    def setup(self):
        self.blocks = [LinenBlock(self.options), LinenBlock(self.options)]

    def __call__(self, x, **options):
        for block in self.blocks:
            x = block(x, **options)
        return x


def linen_variables(net):
    """Variables of a `LinenNet`, with the weights of `NNXNet` and other statistics."""
    model = NNXNet()
    stats = {"mean": jnp.full(FEATURES, 7.0), "var": jnp.full(FEATURES, 8.0)}
    params = {
        f"blocks_{i}": {
            "linear": {
                "kernel": block.linear.kernel[...],
                "bias": block.linear.bias[...],
            },
            "norm": {"scale": jnp.ones(FEATURES), "bias": jnp.zeros(FEATURES)},
        }
        for i, block in enumerate(model.blocks)
    }
    batch_stats = {f"blocks_{i}": {"norm": dict(stats)} for i in range(2)}
    return {"params": params, "batch_stats": batch_stats}


def expected(batches, weights=None):
    """The statistics of both layers, (mean, var) each, in plain float64."""
    kernels = [np.asarray(b.linear.kernel[...], np.float64) for b in NNXNet().blocks]
    layers = []
    hidden = [np.asarray(batch, np.float64) for batch in batches]
    weights = [len(batch) for batch in batches] if weights is None else weights
    for kernel in kernels:
        hidden = [x @ kernel for x in hidden]
        means, variances = [x.mean(0) for x in hidden], [x.var(0) for x in hidden]
        layers.append(
            tuple(np.average(s, axis=0, weights=weights) for s in (means, variances))
        )
        hidden = [
            np.maximum((x - m) / np.sqrt(v + 1e-5), 0)
            for x, m, v in zip(hidden, means, variances, strict=True)
        ]
    return layers


def nnx_stats(model):
    return [(b.norm.mean[...], b.norm.var[...]) for b in model.blocks]


def linen_stats(variables):
    norms = [variables["batch_stats"][f"blocks_{i}"]["norm"] for i in range(2)]
    return [(norm["mean"], norm["var"]) for norm in norms]


def assert_same_stats(got, wanted, rtol=2e-6):
    for pair, wanted_pair in zip(got, wanted, strict=True):
        for x, y in zip(pair, wanted_pair, strict=True):
            assert x.dtype == jnp.float32
            np.testing.assert_allclose(x, y, rtol=rtol, atol=rtol)


def snapshot(model):
    """All that a call could change: every variable's bits, modes and momenta."""
    leaves = jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(nnx.state(model)))

    def bits(leaf):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        return np.asarray(leaf).tobytes()

    modes = [
        (b.norm.use_running_average, b.norm.momentum, b.dropout.deterministic)
        for b in model.blocks
    ]
    return [(jax.tree_util.keystr(path), bits(leaf)) for path, leaf in leaves], modes


def run_nnx(batches, **options):
    model = NNXNet()
    model.eval()
    update_batch_stats(model, batches, **options)
    return nnx_stats(model)


def run_linen(batches, **options):
    net = LinenNet({})
    options.setdefault("call", lambda m, x: m(x, use_running_average=True))
    return linen_stats(
        update_batch_stats(net, batches, linen_variables(net), **options)
    )


both = pytest.mark.parametrize("run", [run_nnx, run_linen])


@both
def test_statistics_are_the_weighted_means_of_the_batches(run):
    batches = make_batches()
    assert_same_stats(run(batches), expected(batches))
    assert_same_stats(run(iter(batches)), expected(batches))
    assert_same_stats(run(batches[:1]), expected(batches[:1]))


@both
def test_of_equal_batches_they_are_torchs_up_to_its_unbiased_variance(run):
    # torch's update_bn: the plain mean over batches of mean and of n / (n - 1) var.
    batches = make_batches(sizes=(4, 4, 4))
    hidden = [x @ np.asarray(NNXNet().blocks[0].linear.kernel[...]) for x in batches]
    mean, var = run(batches)[0]
    np.testing.assert_allclose(mean, np.mean([x.mean(0) for x in hidden], 0), rtol=1e-5)
    unbiased = np.mean([x.var(0, ddof=1) for x in hidden], 0)
    np.testing.assert_allclose(var * 4 / 3, unbiased, rtol=1e-5)


@pytest.mark.parametrize("momentum", [0.0, 0.9, 1.0])
@pytest.mark.parametrize("use_running_average", [None, False, True])
@pytest.mark.parametrize("before", [-1.0, 1e30, np.nan])
def test_nnx_momentum_mode_and_earlier_statistics_play_no_part(
    momentum, use_running_average, before
):
    batches = make_batches()
    model = NNXNet(momentum=momentum, use_running_average=use_running_average)
    model.set_attributes(nnx.Dropout, deterministic=True)
    for block in model.blocks:
        block.norm.mean[...] = block.norm.var[...] = jnp.full(FEATURES, before)
    update_batch_stats(model, batches)
    for got, wanted in zip(nnx_stats(model), run_nnx(batches), strict=True):
        np.testing.assert_array_equal(got, wanted)
    norm = model.blocks[1].norm
    assert (norm.momentum, norm.use_running_average) == (momentum, use_running_average)


@pytest.mark.parametrize("momentum", [0.0, 0.9, 1.0])
@pytest.mark.parametrize("before", [1e30, np.nan])
@pytest.mark.parametrize(
    ("constructed", "called"),
    [(None, False), (None, True), (False, None), (True, None), (None, None)],
)
def test_linen_momentum_mode_and_earlier_statistics_play_no_part(
    momentum, before, constructed, called
):
    batches = make_batches()
    net = LinenNet({"momentum": momentum, "use_running_average": constructed})
    variables = linen_variables(net)
    variables["batch_stats"] = jax.tree.map(
        lambda x: jnp.full_like(x, before), variables["batch_stats"]
    )
    new = update_batch_stats(
        net, batches, variables, call=lambda m, x: m(x, use_running_average=called)
    )
    for got, wanted in zip(linen_stats(new), run_linen(batches), strict=True):
        np.testing.assert_array_equal(got, wanted)


def test_linen_overrules_a_mode_that_is_told_by_position():
    batches, norm = make_batches(), linen.BatchNorm(**ACCURATE)
    variables = {"params": {"scale": jnp.ones(FEATURES), "bias": jnp.zeros(FEATURES)}}
    new = update_batch_stats(norm, batches, variables, call=lambda m, x: m(x, True))
    wanted = np.average([x.mean(0) for x in batches], axis=0, weights=SIZES)
    np.testing.assert_allclose(new["batch_stats"]["mean"], wanted, rtol=1e-5)


def test_nnx_changes_nothing_but_the_statistics():
    model = NNXNet()  # in training mode: the calls draw dropout
    model(make_batches()[0])
    (variables, modes), found = snapshot(model), nnx_stats(model)
    update_batch_stats(model, make_batches())
    now, modes_now = snapshot(model)
    assert modes_now == modes
    changed = {path for (path, x), (_, y) in zip(variables, now, strict=True) if x != y}
    assert len(changed) == 4
    assert all("norm" in p and ("mean" in p or "var" in p) for p in changed)
    assert not np.allclose(nnx_stats(model)[0], found[0])


@pytest.mark.parametrize("frozen", [False, True])
def test_linen_returns_new_variables_and_leaves_the_old(frozen):
    net = LinenNet({"use_running_average": True})
    variables = linen_variables(net)
    variables["batch_stats"]["other"] = {"sigma": jnp.ones(2)}
    variables["cache"] = {"x": jnp.zeros(1)}
    variables = core.freeze(variables) if frozen else variables
    before = jax.tree.map(np.array, variables)
    new = update_batch_stats(net, make_batches(), variables)
    jax.tree.map(np.testing.assert_array_equal, variables, before)
    assert jax.tree.structure(new) == jax.tree.structure(variables)
    for name in ("params", "cache"):
        jax.tree.map(np.testing.assert_array_equal, new[name], variables[name])
    np.testing.assert_array_equal(new["batch_stats"]["other"]["sigma"], np.ones(2))
    assert_same_stats(linen_stats(new), expected(make_batches()))


def test_linen_makes_a_collection_that_is_missing_and_runs_under_jit():
    net = LinenNet({"use_running_average": False})
    params = {"params": linen_variables(net)["params"]}
    new = jax.jit(lambda v: update_batch_stats(net, make_batches(), v))(params)
    assert_same_stats(linen_stats(new), expected(make_batches()))


LIFTED = {
    "jit": linen.jit(LinenBlock),
    "remat": linen.remat(LinenBlock),
    "vmap": linen.vmap(
        LinenBlock,
        in_axes=None,
        axis_size=2,
        variable_axes={"params": 0, "batch_stats": 0},
        split_rngs={"params": True},
    ),
}


@pytest.mark.parametrize("lift", LIFTED)
def test_linen_behind_a_lifted_transformation(lift):
    batches = make_batches()
    net = linen.Sequential([LIFTED[lift]({"use_running_average": False})])
    variables = net.init(jax.random.key(0), batches[0])
    # What `linen.jit` has traced already must not be gone on with.
    net.apply(variables, batches[0], mutable=["batch_stats"])
    update_batch_stats(net, batches, variables)
    new = update_batch_stats(net, batches, variables)
    (norm,) = [block["norm"] for block in new["batch_stats"].values()]
    (block,) = variables["params"].values()
    hidden = [x @ np.asarray(block["linear"]["kernel"]) for x in batches]
    for name, of in (("mean", np.mean), ("var", np.var)):
        wanted = [of(x, axis=-2) for x in hidden]
        wanted = np.average(wanted, axis=0, weights=SIZES)
        np.testing.assert_allclose(norm[name], wanted, rtol=1e-5)


def test_a_jitted_call_gives_the_same():
    batches = make_batches()
    got = run_nnx(batches, call=nnx.jit(lambda model, x: model(x)))
    assert_same_stats(got, expected(batches))
    jitted = linen.jit(lambda m, x: m(x, use_running_average=True))
    assert_same_stats(run_linen(batches, call=jitted), expected(batches))


def test_nnx_models_under_vmap():
    @nnx.vmap
    def create(seed):
        return nnx.BatchNorm(FEATURES, rngs=nnx.Rngs(jax.random.key(seed)))

    model, batches = create(jnp.arange(2)), make_batches()
    call = nnx.vmap(lambda m, x: m(x), in_axes=(0, None))
    update_batch_stats(model, batches, call=call)
    wanted = np.average([x.mean(0) for x in batches], axis=0, weights=SIZES)
    np.testing.assert_allclose(model.mean[...], [wanted, wanted], rtol=1e-5)


@both
@pytest.mark.parametrize("container", [tuple, list])
def test_the_input_is_the_first_of_a_pair(run, container):
    batches = make_batches()
    pairs = [container((x, np.zeros(len(x)))) for x in batches]
    options = {}
    if run is run_linen:
        options = {"call": lambda m, pair: m(pair[0], use_running_average=False)}
    assert_same_stats(run(pairs, **options), expected(batches))


@both
def test_call_and_size_tell_how_a_batch_is_used(run):
    batches = [
        {"a": 1, "image": x, "weight": i + 1} for i, x in enumerate(make_batches())
    ]
    mode = {} if run is run_nnx else {"use_running_average": False}

    def call(model, batch):
        return model(batch["image"], **mode)

    assert_same_stats(run(batches, call=call), expected(make_batches()))
    got = run(batches, call=call, size=lambda batch: batch["weight"])
    assert_same_stats(got, expected(make_batches(), weights=[1, 2, 3]))


@both
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_half_precision_inputs(run, dtype):
    batches = make_batches(dtype)
    assert_same_stats(run(batches), expected(batches), rtol=2e-2)


@both
def test_statistics_that_are_not_finite_come_through(run):
    batches = make_batches()
    batches[1][0, 0] = np.nan
    assert np.isnan(run(batches)[0][0]).all()


def test_many_batches_lose_nothing():
    rng = np.random.default_rng(1)
    batches = rng.normal(3.0, 1.0, (3000, 2, 1)).astype(np.float32)
    model = nnx.BatchNorm(1, rngs=nnx.Rngs(0), **ACCURATE)
    update_batch_stats(model, batches, call=nnx.jit(lambda m, x: m(x)))
    wanted = batches.astype(np.float64)
    np.testing.assert_allclose(model.mean[0], wanted.mean(), rtol=2e-6)
    np.testing.assert_allclose(model.var[0], wanted.var(1).mean(), rtol=2e-6)


def failing(batches):
    yield from batches
    raise OSError("the disk")


@pytest.mark.parametrize(
    ("batches", "options", "error"),
    [
        ([], {}, ValueError),
        ([np.zeros((2, FEATURES)), np.zeros((2, 99))], {}, Exception),
        ([np.zeros((2, FEATURES)), np.zeros((0, FEATURES))], {}, ValueError),
        (make_batches(), {"size": lambda batch: 0}, ValueError),
        (make_batches(), {"size": lambda batch: np.nan}, ValueError),
        (make_batches(), {"call": lambda m, x: 1 / 0}, ZeroDivisionError),
        (make_batches(), {"call": lambda m, x: None}, ValueError),
        (
            make_batches(),
            {"call": lambda m, x: m(x, use_running_average=True)},
            ValueError,
        ),
        (make_batches(), {"call": lambda m, x: m.blocks[0](x)}, ValueError),
    ],
)
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_an_error_leaves_an_nnx_model_as_it_was(batches, options, error, mode):
    model = NNXNet(momentum=0.3)
    getattr(model, mode)()
    before = snapshot(model)
    with pytest.raises(error):
        update_batch_stats(model, batches, **options)
    with pytest.raises(OSError, match="the disk"):
        update_batch_stats(model, failing(make_batches()))
    assert snapshot(model) == before


@pytest.mark.parametrize("batches", [failing(make_batches()), iter([])])
def test_an_error_with_linen(batches):
    net = LinenNet({"use_running_average": True})
    variables = linen_variables(net)
    before = jax.tree.map(np.array, variables)
    with pytest.raises((OSError, ValueError), match="the disk|no batches"):
        update_batch_stats(net, batches, variables)
    jax.tree.map(np.testing.assert_array_equal, variables, before)
    # Nor does the interceptor stay behind.
    out = net.apply(variables, make_batches()[0])
    assert out.shape == (5, FEATURES)


def test_errors_say_what_is_wrong():
    x = make_batches()
    linear, dense = nnx.Linear(FEATURES, 1, rngs=nnx.Rngs(0)), linen.Dense(1)
    with pytest.raises(ValueError, match="Linear has no nnx.BatchNorm"):
        update_batch_stats(linear, x)
    with pytest.raises(ValueError, match="Dense has no linen.BatchNorm"):
        update_batch_stats(dense, x, dense.init(jax.random.key(0), x[0]))
    with pytest.raises(ValueError, match=r"blocks\.1\.norm was not used in training"):
        update_batch_stats(NNXNet(), x, call=lambda m, x: m.blocks[0](x))
    with pytest.raises(ValueError, match="pass `size`"):
        update_batch_stats(NNXNet(), [{"seed": 3}])
    with pytest.raises(TypeError, match="needs its variables"):
        update_batch_stats(dense, x)
    with pytest.raises(TypeError, match="pass none"):
        update_batch_stats(linear, x, {"params": {}})
    with pytest.raises(TypeError, match="not 'model'"):
        update_batch_stats("model", x)


def test_linen_keeps_the_statistics_of_a_layer_that_is_not_reached():
    net = LinenNet({"use_running_average": True})
    variables = linen_variables(net)
    new = update_batch_stats(
        net, make_batches(), variables, call=lambda m, x: m.blocks[0](x)
    )
    got, old = linen_stats(new), linen_stats(variables)
    assert_same_stats(got[:1], expected(make_batches())[:1])
    np.testing.assert_array_equal(got[1], old[1])


def test_with_averaged_weights_the_statistics_are_theirs():
    # At the averaged weights every layer's outputs are then normalised to 0 and 1.
    model = nnx.Sequential(nnx.Linear(FEATURES, 2, rngs=nnx.Rngs(0)))
    model.layers.append(nnx.BatchNorm(2, rngs=nnx.Rngs(0)))
    tx = optax.chain(optax.sgd(0.5), asgd_optax.average_iterates())
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    batch = np.concatenate(make_batches())
    for _ in range(5):
        grads = nnx.grad(lambda m: jnp.mean((m(batch) - 1) ** 4))(model)
        optimizer.update(model, grads)
    params = nnx.state(model, nnx.Param)
    nnx.update(model, asgd_optax.averaged_params(optimizer.opt_state, params))
    update_batch_stats(model, [batch])
    train = model(batch)
    update_batch_stats(model, [batch])
    model.eval()
    np.testing.assert_allclose(model(batch), train, rtol=1e-5, atol=1e-5)


def test_the_package_itself_does_without_flax():
    code = "import sys, asgd_optax; print([m for m in sys.modules if 'flax' in m])"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout == "[]\n"


@nnx.jit
def train_nnx(model, optimizer, x):
    def loss(model):
        return jnp.mean((model(x, use_running_average=False) - 1.0) ** 2)

    optimizer.update(
        model, nnx.grad(loss, argnums=nnx.DiffState(0, optimizer.wrt))(model)
    )


# One for all, or each would be compiled anew.
ADAM = optax.chain(optax.adam(0.1), average_iterates())


def trained_nnx():
    model = NNXNet()
    optimizer = nnx.Optimizer(model, ADAM, wrt=nnx.Param)
    for batch in make_batches():
        train_nnx(model, optimizer, batch)
    return model, optimizer


def arrays_of(*modules):
    return [
        jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
        for x in jax.tree.leaves([nnx.state(module) for module in modules])
    ]


def bits_of(*modules):
    return [np.asarray(x).tobytes() for x in arrays_of(*modules)]


@pytest.mark.parametrize("compiled", [False, True])
def test_averaged_model_has_the_average_and_shares_nothing(compiled):
    model, optimizer = trained_nnx()
    before = bits_of(model, optimizer)
    make = nnx.jit(averaged_model) if compiled else averaged_model
    averaged = make(model, optimizer)
    assert type(averaged) is NNXNet
    params = nnx.state(model, nnx.Param)
    expected = averaged_params(optimizer.opt_state, params)
    found = nnx.state(averaged, nnx.Param)
    assert jax.tree.structure(found) == jax.tree.structure(params)
    np.testing.assert_array_equal(
        *(
            np.concatenate([x.ravel() for x in jax.tree.leaves(t)])
            for t in (found, expected)
        )
    )
    assert bits_of(averaged) != bits_of(model)
    pointers = {x.unsafe_buffer_pointer() for x in arrays_of(averaged)}
    assert not pointers & {
        x.unsafe_buffer_pointer() for x in arrays_of(model, optimizer)
    }
    # Whatever becomes of it, training goes on from where it was.
    update_batch_stats(averaged, make_batches())
    for x in jax.tree.leaves(nnx.state(averaged)):
        x.delete()
    assert bits_of(model, optimizer) == before
    train_nnx(model, optimizer, make_batches()[0])


def test_averaged_model_outlives_a_donated_step():
    model, optimizer = trained_nnx()
    averaged = averaged_model(model, optimizer)
    expected = bits_of(averaged)
    for x in jax.tree.leaves((nnx.state(model), nnx.state(optimizer))):
        x.delete()
    assert bits_of(averaged) == expected


def test_averaged_model_of_a_bare_state_and_of_other_variables():
    class Frozen(nnx.Param):
        """A parameter that the optimizer leaves alone."""

    model = NNXNet()
    model.frozen = Frozen(jnp.ones(3))
    wrt = nnx.All(nnx.Param, nnx.Not(Frozen))
    tx = optax.chain(optax.sgd(0.1), average_iterates())
    optimizer = nnx.Optimizer(model, tx, wrt=wrt)
    for batch in make_batches():
        train_nnx(model, optimizer, batch)
    expected = bits_of(averaged_model(model, optimizer))
    state = optimizer.opt_state
    assert bits_of(averaged_model(model, state, wrt=wrt)) == expected
    assert bits_of(averaged_model(model, (None, state), wrt=wrt)) == expected
    with pytest.raises(ValueError, match=r"lacks .*frozen"):
        averaged_model(model, state)
    plain, optimizer = trained_nnx()
    assert bits_of(averaged_model(plain, optimizer.opt_state)) == bits_of(
        averaged_model(plain, optimizer)
    )


def test_averaged_model_keeps_the_models_dtypes():
    model = NNXNet(param_dtype=jnp.bfloat16)
    optimizer = nnx.Optimizer(model, ADAM, wrt=nnx.Param)
    found = nnx.state(averaged_model(model, optimizer))
    expected = nnx.state(model)
    assert jax.tree.map(lambda x: x.dtype, found) == jax.tree.map(
        lambda x: x.dtype, expected
    )


def test_averaged_model_refuses():
    model = NNXNet()
    optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
    with pytest.raises(ValueError, match="no averaging state"):
        averaged_model(model, optimizer)
    optimizer = nnx.Optimizer(model, asgd(), wrt=nnx.Param)
    with pytest.raises(ValueError, match=r"pass `optimizer.opt_state`"):
        averaged_model(model, nnx.state(optimizer))
    with pytest.raises(TypeError, match="^model must be an nnx.Module; got a LinenNet"):
        averaged_model(LinenNet({}), optimizer)


@pytest.mark.parametrize("compiled", [False, True])
def test_averaged_model_of_an_average_in_host_memory(compiled):
    """It is brought to the device, or the model could not be called."""
    model, optimizer = trained_nnx()
    expected = averaged_model(model, optimizer)(make_batches()[0])
    device = jax.devices()[0]
    host = jax.sharding.SingleDeviceSharding(device, memory_kind="pinned_host")
    state = jax.tree.map(
        lambda x: jax.device_put(x, host) if x.ndim else x, nnx.state(optimizer)
    )
    nnx.update(optimizer, state)
    make = nnx.jit(averaged_model) if compiled else averaged_model
    found = make(model, optimizer)(make_batches()[0])
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_averaged_model_leaves_what_is_no_array_as_it_is():
    model, optimizer = trained_nnx()
    model.note, model.scale = nnx.Variable("text"), nnx.Variable(1.5)
    model.table = nnx.Variable(np.arange(3.0))
    averaged = averaged_model(model, optimizer)
    assert averaged.note.get_value() == "text"
    assert type(averaged.scale.get_value()) is float
    table = averaged.table.get_value()
    assert table.dtype == np.float64
    assert not np.shares_memory(table, model.table.get_value())


def test_averaged_model_names_wrt():
    model, optimizer = trained_nnx()
    with pytest.raises(ValueError, match="differ in structure") as raised:
        averaged_model(model, optimizer.opt_state, wrt=nnx.BatchStat)
    assert "`wrt`" in raised.value.__notes__[0]


def sharded_training(metadata, compiled):
    """A kernel, its moments and averages as they were step by step, and the average."""
    model = nnx.Linear(
        8, 16, use_bias=False, rngs=nnx.Rngs(0), kernel_metadata=metadata
    )
    tx = optax.chain(optax.sgd(0.1, momentum=0.9), average_iterates())
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    def step(model, optimizer):
        x = jnp.arange(32.0).reshape(4, 8)
        grads = nnx.grad(lambda model: jnp.mean(model(x) ** 2))(model)
        optimizer.update(model, grads)

    step = nnx.jit(step) if compiled else step
    kernel, state = model.kernel.get_value(), []
    for _ in range(4):
        (momentum, _), ours = optimizer.opt_state
        trees = (momentum.trace, ours.average)
        state += [tree["kernel"].get_value() for tree in trees]
        step(model, optimizer)
    average = averaged_params(optimizer.opt_state)
    return kernel, state, average["kernel"].get_value()


@functools.cache
def trained_apart(compiled):
    """The average that is expected, on one device."""
    *_, average = sharded_training({}, compiled)
    return average


# Since then a parameter's metadata may say where the optimizer's state is to lie.
if tuple(map(int, flax.__version__.split(".")[:3])) >= (0, 12, 8):

    @pytest.mark.parametrize("compiled", [False, True])
    @pytest.mark.parametrize("axes", ["Auto", "Explicit"])
    @pytest.mark.parametrize("told", [False, True])
    def test_the_average_lies_as_flax_lays_the_moments_out(told, axes, compiled):
        """As the parameter; where `optimizer_sharding` is told, as it says."""
        own, wanted = (None, "model"), ("data", "model") if told else (None, "model")
        metadata = {"out_sharding": own}
        if told:
            metadata["optimizer_sharding"] = wanted
        expected = trained_apart(compiled)
        kinds = (getattr(jax.sharding.AxisType, axes),) * 2
        mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=kinds)
        with jax.set_mesh(mesh):
            kernel, state, average = sharded_training(metadata, compiled)
        assert kernel.sharding.spec == jax.sharding.PartitionSpec(*own)
        lies = {x.sharding.spec for x in [*state, average]}
        assert lies == {jax.sharding.PartitionSpec(*wanted)}
        np.testing.assert_allclose(average, expected, rtol=1e-5, atol=1e-6)
