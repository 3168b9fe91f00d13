# SPDX-License-Identifier: Apache-2.0
"""The conformance battery: what JAX and optax expect, for every transformation."""

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from asgd_optax import averaged_params
from tests.support import (
    bits,
    enable_x64,
    precision_of,
    random_tree,
    stacked,
    train_step,
)
from tests.transformations import ROWS

STEPS = 5

each_row = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)

# An average that is rounded to float32 has no finite differences in float64.
each_differentiable_row = pytest.mark.parametrize(
    "row",
    [row for row in ROWS if "accumulator_dtype" not in row.options],
    ids=lambda row: row.name,
)


def gradients(dtype="float32", steps=STEPS):
    return [random_tree((1, n), dtype) for n in range(steps)]


def train(tx, params, grads, step=train_step):
    state = tx.init(params)
    for g in grads:
        params, state = step(tx, params, state, g)
    return params, state


def train_eagerly(tx, params, grads):
    """Train without compiling a program, and check that a jit could trace a step."""
    params, state = train(tx, params, grads)
    chex.assert_trees_all_equal_shapes_and_dtypes(
        jax.eval_shape(functools.partial(train_step, tx), params, state, grads[0]),
        (params, state),
    )
    return params, state


def train_in_a_scan(tx, params, grads):
    """Train in a scan, which compiles one step."""

    def body(carry, g):
        return train_step(tx, *carry, g), None

    return jax.lax.scan(body, (params, tx.init(params)), stacked(grads))[0]


@functools.cache
def trained(name):
    """Return the params and the state of a row after `STEPS` eager steps."""
    (row,) = (row for row in ROWS if row.name == name)
    return train(row.make(), random_tree(0, "float32"), gradients())


def compiled_steps(txs, **options):
    """Return a jitted step of several transformations, which compile as one program."""

    @chex.assert_max_traces(n=1)
    def step(runs, grads):
        return {n: train_step(txs[n], *run, grads[n]) for n, run in runs.items()}

    chex.clear_trace_counter()
    return jax.jit(step, **options)


def train_every_row(wrap, grads):
    """Train each row, wrapped, and return its params and state by its name."""
    params = random_tree(0, "float32")
    txs = {row.name: wrap(row.make()) for row in ROWS}
    runs = {name: (params, tx.init(params)) for name, tx in txs.items()}
    step = compiled_steps(txs)
    for g in grads:
        runs = step(runs, dict.fromkeys(runs, g))
    return runs


def test_jit_equals_eager_with_one_trace():
    found = train_every_row(lambda tx: tx, gradients())
    expected = {name: trained(name) for name in found}
    chex.assert_trees_all_close(found, expected, rtol=1e-6, atol=1e-6)


@each_row
def test_scan_equals_loop(row):
    tx, params, grads = row.make(), random_tree(0, "float32"), gradients()
    chex.assert_trees_all_close(
        train_in_a_scan(tx, params, grads), trained(row.name), rtol=1e-6, atol=1e-6
    )


@each_row
def test_vmap_over_hyperparameters_equals_loop(row):
    params, grads = random_tree(0, "float32"), gradients()
    # Each set of hyperparameters differs in one of them.
    sets = [
        {**row.hyperparameters, name: factor * row.hyperparameters[name]}
        for name in row.hyperparameters
        for factor in (0.5, 2.0)
    ]

    def run(hyperparameters):
        return train_in_a_scan(row.make(**hyperparameters), params, grads)

    batch = jax.jit(jax.vmap(run))(
        stacked([jax.tree.map(jnp.float32, s) for s in sets])
    )
    for i, hyperparameters in enumerate(sets):
        one = jax.tree.map(lambda x, i=i: x[i], batch)
        # Eagerly: a jit would be compiled for each set.
        expected = train(row.make(**hyperparameters), params, grads)
        chex.assert_trees_all_close(one, expected, rtol=2e-6, atol=2e-6)


