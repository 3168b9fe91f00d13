# SPDX-License-Identifier: Apache-2.0
"""`update_batch_stats`, compared with float64 NumPy, and `averaged_model`."""

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
# Flax's default, E[x^2] - E[x]^2, loses digits by cancellation.
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
    """State that is neither a parameter nor a batch statistic."""


class NNXNet(nnx.Module):
    """Two BatchNorms at different depths, dropout, and further state."""

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
    """Return variables of a `LinenNet` with the parameters of an `NNXNet`."""
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
    """Compute the statistics of both layers, (mean, var) each, in float64."""
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
    """Return all that a call could change: the variables' bits, modes, momenta."""
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


nnx_and_linen = pytest.mark.parametrize("run", [run_nnx, run_linen])


@nnx_and_linen
def test_statistics_are_the_weighted_means_over_the_batches(run):
    batches = make_batches()
    assert_same_stats(run(batches), expected(batches))
    assert_same_stats(run(iter(batches)), expected(batches))
    assert_same_stats(run(batches[:1]), expected(batches[:1]))


@nnx_and_linen
def test_statistics_equal_those_of_torch_except_for_its_unbiased_variance(run):
    # torch's update_bn takes the plain means over batches of mean and n / (n - 1) var.
    batches = make_batches(sizes=(4, 4, 4))
    hidden = [x @ np.asarray(NNXNet().blocks[0].linear.kernel[...]) for x in batches]
    mean, var = run(batches)[0]
    np.testing.assert_allclose(mean, np.mean([x.mean(0) for x in hidden], 0), rtol=1e-5)
    unbiased = np.mean([x.var(0, ddof=1) for x in hidden], 0)
    np.testing.assert_allclose(var * 4 / 3, unbiased, rtol=1e-5)


