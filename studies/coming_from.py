# SPDX-License-Identifier: Apache-2.0
"""Averages of other libraries beside ours, over the same iterates.

    python -m benchmarks.coming_from

A row for each that is installed (flax, dm-haiku; `pip install keras` adds its own):

- float64: the largest difference over 60 steps;
- bfloat16, decay 0.999: parameters that are 1 for 1,000 updates and 2 for 3,000 more,
  and where the average has come;
- float32, decay 0.9999: parameters near 1 with noise of 1 %, 20,000 updates: how far
  the average is off in the end, rms. Its own noise, after longer runs,
  is 0.01 sqrt((1 - decay) / 2) = 7.1e-5.

What is right is our average of the same iterates in float64, which
`tests/test_coming_from.py` holds against each rule in NumPy.
"""

import functools
import importlib.util
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from asgd_optax import average_iterates, averaged_params, exponential_weighting
from benchmarks import command_line

WARMUP = 10  # of haiku's `warmup_length`
JUMP = np.repeat([1.0, 2.0], [1001, 3000])[:, None]
EXACT_STEPS, LONG_STEPS, SIZE = 60, 20_000, 100

# Theirs, begun with a decay and the first parameters: takes in the next, and tells the
# average then.
Theirs = Callable[[jax.Array], Any]


class Peer(NamedTuple):
    """An average that others keep, and ours in its place.

    Attributes:
      package: what has to be installed.
      theirs: from a decay and the initial parameters to theirs, begun.
      ours: from a decay to our transformation.
    """

    package: str
    theirs: Callable[[float, jax.Array], Theirs]
    ours: Callable[[float], optax.GradientTransformationExtraArgs]


class Row(NamedTuple):
    """What was measured of a peer: see the module's docstring."""

    difference: float
    jump: tuple[float | None, ...]  # theirs, None where it fails; ours; true
    errors: tuple[float, ...]  # of theirs and of ours


def nnx_ema(decay: float, params: jax.Array) -> Theirs:
    """Flax's, of a module."""
    from flax import nnx

    class Model(nnx.Module):
        def __init__(self) -> None:
            self.w = nnx.Param(params)

    model = Model()
    ema = nnx.EMA(model, decay)
    update = nnx.jit(lambda ema, model: ema.update(model))

    def take(params: jax.Array) -> jax.Array:
        model.w[...] = params
        update(ema, model)
        return ema.params.w.get_value()

    return take


def haiku_ema(decay: float, params: jax.Array, **options: Any) -> Theirs:
    """Haiku's `EMAParamsTree`."""
    import haiku as hk

    ema = hk.without_apply_rng(
        hk.transform_with_state(lambda x: hk.EMAParamsTree(decay, **options)(x))
    )

    def tree(params: jax.Array) -> Any:
        return {"linear": {"w": params}}

    _, state = jax.jit(ema.init)(None, tree(params))
    apply = jax.jit(ema.apply)

    def take(params: jax.Array) -> jax.Array:
        nonlocal state
        average, state = apply({}, state, tree(params))
        return average["linear"]["w"]

    return take


def optax_ema(decay: float, params: jax.Array) -> Theirs:
    """`optax.ema`, given parameters in the place of updates."""
    ema = optax.ema(decay)
    state = ema.init(params)
    update = jax.jit(ema.update)

    def take(params: jax.Array) -> jax.Array:
        nonlocal state
        average, state = update(params, state)
        return average

    return take


def incremental_update(decay: float, params: jax.Array) -> Theirs:
    """`optax.incremental_update` of a copy of the parameters."""
    average = params
    update = jax.jit(optax.incremental_update, static_argnums=2)

    def take(params: jax.Array) -> jax.Array:
        nonlocal average
        average = update(params, average, 1 - decay)
        return average

    return take


def keras_ema(decay: float, params: jax.Array) -> Theirs:
    """Keras's `use_ema`, of an SGD whose gradients lead to the parameters given."""
    os.environ.setdefault("KERAS_BACKEND", "jax")
    import keras

    # Gradients are cast to this.
    keras.config.set_floatx(params.dtype.name)
    variable = keras.Variable(params, dtype=params.dtype.name)
    sgd = keras.optimizers.SGD(1.0, use_ema=True, ema_momentum=decay)
    sgd.build([variable])

    @jax.jit
    def update(variables: Any, trainable: Any, params: jax.Array) -> Any:
        (value,) = trainable
        return sgd.stateless_apply(variables, [value - params], trainable)

    variables, trainable = [v.value for v in sgd.variables], [variable.value]
    (place,) = (n for n, v in enumerate(sgd.variables) if "average" in v.path)

    def take(params: jax.Array) -> jax.Array:
        nonlocal variables, trainable
        trainable, variables = update(variables, trainable, params)
        return variables[place]

    return take


