# SPDX-License-Identifier: Apache-2.0
"""Averages of other libraries compared with ours, over the same parameters.

    python -m studies.coming_from

There is a row for each installed library: flax, dm-haiku and, after `pip install
keras`, Keras.

- float64: the largest difference over 60 steps;
- bfloat16, decay 0.999: the final average of parameters that are 1 for 1,000 updates
  and 2 for 3,000 more;
- float32, decay 0.9999: the final rms error for parameters near 1 with noise of 1 %,
  after 20,000 updates. The noise of the average itself, after longer runs, is
  0.01 sqrt((1 - decay) / 2) = 7.1e-5.

The true value is our average of the same parameters in float64, which
`tests/test_coming_from.py` compares with each rule in NumPy.
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
from tools import command_line

WARMUP = 10  # haiku's `warmup_length`
JUMP = np.repeat([1.0, 2.0], [1001, 3000])[:, None]
EXACT_STEPS, LONG_STEPS, SIZE = 60, 20_000, 100

# Takes the next parameters, and returns the new average.
Theirs = Callable[[jax.Array], Any]


class Peer(NamedTuple):
    """An average of another library, and ours that replaces it.

    Attributes:
      package: the package that must be installed.
      theirs: makes their average from a decay and the initial parameters.
      ours: makes our transformation from a decay.
    """

    package: str
    theirs: Callable[[float, jax.Array], Theirs]
    ours: Callable[[float], optax.GradientTransformationExtraArgs]


class Row(NamedTuple):
    """The columns of the table; see the module's docstring."""

    difference: float
    jump: tuple[float | None, ...]  # theirs (None if it fails), ours, true
    errors: tuple[float, ...]  # of theirs and of ours


def nnx_ema(decay: float, params: jax.Array) -> Theirs:
    """Begin the average of Flax."""
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
    """Begin Haiku's `EMAParamsTree`."""
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
    """Begin `optax.ema` of parameters instead of updates."""
    ema = optax.ema(decay)
    state = ema.init(params)
    update = jax.jit(ema.update)

    def take(params: jax.Array) -> jax.Array:
        nonlocal state
        average, state = update(params, state)
        return average

    return take


def incremental_update(decay: float, params: jax.Array) -> Theirs:
    """Begin `optax.incremental_update` of a copy of the parameters."""
    average = params
    update = jax.jit(optax.incremental_update, static_argnums=2)

    def take(params: jax.Array) -> jax.Array:
        nonlocal average
        average = update(params, average, 1 - decay)
        return average

    return take


def keras_ema(decay: float, params: jax.Array) -> Theirs:
    """Begin Keras's `use_ema`, in an SGD whose gradients lead to given parameters."""
    os.environ.setdefault("KERAS_BACKEND", "jax")
    import keras

    # Gradients are cast to this dtype.
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
    """Return our EMA without debiasing."""
    return average_iterates(exponential_weighting(decay, debias=False), **options)


def debiased(decay: float) -> optax.GradientTransformationExtraArgs:
    """Return our EMA with its defaults."""
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
    """Return whether `package`, which may be a dotted name, can be imported."""
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:
        return False


def our_averages(
    tx: optax.GradientTransformationExtraArgs, iterates: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Return the parameters after each update towards `iterates`, and our averages."""

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
    """Return their average after each iterate, in float64."""
    take = peer.theirs(decay, first)
    return np.stack([np.asarray(take(p)).astype(np.float64) for p in iterates])


def last_averages(
    peer: Peer, decay: float, iterates: np.ndarray, dtype: str
) -> tuple[np.ndarray | None, np.ndarray, np.ndarray]:
    """Return the last averages: theirs, ours, and ours in float64."""
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
    """Draw parameters near 1 with noise: initial ones, and `steps` more."""
    rng = np.random.default_rng(0)
    around = 1 + 0.1 * rng.standard_normal(SIZE)
    return around + scale * rng.standard_normal((steps + 1, SIZE))


def difference(peer: Peer) -> float:
    """Return the largest difference from ours; in float64 with `jax_enable_x64`."""
    iterates = jnp.asarray(noisy(1.0, EXACT_STEPS))
    followed, ours = our_averages(peer.ours(0.9), iterates)
    theirs = their_averages(peer, 0.9, iterates[0], followed)
    return float(np.abs(theirs - ours).max())


def measure(peer: Peer, long_steps: int = LONG_STEPS) -> Row:
    """Measure all columns of a peer."""
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
    """Measure, print and return the table."""
    command_line.Parser("Compare averages of other libraries.").parse_args(argv)
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