@each_differentiable_row
def test_grad_over_hyperparameters_equals_finite_differences(row):
    with enable_x64(True):
        params, grads = random_tree(0, "float64"), gradients("float64")

        @jax.jit
        @jax.value_and_grad
        def loss(hyperparameters):
            p, state = train_in_a_scan(row.make(**hyperparameters), params, grads)
            trees = jax.tree.leaves((p, averaged_params(state, p)))
            return sum(jnp.sum(jnp.sin(x)) for x in trees)

        at, h = jax.tree.map(jnp.float64, row.hyperparameters), 1e-5
        _, exact = loss(at)
        for name, value in at.items():
            above, below = ({**at, name: value + d} for d in (h, -h))
            numeric = (loss(above)[0] - loss(below)[0]) / (2 * h)
            assert abs(numeric) > 1e-4  # or the comparison would show nothing
            np.testing.assert_allclose(
                exact[name], numeric, rtol=1e-7, atol=1e-9, err_msg=name
            )


def test_params_and_state_can_be_donated():
    def tree(seed):
        matrix = random_tree(seed, "bfloat16")["a"]["matrix"]
        return random_tree(seed, "float32"), matrix

    txs = {row.name: row.make() for row in ROWS}
    grads = [tree((1, n)) for n in range(STEPS)]

    def start(init):  # each with params of its own, which it may delete
        return {name: (p := tree(0), init(tx)(p)) for name, tx in txs.items()}

    step, expected = compiled_steps(txs), start(lambda tx: tx.init)
    for g in grads:
        expected = step(expected, dict.fromkeys(txs, g))
    donating = compiled_steps(txs, donate_argnums=0)
    for init in (lambda tx: tx.init, lambda tx: jax.jit(tx.init)):
        runs = start(init)
        for g in grads:
            old = jax.tree.leaves(runs)
            runs = donating(runs, dict.fromkeys(txs, g))
            assert all(x.is_deleted() for x in old if x.ndim and x.size)
        for name, run in runs.items():
            assert bits(run) == bits(expected[name]), name


@each_row
def test_state_shares_no_buffer_with_hyperparameters_or_params(row):
    values = {name: jnp.asarray(v) for name, v in row.hyperparameters.items()}
    tx, params = row.make(**values), random_tree(0, "float32")
    jax.jit(lambda state: state, donate_argnums=0)(tx.init(params))
    assert not any(v.is_deleted() for v in values.values())
    assert not any(p.is_deleted() for p in jax.tree.leaves(params))


@each_row
@pytest.mark.parametrize("injected", [False, True])
def test_unjitted_update_does_not_recompile(row, injected, caplog):
    tx, (*before, g) = row.make(), gradients()
    if injected:  # optax then makes a new transformation in each step
        arguments = row.hyperparameters | row.options
        tx = optax.inject_hyperparams(row.factory)(**arguments)
    params, state = train(tx, random_tree(0, "float32"), before)

    def compilations(f, *args):
        caplog.clear()
        with jax.log_compiles():
            f(*args)
        return sum("Finished XLA compilation" in m for m in caplog.messages)

    assert compilations(jax.jit(lambda: 1.0)) == 1
    for _ in range(2):  # a step that averages, and one between
        assert compilations(train_step, tx, params, state, g) == 0
        params, state = train_step(tx, params, state, g)


# Dtypes of a parameter and its gradient: all of one dtype, and half precision mixed.
DTYPE_PAIRS = [
    *((dtype, dtype) for dtype in ("float64", "complex64", "complex128")),
    *itertools.product(("float32", "bfloat16"), repeat=2),
    ("float16", "float16"),
    ("float32", "float16"),
]


