# SPDX-License-Identifier: Apache-2.0
"""`benchmarks/transformer.py`: ours and by hand are the same average, and the table."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from asgd_optax import asgd, average_iterates, averaged_params
from benchmarks import by_hand, harness, transformer
from benchmarks.transformer import HAND, NARROW, NONE, OURS, QUICK
from tests.support import enable_x64, train_step

# Two iterates are averaged where every tenth is, and a step follows.
STEPS = 2 * transformer.EVERY + 1
TRAININGS = transformer.trainings()
PAIRS = [name.removesuffix(OURS) for name in TRAININGS if name.endswith(OURS)]


def train(name, dtype):
    """The iterates of some steps, and what the training carries at their end."""
    training = TRAININGS[name]
    params = transformer.draw_params(QUICK, dtype)
    step = transformer.whole_step(QUICK, training)
    carry, batch = training.init(params), transformer.draw_batch(QUICK)
    iterates = []
    for _ in range(STEPS):
        carry = step(carry, batch)
        iterates.append(jax.tree.map(np.asarray, carry[0]))
    return iterates, carry


def distance(tree, other):
    """The largest difference in a leaf, over its largest element."""

    def leaf(x, y):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        return np.abs(x - y).max() / np.abs(y).max()

    return max(jax.tree.leaves(jax.tree.map(leaf, tree, other)))


@pytest.mark.parametrize("pair", [pair for pair in PAIRS if NARROW not in pair])
def test_ours_is_the_average_by_hand(pair):
    with enable_x64(True):
        _, (params, state) = train(pair + OURS, "float64")
        _, (same, _, (expected, *_)) = train(pair + HAND, "float64")
        average = averaged_params(state, params)
        assert distance(params, same) < 1e-11
        assert distance(average, expected) < 1e-11
        # Which is more than that both follow the iterate, or do nothing.
        start = transformer.draw_params(QUICK, "float64")
        assert distance(average, params) > 1e-3 < distance(average, start)


def test_in_bfloat16_ours_averages_what_is_applied():
    iterates, (_, state) = train(f"{NARROW}EMA{OURS}", "bfloat16")
    wide = [jax.tree.map(lambda p: p.astype(np.float64), tree) for tree in iterates]
    start = transformer.draw_params(QUICK, "bfloat16")
    expected = jax.tree.map(lambda p: np.asarray(p, np.float64), start)
    for tree in wide:
        expected = jax.tree.map(
            lambda a, p: a + (1 - by_hand.DECAY) * (p - a), expected, tree
        )
    average = averaged_params(state)
    assert {leaf.dtype for leaf in jax.tree.leaves(average)} == {np.dtype("float32")}
    assert distance(average, expected) < 1e-6
    # What it is by hand depends on what the compiler rounds; it is no further than
    # the parameters' own precision.
    _, (_, _, (kept, *_)) = train(f"{NARROW}EMA{HAND}", "bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(kept)} == {np.dtype("float32")}
    assert distance(kept, expected) < 2**-8


@pytest.mark.parametrize("name", [*by_hand.RULES, "asgd"])
def test_every_rule_by_hand_is_ours(name):
    rng = np.random.default_rng(0)
    with enable_x64(True):
        params, *grads = (jnp.array(x) for x in rng.normal(size=(41, 5)))
        if name == "asgd":
            tx = asgd(0.1, lambd=0.02, t0=3)
            hand = by_hand.asgd(0.1, lambd=0.02, t0=3)
            own, kept = params, hand.init(params)
        else:
            rule = by_hand.RULES[name]
            tx = optax.chain(optax.sgd(0.1), average_iterates(rule.weighting))
            average = by_hand.average(rule)
            own, kept = params, average.init(params)
        state = tx.init(params)
        for grad in grads:
            params, state = train_step(tx, params, state, grad)
            if name == "asgd":
                own, kept = hand.step(own, kept, grad)
            else:
                own = own - 0.1 * grad
                kept = average.update(kept, own)
        ours = averaged_params(state, params)
        np.testing.assert_allclose(ours, kept[0], rtol=0, atol=1e-13)
        assert np.abs(ours - params).max() > 0.01


def test_the_network_learns_and_reads_nothing_that_comes_later():
    params = transformer.draw_params(QUICK, "float32")
    batch = transformer.draw_batch(QUICK)
    losses = [transformer.loss(params, batch, QUICK.heads)]
    iterates, _ = train(NONE, "float32")
    params = jax.tree.map(jnp.array, iterates[-1])
    losses.append(transformer.loss(params, batch, QUICK.heads))
    assert abs(losses[0] - math.log(256)) < 0.1  # of bytes that are all as likely
    assert losses[1] < losses[0] - 0.05
    inputs = batch[:, :-1]
    other = inputs.copy()
    other[:, 7] = (other[:, 7] + 1) % 256
    found, changed = (
        np.asarray(transformer.logits(params, x, QUICK.heads)) for x in (inputs, other)
    )
    np.testing.assert_array_equal(found[:, :7], changed[:, :7])
    assert (found[:, 7:] != changed[:, 7:]).any(axis=(0, 2)).all()


def test_the_table_says_what_averaging_adds():
    """40 ms of an update and 2000 of a step; an average that takes 5 more."""

    def time(milliseconds):
        return harness.Time(*(1e-3 * (milliseconds + d) for d in (0, -1, 1)))

    rows = dict.fromkeys(TRAININGS, transformer.Row(time(2100), time(45)))
    rows[NONE] = rows[NARROW + NONE] = transformer.Row(time(2000), time(40))
    rows["EMA" + OURS] = transformer.Row(time(2100), time(54))
    low, median, high = sorted(transformer.added(rows, "power" + OURS))
    np.testing.assert_allclose([low, median, high], [0.2, 0.25, 0.3])
    page = transformer.format_page(rows, QUICK)
    (line,) = (x for x in page.splitlines() if x.startswith(f"| EMA{OURS} "))
    cells = [cell.strip() for cell in line.split("|")[2:-1]]
    assert cells[0] == "2100 (2099 to 2101)"
    assert cells[1:] == ["+5.0", "54.0 (53.0 to 55.0)", "0.70", "1.20"]
    (line,) = (x for x in page.splitlines() if x.startswith("| none "))
    assert [cell.strip() for cell in line.split("|")[3:-1]] == [
        "",
        "40.0 (39.0 to 41.0)",
        "",
        "",
    ]


def test_the_picture_has_a_bar_for_every_average(tmp_path):
    time = harness.Time(2e-3, 1e-3, 3e-3)
    rows = dict.fromkeys(TRAININGS, transformer.Row(time, time))
    transformer.draw(rows, tmp_path / "transformer.png")
    assert (tmp_path / "transformer.png").stat().st_size > 10_000
