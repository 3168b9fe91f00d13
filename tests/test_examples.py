# SPDX-License-Identifier: Apache-2.0
"""Every example runs and shows what it claims."""

import importlib
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh

from asgd_optax import gamma_from_width, power_weighting
from tests.programs import PNG_SIGNATURE
from tests.reference import average_shares

EXAMPLES = Path(__file__).parents[1] / "examples"


def example(name, monkeypatch, **settings):
    """Return the module of an example, with other constants."""
    module = importlib.import_module(f"examples.{name}")
    for constant, value in settings.items():
        monkeypatch.setattr(module, constant, value)
    return module


def leaves(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def test_after_the_run_averages_the_iterates_it_trained(monkeypatch, tmp_path):
    lesson = example(
        "after_the_run",
        monkeypatch,
        **{"LAYERS": 1, "WIDTH": 8, "HEADS": 2, "CONTEXT": 8, "BATCH_SIZE": 2},
        **{"STEPS": 32, "EVERY": 4, "WARMUP": 2, "TRIED": (0.1,), "TEXT": EXAMPLES},
    )
    iterates, averages = [], {}
    train_step, average = lesson.train_step, lesson.average

    def recorded(model, optimizer, batch):
        if not iterates:
            iterates.append(leaves(nnx.state(model)))
        train_step(model, optimizer, batch)
        iterates.append(leaves(nnx.state(model)))

    def computed(kept, target):
        averages[target] = average(kept, target)
        return averages[target]

    monkeypatch.setattr(lesson, "train_step", recorded)
    monkeypatch.setattr(lesson, "average", computed)
    iterate, means, widths = lesson.main(tmp_path / "figure.png")

    assert list(means) == list(range(0, 32, 4))
    *of_means, of_width = averages.items()
    moved = np.abs(iterates[-1] - iterates[0]).max()
    for target, mean in of_means:
        expected = np.mean(iterates[target.start + 1 : target.step + 1], axis=0)
        # The means are differences of rounded float32 means.
        np.testing.assert_allclose(leaves(mean), expected, atol=1e-4 * moved)
    # A width is reconstructed approximately, from snapshots of other averages.
    weight = power_weighting(gamma_from_width(0.1))
    shares = average_shares(lambda n: float(weight(n)), 32)
    expected = np.tensordot(shares, iterates, axes=1)
    np.testing.assert_allclose(leaves(of_width[1]), expected, atol=0.05 * moved)
    losses = [iterate, *means.values(), *widths.values()]
    assert all(4 < loss < 7 for loss in losses)  # log(256) is 5.5
    assert (tmp_path / "figure.png").read_bytes().startswith(PNG_SIGNATURE)


def test_batch_norm_recomputed_statistics_are_better_than_stale_ones(monkeypatch):
    results = example("batch_norm", monkeypatch).main(steps=300, seeds=4)
    assert results.updated.loss.shape == (4,)
    assert results.updated.loss.mean() < 0.85 * results.stale.loss.mean()
    assert results.updated.loss.mean() < 0.85 * results.last.loss.mean()
    assert results.updated.accuracy.mean() > results.stale.accuracy.mean()
    assert results.updated.accuracy.mean() > 0.96


def test_data_parallel_ways_give_the_same_weights(monkeypatch):
    pmap, jit = example("data_parallel", monkeypatch).main(steps=12).values()
    np.testing.assert_allclose(jit[:2], pmap[:2], rtol=1e-4)
    assert pmap.average_loss != pmap.last_loss
    # Eight devices hold an eighth each, except for a last bias of ten numbers.
    for field in ("params_bytes", "state_bytes"):
        whole, eighth = getattr(pmap, field), getattr(jit, field)
        assert whole / 8 <= eighth < whole / 8 + 100
    assert pmap.params_bytes == 4 * (64 * 512 + 512 + 512 * 10 + 10)
    assert pmap.params_bytes < pmap.state_bytes < pmap.params_bytes + 100


def test_digits_average_is_better_than_the_last_iterate(tmp_path, monkeypatch):
    # A short run is noisier at a larger learning rate.
    lesson = example("digits", monkeypatch, LEARNING_RATE=0.8)
    steps, curves, test = lesson.main(tmp_path / "figure.png", steps=800, seeds=4)
    assert test["averaged"].loss.mean() < 0.85 * test["last"].loss.mean()
    assert test["averaged"].accuracy.mean() > 0.95
    # Up to step t0 + 1 the average is the iterate, afterwards it moves less.
    last, average = curves["last"].loss, curves["averaged"].loss
    before = steps <= 401
    np.testing.assert_array_equal(average[before], last[before])
    moves = [np.abs(np.diff(x[~before], axis=0)).mean() for x in (average, last)]
    assert moves[0] < 0.5 * moves[1]
    assert (tmp_path / "figure.png").read_bytes().startswith(PNG_SIGNATURE)


@pytest.mark.torch
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_from_pytorch_continues_as_torch_alone(dtype, tmp_path, monkeypatch):
    torch = pytest.importorskip("torch")
    before = torch.get_default_dtype(), torch.get_num_threads()
    try:
        lesson = example("from_pytorch", monkeypatch, EVERY=2)
        results = lesson.main(tmp_path / "figure.png", dtype, steps=60)
    finally:
        torch.set_default_dtype(before[0])
        torch.set_num_threads(before[1])
    assert not jax.config.jax_enable_x64
    alone, moved = results["alone"], results["moved"]
    # Averaging began at step 15, so the average is no longer the iterate at the move.
    assert abs(alone[14, 1] - alone[14, 0]) > 0.01
    assert alone[-1, 0] < 0.7 * alone[0, 0]
    tolerance = 300 * np.finfo(dtype).eps
    np.testing.assert_allclose(moved, alone[15:], tolerance)
    assert all(0 < difference < tolerance for difference in results["largest"])
    assert (tmp_path / "figure.png").read_bytes().startswith(PNG_SIGNATURE)


def test_horizon_free_average_keeps_up_with_a_cosine_per_horizon(tmp_path, monkeypatch):
    lesson = example("horizon_free", monkeypatch)
    results = lesson.main(tmp_path / "figure.png", last=11, seeds=4)
    assert results.horizons.tolist() == [256, 512, 1024, 2048]
    last, average, cosine = (results.risks[name].mean(axis=1) for name in lesson.NAMES)
    assert np.all(average < 0.9 * last)
    assert 0.7 < np.exp(np.mean(np.log(average / cosine))) < 1.3
    # Each horizon reads the same run: nothing depends on the later ones.
    shorter = lesson.main(tmp_path / "figure.png", last=9, seeds=4)
    for name in lesson.NAMES:
        np.testing.assert_allclose(shorter.risks[name], results.risks[name][:2], 1e-4)
    assert (tmp_path / "figure.png").read_bytes().startswith(PNG_SIGNATURE)


def test_language_model_begins_to_average_by_itself(tmp_path, monkeypatch):
    lesson = example("language_model", monkeypatch, LEARNING_RATE=40.0, NONMONO=1)
    words, (training, validation) = lesson.load()
    third = [x[: len(x) // 3] for x in training]
    monkeypatch.setattr(lesson, "load", lambda: (words, [third, validation]))
    results = lesson.main(tmp_path / "figure.png", epochs=16, hidden=32)
    began, iterate, average = (results[x] for x in ("began", "iterate", "average"))
    assert 1 < began < 16
    np.testing.assert_array_equal(average[:began], iterate[:began])
    assert average[-1] < 0.9 * iterate[-1]
    assert (tmp_path / "figure.png").read_bytes().startswith(PNG_SIGNATURE)


def test_linen_train_state_resumes_bit_for_bit(tmp_path, monkeypatch):
    lesson = example("linen_train_state", monkeypatch, SAVE_EVERY=500)
    results = lesson.main(tmp_path / "checkpoints")
    assert results["starts"] == [0, 500]
    assert results["bitwise"]
    assert results["averaged"][0] < results["last"][0] < 0.3
    assert results["averaged"][1] > 0.9


def test_online_inference_extrapolation_covers_where_one_rate_does_not(
    tmp_path, monkeypatch
):
    lesson = example("online_inference", monkeypatch)
    study = lesson.main(tmp_path / "figure.png", n=40_000, streams=200)
    # The true values maximise the likelihood of all data.
    x, y = lesson.tumours()
    texture, smoothness, symmetry, contrast, log_odds = study.truth
    assert contrast == pytest.approx(smoothness - texture)
    intercept = log_odds - texture - smoothness - symmetry
    p = np.array([intercept, texture, smoothness, symmetry])
    assert np.abs(x.T @ (1 / (1 + np.exp(-x @ p)) - y)).max() / len(x) < 1e-6

    lower, upper = study.intervals
    # Averaging begins after 400 observations; the second reading is at 400.
    assert np.isnan(lower[1]).all()
    assert np.all(lower[2:] < upper[2:])
    # At a quarter of the observations, intervals are twice as long.
    lengths = (upper - lower).mean(axis=(1, 2, 3))
    assert 1.7 < lengths[len(lengths) // 4 - 1] / lengths[-1] < 2.3
    inside = (lower[-1] <= study.truth) & (study.truth <= upper[-1])
    np.testing.assert_array_equal(study.covered, inside)
    one, two = study.covered.mean(axis=(0, 2))
    error = study.covered.mean(axis=2).std(axis=0).max() / np.sqrt(200)
    assert one + 3 * error < two
    assert abs(two - 0.95) < 4 * error
    middle = (lower + upper)[-1] / 2
    bias = (middle.mean(axis=0) - study.truth) / middle.std(axis=0)
    assert np.abs(bias[0]).max() > 0.8
    assert np.abs(bias[1]).max() < 0.3
    assert (tmp_path / "figure.png").read_bytes().startswith(PNG_SIGNATURE)


@pytest.mark.parametrize(("apart", "count"), [(False, 12), (True, 9 * 80 + 3)])
def test_pod_plan_lays_out_seventy_billion_parameters(apart, count, monkeypatch):
    lesson = example("pod_plan", monkeypatch)
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("rows", "columns"))
    params = lesson.lay_out(mesh, layers=80, apart=apart)
    assert len(jax.tree.leaves(params)) == count
    # https://arxiv.org/abs/2407.21783, table 3: 80 layers, 8192, 28672, 128K tokens.
    total = sum(p.size for p in jax.tree.leaves(params))
    assert total == 70_553_706_496
    norms = 0
    for path, p in jax.tree_util.tree_leaves_with_path(params):
        copied = "norm" in jax.tree_util.keystr(path)
        assert p.sharding.is_fully_replicated == copied
        assert p.size / np.prod(p.sharding.shard_shape(p.shape)) == (1 if copied else 8)
        norms += copied * p.size
    # Two bytes each, for an eighth of the matrices and all of the norms.
    assert lesson.on_a_chip(params) == 2 * ((total - norms) // 8 + norms)


def test_weightings_uniform_average_keeps_the_start(tmp_path, monkeypatch):
    lesson = example("weightings", monkeypatch)
    results = lesson.main(tmp_path / "figure.png", steps=400, seeds=5)
    test = {name: losses.mean() for name, losses in results.test.items()}
    assert test["polynomial"] < 0.9 * test["last iterate"]
    assert test["exponential"] < 0.95 * test["last iterate"]
    assert test["polynomial"] < 0.9 * test["uniform"]
    assert test["exponential"] < 0.9 * test["uniform"]
    # The first iterate initialises every average.
    first = {name: curve[0] for name, curve in results.curves.items()}
    for losses in first.values():
        np.testing.assert_allclose(losses, first["last iterate"], rtol=1e-5)
    assert (tmp_path / "figure.png").read_bytes().startswith(PNG_SIGNATURE)