@each_row
def test_shapes_and_dtypes_are_stable(row):
    for dtype, g_dtype in DTYPE_PAIRS:
        if dtype.startswith("complex") and not row.complex:
            continue
        with precision_of(dtype):
            tx, params = row.make(), random_tree(0, dtype)
            state, (g,) = tx.init(params), gradients(g_dtype, 1)

            def maybe(flag, tx=tx, params=params, state=state, g=g):
                # A branch that changed a dtype could not be traced.
                return jax.lax.cond(
                    flag, lambda: tx.update(g, state, params), lambda: (g, state)
                )

            updates, new = jax.eval_shape(maybe, True)
            average = jax.eval_shape(averaged_params, new, params)
            chex.assert_trees_all_equal_shapes_and_dtypes(updates, g)
            chex.assert_trees_all_equal_shapes_and_dtypes(average, params)
            assert jax.tree.structure(new) == jax.tree.structure(state)
            assert not any(x.weak_type for x in jax.tree.leaves((updates, new)))
            assert optax.tree_utils.tree_get(new, "step").dtype == jnp.int32
            for name in ("eta", "mu"):
                found = optax.tree_utils.tree_get(new, name)
                assert found is None or found.dtype == jnp.result_type(float)
            wide = jnp.promote_types(dtype, "float32")
            if "accumulator_dtype" in row.options:
                wide = "complex64" if dtype.startswith("complex") else "float32"
            mean = jax.eval_shape(averaged_params, new)
            assert {x.dtype for x in jax.tree.leaves(mean)} == {jnp.dtype(wide)}


@each_row
def test_injected_hyperparameter_acts_at_once(row):
    params, grads = random_tree(0, "float32"), gradients()
    injected = optax.inject_hyperparams(row.factory)(
        **row.hyperparameters, **row.options
    )
    step = jax.jit(train_step, static_argnums=0)
    p, state = train(injected, params, grads, step)
    untouched = train_step(row.make(), p, state.inner_state, grads[0])
    for name, value in row.hyperparameters.items():
        # Expect the step of a transformation made with the new value, on this state.
        tx = row.make(**{name: 1.5 * value})
        expected = train_step(tx, p, state.inner_state, grads[0])
        values = {**state.hyperparams, name: jnp.float32(1.5 * value)}
        changed = state._replace(hyperparams=values)
        found_p, found = step(injected, p, changed, grads[0])
        chex.assert_trees_all_close(
            (found_p, found.inner_state), expected, rtol=2e-6, atol=2e-6
        )
        assert bits(untouched) != bits(expected), name


# Arguments that must not be rounded to 16 bits.
PRECISE = {"t0", "decay", "gamma", "start", "every"}


@each_row
def test_inject_hyperparams_works_in_the_params_dtype(row):
    """optax casts hyperparameters to it: to complex numbers, to 16 bits."""
    dtypes = ["bfloat16", "float16", *["complex64"] * row.complex]
    params = {dtype: random_tree(0, dtype) for dtype in dtypes}
    grads = {dtype: gradients(dtype) for dtype in dtypes}
    arguments = row.hyperparameters | row.options
    coarse = PRECISE & row.hyperparameters.keys()
    injected, expected = {}, {}
    for dtype in dtypes:
        tx = optax.inject_hyperparams(row.factory)(**arguments)
        rounded = {
            name: float(jnp.real(jnp.asarray(v, dtype)))
            for name, v in row.hyperparameters.items()
        }
        if coarse and dtype != "complex64":
            message = f"({'|'.join(coarse)}).*{dtype}.*hyperparam_dtype=jnp.float32"
            for init in (tx.init, jax.jit(tx.init)):
                with pytest.raises(ValueError, match=message):
                    init(params[dtype])
            inject = optax.inject_hyperparams(row.factory, hyperparam_dtype=jnp.float32)
            tx = inject(**arguments)
            rounded = {name: jnp.float32(v) for name, v in row.hyperparameters.items()}
        injected[dtype] = tx
        expected[dtype] = train(row.make(**rounded), params[dtype], grads[dtype])

    found = {d: (params[d], injected[d].init(params[d])) for d in dtypes}
    step = compiled_steps(injected)
    for n in range(STEPS):
        found = step(found, {dtype: grads[dtype][n] for dtype in dtypes})
    for dtype, (p, state) in found.items():
        tolerance = 1e-6 if dtype == "complex64" else 1e-2
        chex.assert_trees_all_close(
            (p, state.inner_state), expected[dtype], rtol=tolerance, atol=1e-6
        )


