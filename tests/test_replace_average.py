# SPDX-License-Identifier: Apache-2.0
"""`replace_average`: an optimizer state continues an average from elsewhere."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from asgd_optax import (
    CompensatedMean,
    asgd,
    average_iterates,
    averaged_params,
    exponential_weighting,
    nt_asgd,
    replace_average,
)
from tests.support import bits, train_step

PARAMS = {"w": jnp.arange(6.0).reshape(2, 3), "b": [jnp.ones(())]}
NEW = jax.tree.map(lambda p: p + 0.25, PARAMS)


def ema(**options):
    return average_iterates(exponential_weighting(0.9, debias=False), **options)


# A wrapper around `average_iterates`, and where its state keeps the average.
NESTINGS = {
    "chain": lambda: optax.chain(optax.adam(0.1), ema()),
    "masked": lambda: optax.masked(
        optax.chain(optax.sgd(0.1), ema()), {"w": True, "b": [True]}
    ),
    "partition": lambda: optax.partition(
        {"train": optax.chain(optax.sgd(0.1), ema()), "freeze": optax.set_to_zero()},
        "train",
    ),
    "multi_steps": lambda: optax.MultiSteps(
        optax.chain(optax.sgd(0.1), ema()), 2
    ).gradient_transformation(),
    "inject_hyperparams": lambda: optax.inject_hyperparams(
        lambda decay: optax.chain(
            optax.sgd(0.1), average_iterates(exponential_weighting(decay, debias=False))
        ),
        hyperparam_dtype=jnp.float32,
    )(decay=0.9),
    "compensated": lambda: optax.chain(optax.sgd(0.1), ema(compensated=True)),
}


@pytest.mark.parametrize("nesting", NESTINGS)
def test_replace_average_is_read_back_in_any_nesting(nesting):
    state = NESTINGS[nesting]().init(PARAMS)
    replaced = jax.jit(replace_average, static_argnames="averaged")(
        state, NEW, averaged=5
    )
    for new in (replaced, replace_average(state, NEW, averaged=5)):
        assert jax.tree.structure(new) == jax.tree.structure(state)
        assert bits(averaged_params(new, PARAMS)) == bits(NEW)
        assert optax.tree_utils.tree_get(new, "averaged") == 5
        for old, leaf in zip(jax.tree.leaves(state), jax.tree.leaves(new), strict=True):
            assert (old.dtype, old.weak_type) == (leaf.dtype, leaf.weak_type)


@pytest.mark.parametrize("debias", [True, False])
def test_replaced_average_goes_on_as_if_it_had_been_kept(debias):
    """The debiased EMA keeps what was taken over, as the plain one does."""
    tx = optax.chain(
        optax.sgd(0.1), average_iterates(exponential_weighting(0.9, debias=debias))
    )
    step = jax.jit(lambda p, s: train_step(tx, p, s, p))
    params, state = PARAMS, tx.init(PARAMS)
    for _ in range(4):
        params, state = step(params, state)
    # The average of a run is published in NumPy, and a fresh optimizer takes it over.
    average = jax.tree.map(np.asarray, averaged_params(state, params))
    fresh = replace_average(tx.init(params), average, averaged=4)
    for _ in range(3):
        params_, fresh = step(params, fresh)
        params, state = step(params, state)
        assert bits(averaged_params(fresh)) == bits(averaged_params(state))
        assert bits(params_) == bits(params)


def test_replace_average_keeps_the_accumulators_dtype():
    half = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS)
    tx = average_iterates(0.9)
    state = replace_average(tx.init(half), half, averaged=1)
    assert {x.dtype for x in jax.tree.leaves(state.average)} == {jnp.dtype("float32")}
    assert bits(averaged_params(state, half)) == bits(half)


def test_replace_average_resets_the_residual():
    tx = optax.chain(optax.sgd(0.1), average_iterates(compensated=True))
    params, state = PARAMS, tx.init(PARAMS)
    for _ in range(3):
        params, state = train_step(tx, params, state, params)
    mean = replace_average(state, NEW, averaged=1)[-1].average
    assert isinstance(mean, CompensatedMean)
    assert all(not np.any(x) for x in jax.tree.leaves(mean.residual))


def test_replace_average_ignores_masked_leaves():
    tx = optax.masked(ema(), {"w": True, "b": [False]})
    state = replace_average(tx.init(PARAMS), NEW, averaged=1)
    expected = {"w": NEW["w"], "b": PARAMS["b"]}
    assert bits(averaged_params(state, PARAMS)) == bits(expected)


@pytest.mark.parametrize("jit", [False, True])
def test_replace_average_keeps_the_sharding(jit):
    mesh = jax.make_mesh((8,), ("d",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("d"))
    params = jax.device_put({"w": jnp.arange(16.0)}, sharding)
    state = jax.jit(ema().init)(params)
    # The new average is on one device.
    new = jax.device_put({"w": jnp.ones(16)}, jax.devices()[0] if not jit else None)
    replace = jax.jit(replace_average) if jit else replace_average
    replaced = replace(state, new, averaged=1)
    assert replaced.average["w"].sharding.is_equivalent_to(
        state.average["w"].sharding, 1
    )
    assert bits(replaced.average) == bits(new)


def test_checkpoint_without_an_average_goes_on_with_one():
    plain = optax.chain(optax.adam(0.1))
    params, state = PARAMS, plain.init(PARAMS)
    for _ in range(3):
        params, state = train_step(plain, params, state, params)
    tx = optax.chain(*[optax.adam(0.1)], ema())
    new = tx.init(params)
    new = replace_average((*state, *new[1:]), NEW, averaged=1)
    _, after = train_step(tx, params, new, params)
    params, _ = train_step(plain, params, state, params)
    expected = jax.tree.map(lambda a, p: a + 0.1 * (p - a), NEW, params)
    for a, b in zip(
        jax.tree.leaves(averaged_params(after)), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-6)


@pytest.mark.flax
def test_replace_average_in_an_nnx_optimizer():
    from flax import nnx

    from asgd_optax.flax import averaged_model

    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.chain(optax.sgd(0.1), ema()), wrt=nnx.Param)
    new = jax.tree.map(lambda p: p + 0.25, nnx.state(model, nnx.Param))
    optimizer.opt_state = replace_average(optimizer.opt_state, new, averaged=7)
    assert bits(nnx.state(averaged_model(model, optimizer), nnx.Param)) == bits(new)

    @nnx.jit
    def step(model, optimizer):
        optimizer.update(model, nnx.state(model, nnx.Param))

    step(model, optimizer)
    assert optax.tree_utils.tree_get(optimizer.opt_state, "averaged") == 8
    average = nnx.state(averaged_model(model, optimizer), nnx.Param)
    iterate = nnx.state(model, nnx.Param)
    for a, b, p in zip(*map(jax.tree.leaves, (average, new, iterate)), strict=True):
        np.testing.assert_allclose(a, b + 0.1 * (p - b), rtol=1e-6)


@pytest.mark.parametrize(
    ("state", "average", "averaged", "error", "match"),
    [
        (optax.sgd(0.1), NEW, 1, ValueError, "found none"),
        (optax.chain(ema(), ema()), NEW, 1, ValueError, r"\[0\], opt_state\[1\]"),
        (asgd(), NEW, 1, ValueError, r"state\._replace\(step"),
        (nt_asgd(0.1), NEW, 1, ValueError, r"state\._replace\(step"),
        (ema(), {"w": NEW["w"]}, 1, ValueError, r"missing from average: \['b'\]\[0\]"),
        (ema(), NEW | {"c": 1.0}, 1, ValueError, r"unexpected in average: \['c'\]"),
        (ema(), NEW | {"w": jnp.ones(3)}, 1, ValueError, r"average\['w'\] has shape"),
        (ema(), NEW | {"w": NEW["w"] * 1j}, 1, TypeError, r"average\['w'\] is complex"),
        (ema(), NEW, 0, ValueError, "averaged must be at least 1"),
        (ema(), NEW, 1.5, ValueError, "averaged must be a whole number"),
    ],
)
def test_replace_average_names_the_mistake(state, average, averaged, error, match):
    with pytest.raises(error, match=match):
        replace_average(state.init(PARAMS), average, averaged=averaged)