def plain(decay: float, **options: Any) -> optax.GradientTransformationExtraArgs:
    """Ours without debiasing."""
    return average_iterates(exponential_weighting(decay, debias=False), **options)


def debiased(decay: float) -> optax.GradientTransformationExtraArgs:
    """Ours as it comes."""
    return average_iterates(exponential_weighting(decay))


PEERS = {
    "`nnx.EMA`": Peer("flax.nnx.training.ema", nnx_ema, plain),
    "`optax.ema` of parameters": Peer("optax", optax_ema, debiased),
    "`optax.incremental_update`": Peer("optax", incremental_update, plain),
    "`hk.EMAParamsTree`": Peer("haiku", haiku_ema, debiased),
    "`hk.EMAParamsTree`, `warmup_length`": Peer(
        "haiku",
        functools.partial(haiku_ema, zero_debias=False, warmup_length=WARMUP),
        functools.partial(plain, start=WARMUP),
    ),
    "Keras `use_ema`": Peer("keras", keras_ema, functools.partial(plain, start=1)),
}


def installed(package: str) -> bool:
    """Whether `package` can be imported: a dotted name too."""
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:
        return False


def our_averages(
    tx: optax.GradientTransformationExtraArgs, iterates: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """What updates towards `iterates` lead to, and our average after each."""

    def step(carry: Any, new: jax.Array) -> Any:
        params, state = carry
        updates, state = tx.update(new - params, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), (params, averaged_params(state))

    @jax.jit
    def run(iterates: jax.Array) -> Any:
        carry = iterates[0], tx.init(iterates[0])
        return jax.lax.scan(step, carry, iterates[1:])[1]

    return run(iterates)


def their_averages(
    peer: Peer, decay: float, first: jax.Array, iterates: jax.Array
) -> np.ndarray:
    """Theirs after each iterate, in float64."""
    take = peer.theirs(decay, first)
    return np.stack([np.asarray(take(p)).astype(np.float64) for p in iterates])


def last_averages(
    peer: Peer, decay: float, iterates: np.ndarray, dtype: str
) -> tuple[np.ndarray | None, np.ndarray, np.ndarray]:
    """Theirs, ours, and ours in float64, of iterates in `dtype`, after the last."""
    tx, given = peer.ours(decay), jnp.asarray(iterates, dtype)
    followed, ours = our_averages(tx, given)
    try:
        theirs = their_averages(peer, decay, given[0], followed)[-1]
    except TypeError:
        theirs = None
    with jax.enable_x64(True):
        rounded = np.concatenate([given[:1], followed]).astype(np.float64)
        _, true = our_averages(tx, jnp.asarray(rounded))
    return theirs, np.asarray(ours[-1]).astype(np.float64), np.asarray(true[-1])


def noisy(scale: float, steps: int) -> np.ndarray:
    """Parameters near 1 with noise: the initial ones, and `steps` more."""
    rng = np.random.default_rng(0)
    around = 1 + 0.1 * rng.standard_normal(SIZE)
    return around + scale * rng.standard_normal((steps + 1, SIZE))


def difference(peer: Peer) -> float:
    """The largest difference from ours; in float64 where `jax_enable_x64` is set."""
    iterates = jnp.asarray(noisy(1.0, EXACT_STEPS))
    followed, ours = our_averages(peer.ours(0.9), iterates)
    theirs = their_averages(peer, 0.9, iterates[0], followed)
    return float(np.abs(theirs - ours).max())


def measure(peer: Peer, long_steps: int = LONG_STEPS) -> Row:
    """All of a peer's columns."""
    with jax.enable_x64(True):
        apart = difference(peer)
    jump = last_averages(peer, 0.999, JUMP, "bfloat16")
    *float32, true = last_averages(peer, 0.9999, noisy(0.01, long_steps), "float32")
    return Row(
        apart,
        tuple(None if x is None else float(x[0]) for x in jump),
        tuple(float(np.sqrt(np.mean((x - true) ** 2))) for x in float32),
    )


def main(
    argv: Sequence[str] | None = None, long_steps: int = LONG_STEPS
) -> dict[str, Row]:
    """Measures, prints the table and returns it."""
    command_line.Parser("Averages of other libraries beside ours.").parse_args(argv)
    rows = {}
    print("| | float64 | bfloat16: theirs, ours, true | float32: theirs, ours |")
    print("| --- | --- | --- | --- |")
    for name, peer in PEERS.items():
        if not installed(peer.package):
            print(f"| {name} | not installed |")
            continue
        rows[name] = row = measure(peer, long_steps)
        jump = ", ".join("fails" if x is None else f"{x:.4f}" for x in row.jump)
        errors = ", ".join(f"{x:.1e}" for x in row.errors)
        print(f"| {name} | {row.difference:.1e} | {jump} | {errors} |")
    return rows


if __name__ == "__main__":
    main()