def test_multi_steps_averages_the_accumulated_updates():
    grads = gradients(steps=8)
    found = train_every_row(lambda tx: optax.MultiSteps(tx, every_k_schedule=2), grads)
    halves = [
        jax.tree.map(lambda a, b: (a + b) / 2, *pair)
        for pair in zip(grads[::2], grads[1::2], strict=True)
    ]
    for row in ROWS:
        p, state = found[row.name]
        expected_p, expected = train(row.make(), random_tree(0, "float32"), halves)
        chex.assert_trees_all_close(
            (p, averaged_params(state, p)),
            (expected_p, averaged_params(expected, expected_p)),
            rtol=1e-5,
            atol=1e-6,
        )


MASKS = {
    "prefix": {"a": True, "b": False},
    "leaf": {"a": {"matrix": True, "scalar": False}, "b": [True, None]},
}


@each_row
@pytest.mark.parametrize("mask", MASKS)
def test_masked_leaves_are_taken_from_params(row, mask):
    params, grads = random_tree(0, "float32"), gradients()
    tx = optax.masked(row.make(), MASKS[mask])
    p, state = train_eagerly(tx, params, grads)
    average = averaged_params(state, p)
    whole_p, whole = trained(row.name)
    expected = averaged_params(whole, whole_p)
    chex.assert_trees_all_close(
        average["a"]["matrix"], expected["a"]["matrix"], rtol=1e-6, atol=1e-6
    )
    masked, own = (
        tree["a"]["scalar"] if mask == "leaf" else tree["b"] for tree in (average, p)
    )
    assert bits(masked) == bits(own)
    with pytest.raises(ValueError, match="`params`"):
        averaged_params(state)


@each_row
@pytest.mark.parametrize(
    "labels",
    [{"a": "one", "b": "two"}, {"a": {"matrix": "one", "scalar": "two"}, "b": "two"}],
    ids=["prefix", "mixed"],
)
def test_partition_merges_the_averages_of_its_groups(row, labels):
    params, grads = random_tree(0, "float32"), gradients()
    changed = {name: v / 2 for name, v in row.hyperparameters.items()}
    one, two = row.make(), row.make(**changed)
    tx = optax.partition({"one": one, "two": two}, labels)
    p, state = train_eagerly(tx, params, grads)
    one_p, one_state = trained(row.name)
    two_p, two_state = train(two, params, grads)
    choose = jax.tree.map(
        lambda label, x, y: x if label == "one" else y,
        labels,
        averaged_params(one_state, one_p),
        averaged_params(two_state, two_p),
    )
    for found in (averaged_params(state, p), averaged_params(state)):
        chex.assert_trees_all_close(found, choose, rtol=1e-6, atol=1e-6)


def test_apply_if_finite_leaves_a_bad_update_out_of_the_average():
    grads = gradients()
    grads.insert(3, jax.tree.map(lambda x: x * jnp.nan, grads[0]))
    wrap = lambda tx: optax.apply_if_finite(tx, max_consecutive_errors=3)  # noqa: E731
    for name, (found_p, found) in train_every_row(wrap, grads).items():
        p, state = trained(name)
        chex.assert_trees_all_close(
            averaged_params(found, found_p),
            averaged_params(state, p),
            rtol=1e-6,
            atol=1e-6,
        )


@each_row
def test_map_params_reaches_every_array_of_the_state(row):
    """optax replaces each params-shaped part by a tree of specs, as for sharding."""
    tx, params = optax.chain(optax.clip(1.0), row.make()), random_tree(0, "float32")
    state = tx.init(params)
    specs = jax.tree_util.tree_map_with_path(
        lambda path, _: jax.tree_util.keystr(path), params
    )
    mapped = optax.tree_utils.tree_map_params(
        tx, lambda _, spec: spec, state, specs, transform_non_params=lambda _: None
    )
    found = [x for x in jax.tree.leaves(mapped) if isinstance(x, str)]
    assert sorted(found) == sorted(row.arrays * jax.tree.leaves(specs))
    same = optax.tree_utils.tree_map_params(tx, lambda x: x, state)
    assert bits(same) == bits(state)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "complex64"])
