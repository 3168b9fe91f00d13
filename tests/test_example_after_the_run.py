# SPDX-License-Identifier: Apache-2.0
"""`examples/after_the_run.py`: its averages are those of the iterates it trained."""

import jax
import numpy as np
import pytest
from flax import nnx

from asgd_optax import gamma_from_width, power_weighting
from examples import after_the_run
from tests.programs import assert_lesson_refuses
from tests.reference import average_shares

TINY = {"LAYERS": 1, "WIDTH": 8, "HEADS": 2, "CONTEXT": 8, "BATCH_SIZE": 2}
SHORT = {"STEPS": 32, "EVERY": 2, "WARMUP": 2, "TRIED": (0.07,)}


@pytest.fixture
def iterates_and_averages(monkeypatch, tmp_path):
    """What a short run of a tiny network went through, and what it made of that."""
    for name, value in (TINY | SHORT).items():
        monkeypatch.setattr(after_the_run, name, value)
    models, averages = [], {}
    train_step, average = after_the_run.train_step, after_the_run.average

    def recorded(model, optimizer, batch):
        if not models:
            models.append(leaves(nnx.state(model)))
        train_step(model, optimizer, batch)
        models.append(leaves(nnx.state(model)))

    def kept(run, target, read):
        averages[target] = average(run, target, read)
        return averages[target]

    monkeypatch.setattr(after_the_run, "train_step", recorded)
    monkeypatch.setattr(after_the_run, "average", kept)
    results = after_the_run.main(tmp_path / "figure.png")
    return results, np.stack(models), averages


def leaves(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def test_its_averages_are_of_the_iterates(iterates_and_averages, tmp_path, capsys):
    (iterate, means, widths), iterates, averages = iterates_and_averages
    assert {end: [*starts] for end, starts in means.items()} == {
        16: [*range(0, 16, 2)],
        32: [*range(0, 32, 2)],
    }
    assert widths.keys() == {0.07}
    *of_means, of_width = averages.items()
    assert len(of_means) == 8 + 16
    moved = np.abs(iterates[-1] - iterates[0]).max()
    for target, average in of_means:
        expected = iterates[target.start + 1 : target.step + 1].mean(axis=0)
        # Means of float32, of which each was rounded.
        np.testing.assert_allclose(leaves(average), expected, atol=1e-4 * moved)

    # Of snapshots of two widths, nearly.
    target, average = of_width
    weight = power_weighting(gamma_from_width(0.07))
    shares = average_shares(lambda n: float(weight(n)), target.step)
    np.testing.assert_allclose(leaves(average), shares @ iterates, atol=0.05 * moved)

    losses = [iterate, *means[16].values(), *means[32].values(), *widths.values()]
    assert len(set(losses)) == 26
    assert all(4 < loss < 7 for loss in losses)  # log(256) is 5.5
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_it_learns_and_reads_text_by_files(monkeypatch, tmp_path):
    for name, value in TINY.items():
        monkeypatch.setattr(after_the_run, name, value)
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "left_out.py").write_text("z" * 100)
    for n in range(20):
        (tmp_path / f"{n:02}.py").write_text(chr(ord("a") + n) * 30)
    training, validation, test = after_the_run.load(tmp_path)
    assert bytes(validation) == b"i" * 30 + b"s" * 30
    assert bytes(test) == b"j" * 30 + b"t" * 30
    assert len(training) == 16 * 30
    batch = after_the_run.draw_batch(training, 0)
    assert batch.shape == (2, 9)
    model, optimizer = after_the_run.create(0.01, seed=0)
    before = after_the_run.loss(model, batch)
    for _ in range(20):
        after_the_run.train_step(model, optimizer, batch)
    assert after_the_run.loss(model, batch) < 0.5 * before
    # What comes later is not known earlier.
    later = batch.copy()
    later[:, -2] += 1
    logits, changed = model(batch[:, :-1]), model(later[:, :-1])
    np.testing.assert_array_equal(logits[:, :-1], changed[:, :-1])
    assert not np.array_equal(logits[:, -1], changed[:, -1])


def test_a_bad_option_is_refused_in_one_line(tmp_path, monkeypatch, capsys):
    assert_lesson_refuses("after_the_run", tmp_path, monkeypatch, capsys)