@pytest.mark.parametrize(
    ("momentum", "use_running_average", "before"),
    [(0.0, None, -1.0), (0.9, False, np.nan), (1.0, True, 1e30), (0.9, True, -1.0)],
)
def test_nnx_momentum_mode_and_earlier_statistics_do_not_matter(
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


@pytest.mark.parametrize(
    ("momentum", "before", "constructed", "called"),
    [
        (0.0, np.nan, None, False),
        (0.9, 1e30, None, True),
        (1.0, np.nan, False, None),
        (0.9, np.nan, True, None),
        (0.9, 1e30, None, None),
    ],
)
def test_linen_momentum_mode_and_earlier_statistics_do_not_matter(
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


def test_linen_overrides_a_positional_use_running_average():
    batches, norm = make_batches(), linen.BatchNorm(**ACCURATE)
    variables = {"params": {"scale": jnp.ones(FEATURES), "bias": jnp.zeros(FEATURES)}}
    new = update_batch_stats(norm, batches, variables, call=lambda m, x: m(x, True))
    wanted = np.average([x.mean(0) for x in batches], axis=0, weights=SIZES)
    np.testing.assert_allclose(new["batch_stats"]["mean"], wanted, rtol=1e-5)


def test_nnx_update_changes_only_the_statistics():
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
def test_linen_update_returns_new_variables(frozen):
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


def test_linen_update_adds_a_missing_collection_under_jit():
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
def test_linen_update_reaches_batch_norm_in_a_lifted_transformation(lift):
    batches = make_batches()
    net = linen.Sequential([LIFTED[lift]({"use_running_average": False})])
    variables = net.init(jax.random.key(0), batches[0])
    # The update must not use what `linen.jit` has traced and cached already.
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


def test_call_may_be_jitted():
    batches = make_batches()
    got = run_nnx(batches, call=nnx.jit(lambda model, x: model(x)))
    assert_same_stats(got, expected(batches))
    jitted = linen.jit(lambda m, x: m(x, use_running_average=True))
    assert_same_stats(run_linen(batches, call=jitted), expected(batches))


def test_nnx_update_works_under_vmap():
    @nnx.vmap
    def create(seed):
        return nnx.BatchNorm(FEATURES, rngs=nnx.Rngs(jax.random.key(seed)))

    model, batches = create(jnp.arange(2)), make_batches()
    call = nnx.vmap(lambda m, x: m(x), in_axes=(0, None))
    update_batch_stats(model, batches, call=call)
    wanted = np.average([x.mean(0) for x in batches], axis=0, weights=SIZES)
    np.testing.assert_allclose(model.mean[...], [wanted, wanted], rtol=1e-5)


@nnx_and_linen
@pytest.mark.parametrize("container", [tuple, list])
def test_first_element_of_a_tuple_is_the_input(run, container):
    batches = make_batches()
    pairs = [container((x, np.zeros(len(x)))) for x in batches]
    options = {}
    if run is run_linen:
        options = {"call": lambda m, pair: m(pair[0], use_running_average=False)}
    assert_same_stats(run(pairs, **options), expected(batches))


@nnx_and_linen
def test_call_and_size_are_used(run):
    batches = [
        {"a": 1, "image": x, "weight": i + 1} for i, x in enumerate(make_batches())
    ]
    mode = {} if run is run_nnx else {"use_running_average": False}

    def call(model, batch):
        return model(batch["image"], **mode)

    assert_same_stats(run(batches, call=call), expected(make_batches()))
    got = run(batches, call=call, size=lambda batch: batch["weight"])
    assert_same_stats(got, expected(make_batches(), weights=[1, 2, 3]))


@nnx_and_linen
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_inputs_may_be_of_half_precision(run, dtype):
    batches = make_batches(dtype)
    assert_same_stats(run(batches), expected(batches), rtol=2e-2)


@nnx_and_linen
def test_nan_statistics_are_kept(run):
    batches = make_batches()
    batches[1][0, 0] = np.nan
    assert np.isnan(run(batches)[0][0]).all()


def test_mean_over_many_batches_is_accurate():
    rng = np.random.default_rng(1)
    batches = rng.normal(3.0, 1.0, (1000, 2, 1)).astype(np.float32)
    model = nnx.BatchNorm(1, rngs=nnx.Rngs(0), **ACCURATE)
    update_batch_stats(model, batches, call=nnx.jit(lambda m, x: m(x)))
    wanted = batches.astype(np.float64)
    np.testing.assert_allclose(model.mean[0], wanted.mean(), rtol=2e-6)
    np.testing.assert_allclose(model.var[0], wanted.var(1).mean(), rtol=2e-6)


def failing(batches):
    yield from batches
    raise OSError("disk failure")


@pytest.mark.parametrize(
    ("batches", "options", "error"),
    [
        ([], {}, ValueError),
        (failing(make_batches()), {}, OSError),
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
def test_update_batch_stats_keeps_the_nnx_model_on_error(batches, options, error):
    model = NNXNet(momentum=0.3)
    before = snapshot(model)
    with pytest.raises(error):
        update_batch_stats(model, batches, **options)
    assert snapshot(model) == before


@pytest.mark.parametrize("batches", [failing(make_batches()), iter([])])
def test_update_batch_stats_keeps_linen_variables_on_error(batches):
    net = LinenNet({"use_running_average": True})
    variables = linen_variables(net)
    before = jax.tree.map(np.array, variables)
    with pytest.raises((OSError, ValueError), match="disk failure|batches is empty"):
        update_batch_stats(net, batches, variables)
    jax.tree.map(np.testing.assert_array_equal, variables, before)
    # The interceptor is gone.
    out = net.apply(variables, make_batches()[0])
    assert out.shape == (5, FEATURES)


def test_update_batch_stats_checks_its_arguments():
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
    with pytest.raises(TypeError, match="do not pass any"):
        update_batch_stats(linear, x, {"params": {}})
    with pytest.raises(TypeError, match="got 'model'"):
        update_batch_stats("model", x)


def test_linen_update_keeps_the_statistics_of_unreached_layers():
    net = LinenNet({"use_running_average": True})
    variables = linen_variables(net)
    new = update_batch_stats(
        net, make_batches(), variables, call=lambda m, x: m.blocks[0](x)
    )
    got, old = linen_stats(new), linen_stats(variables)
    assert_same_stats(got[:1], expected(make_batches())[:1])
    np.testing.assert_array_equal(got[1], old[1])


def test_updated_statistics_are_those_of_the_averaged_weights():
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


def test_package_does_not_import_flax():
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


# Shared, or `train_nnx` would be recompiled for each test.
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
    # Changing and deleting the copy does not affect training.
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


def test_averaged_model_accepts_a_state_and_other_variables():
    class Frozen(nnx.Param):
        """A parameter that is not optimized."""

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
    with pytest.raises(ValueError, match="frozen"):
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


def test_averaged_model_checks_its_arguments():
    model = NNXNet()
    optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
    with pytest.raises(ValueError, match="no average found"):
        averaged_model(model, optimizer)
    optimizer = nnx.Optimizer(model, asgd(), wrt=nnx.Param)
    with pytest.raises(ValueError, match=r"Pass `optimizer.opt_state`"):
        averaged_model(model, nnx.state(optimizer))
    with pytest.raises(TypeError, match="^model must be an nnx.Module; got a LinenNet"):
        averaged_model(LinenNet({}), optimizer)


@pytest.mark.parametrize("compiled", [False, True])
def test_averaged_model_copies_an_average_in_host_memory_to_the_device(compiled):
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


def test_averaged_model_keeps_variables_without_arrays():
    model, optimizer = trained_nnx()
    model.note, model.scale = nnx.Variable("text"), nnx.Variable(1.5)
    model.table = nnx.Variable(np.arange(3.0))
    averaged = averaged_model(model, optimizer)
    assert averaged.note.get_value() == "text"
    assert type(averaged.scale.get_value()) is float
    table = averaged.table.get_value()
    assert table.dtype == np.float64
    assert not np.shares_memory(table, model.table.get_value())


def test_averaged_model_error_names_wrt():
    model, optimizer = trained_nnx()
    with pytest.raises(ValueError, match="differ in structure") as raised:
        averaged_model(model, optimizer.opt_state, wrt=nnx.BatchStat)
    assert "`wrt`" in raised.value.__notes__[0]


def sharded_training(metadata, compiled):
    """Train; return the kernel, its momenta and averages by step, and the average."""
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
def unsharded_average(compiled):
    *_, average = sharded_training({}, compiled)
    return average


# Older versions have no `optimizer_sharding`.
if tuple(map(int, flax.__version__.split(".")[:3])) >= (0, 12, 8):

    @pytest.mark.parametrize(
        ("optimizer_sharding", "axes", "compiled"),
        [
            (None, "Auto", True),
            (None, "Explicit", False),
            (("data", "model"), "Auto", False),
            (("data", "model"), "Explicit", True),
        ],
    )
    def test_average_has_the_sharding_of_the_momenta(
        optimizer_sharding, axes, compiled
    ):
        own = (None, "model")
        metadata = {"out_sharding": own}
        if optimizer_sharding:
            metadata["optimizer_sharding"] = optimizer_sharding
        expected = unsharded_average(compiled)
        kinds = (getattr(jax.sharding.AxisType, axes),) * 2
        mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=kinds)
        with jax.set_mesh(mesh):
            kernel, state, average = sharded_training(metadata, compiled)
        assert kernel.sharding.spec == jax.sharding.PartitionSpec(*own)
        specs = {x.sharding.spec for x in [*state, average]}
        assert specs == {jax.sharding.PartitionSpec(*(optimizer_sharding or own))}
        np.testing.assert_allclose(average, expected, rtol=1e-5, atol=1e-6)