@each_row
def test_strict_dtype_promotion_is_enough(row, dtype):
    def run(params, grads):
        params, state = train(row.make(), params, [grads, grads])
        return averaged_params(state, params), averaged_params(state)

    params = {"w": jnp.ones((2, 3), dtype), "b": jnp.ones((), dtype)}
    if dtype != "complex64" or row.complex:
        with jax.numpy_dtype_promotion("strict"):
            jax.eval_shape(run, params, params)


@each_row
def test_trees_without_numbers_are_accepted(row):
    tx = row.make()
    for params in ({}, None, {"a": None}, jnp.zeros((0, 3))):
        p, state = train_eagerly(tx, params, [params] * 3)
        assert jax.tree.structure(averaged_params(state)) == jax.tree.structure(params)
        assert jax.tree.structure(p) == jax.tree.structure(params)


@each_row
def test_params_may_be_numpy_or_python_numbers(row):
    tx = row.make()

    def average(params):
        updates, state = tx.update(0.5 * params, tx.init(params), params)
        return averaged_params(state), optax.apply_updates(params, updates)

    for params in (1.5, np.float32(1.5), np.ones(3)):
        chex.assert_trees_all_close(
            average(params), average(jnp.asarray(params)), rtol=1e-7
        )


@each_row
def test_unknown_extra_arguments_are_ignored(row):
    tx, params = row.make(), random_tree(0, "float32")
    (g,) = gradients(steps=1)
    state = tx.init(params)
    plain = train_step(tx, params, state, g)
    assert bits(train_step(tx, params, state, g, value=1.0, other="x")) == bits(plain)


# Containers do not look into states: some rows are enough.
some_rows = pytest.mark.parametrize(
    "row",
    [r for r in ROWS if r.name in ("asgd-compensated", "uniform", "random-scaling")],
    ids=lambda row: row.name,
)


@pytest.mark.flax
@some_rows
def test_nnx_optimizer_keeps_the_average_of_plain_training(row):
    from flax import nnx

    @nnx.jit
    def step(model, optimizer, x):
        loss = lambda model: jnp.mean((model(x) - 1.0) ** 2)  # noqa: E731
        optimizer.update(model, nnx.grad(loss)(model))

    layers = [nnx.Linear(n, m, rngs=nnx.Rngs(0)) for n, m in ((2, 3), (3, 1))]
    model, x = nnx.Sequential(layers[0], jnp.tanh, layers[1]), jnp.ones((4, 2))
    tx = optax.chain(optax.clip_by_global_norm(1.0), row.make())
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    graph, p = nnx.split(model, nnx.Param)
    p = jax.tree.map(jnp.copy, p)
    for _ in range(STEPS):
        step(model, optimizer, x)
    params = nnx.state(model, nnx.Param)
    average = averaged_params(optimizer.opt_state, params)
    assert jax.tree.structure(average) == jax.tree.structure(params)
    pure = nnx.to_pure_dict(params)
    assert bits(averaged_params(optimizer.opt_state, pure)) == bits(average)

    # The same training on the pure tree.
    def loss(params):
        return jnp.mean((nnx.merge(graph, params)(x) - 1.0) ** 2)

    state, gradient = tx.init(p), jax.jit(jax.grad(loss))
    for _ in range(STEPS):
        p, state = train_step(tx, p, state, gradient(p))
    expected = averaged_params(state, p)
    chex.assert_trees_all_close(average, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.flax
def test_averaged_params_reads_a_flax_train_state():
    from flax.training.train_state import TrainState

    (row,) = (row for row in ROWS if row.name == "uniform")
    params = random_tree(0, "float32")
    state = TrainState.create(apply_fn=None, params=params, tx=row.make())
    for g in gradients():
        state = state.apply_gradients(grads=g)
    p, expected = trained(row.name)
    assert bits(averaged_params(state, state.params)) == bits(
        averaged_params(expected, p)
    )
