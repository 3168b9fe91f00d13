# SPDX-License-Identifier: Apache-2.0
"""`benchmarks/after_the_run.py`: its branches, what it merges, and its table."""

import jax
import numpy as np
import pytest
from flax import nnx

from benchmarks import after_the_run as study
from examples import after_the_run as lesson
from tests.programs import error_of

pytestmark = pytest.mark.flax
SIZES = study.Sizes((15, 30), 15)


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    settings = {"LAYERS": 1, "WIDTH": 8, "HEADS": 2, "CONTEXT": 8, "BATCH_SIZE": 2}
    settings |= {"EVERY": 3, "WARMUP": 2, "TRIED": (0.06, 0.12), "DTYPE": "float32"}
    for name, value in settings.items():
        monkeypatch.setattr(lesson, name, value)
    monkeypatch.setattr(study, "TINY", {})
    monkeypatch.setattr(study, "QUICK", SIZES)


@pytest.fixture
def texts(tmp_path):
    """Files of ten, of which two are to validate and to test with."""
    folder = tmp_path / "text"
    folder.mkdir()
    for n in range(10):
        (folder / f"{n}.py").write_text(f"{n}, " * 20 + "abc" * n)
    return folder


def numbers(params):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(params)])


def test_the_schedules_are_the_constant_one_to_their_branch_and_end_at_zero():
    constant = study.constant_rate()
    assert constant(lesson.WARMUP) == constant(10_000) == np.float32(lesson.RATE)
    (start, cosine), (branch, linear) = study.branches(100).values()
    assert (start, branch) == (0, 80)
    assert [linear(n) for n in range(81)] == [constant(n) for n in range(81)]
    np.testing.assert_allclose(linear(90), lesson.RATE / 2, rtol=1e-6)
    assert cosine(100) == pytest.approx(0, abs=1e-9)
    assert linear(100) == 0 < linear(99)


def test_a_branch_goes_on_where_the_run_was(texts, tmp_path):
    training, _, _ = lesson.load(texts)
    run = tmp_path / "constant"
    study.train_constant(training, 0, 15, run)
    rate = study.constant_rate()
    whole = study.train(training, 0, rate, range(1, 16))
    branch = study.train(training, 0, rate, range(13, 16), run)
    np.testing.assert_array_equal(numbers(branch), numbers(whole))
    (first, cooldown) = study.branches(15)[study.LINEAR]
    assert first == 12
    cooled = study.train(training, 0, cooldown, range(13, 16), run)
    moved = np.abs(numbers(cooled) - numbers(whole)).max()
    assert 0 < moved < 10 * lesson.RATE


def test_what_is_merged_and_chosen(texts, tmp_path):
    training, validation, test = lesson.load(texts)
    study.train_constant(training, 0, 30, tmp_path / "constant")
    score = study.scorer(validation, test)
    run = study.Run(tmp_path / "constant", 30, score)
    iterates = [numbers(run.kept[study.ITERATE, n]) for n in (24, 27, 30)]
    merged = run.merged("linear", 30)
    np.testing.assert_allclose(numbers(merged), np.mean(iterates, axis=0), rtol=1e-5)
    # c_0 = 1 - the rest, c_1 = s(1/3) - s(2/3), c_2 = s(2/3) with s = 1 - sqrt.
    by_root = numbers(run.merged("minus_sqrt", 30))
    first, second = np.sqrt([1 / 3, 2 / 3])
    coefficients = [first, second - first, 1 - second]
    expected = np.tensordot(coefficients, iterates, axes=1)
    np.testing.assert_allclose(by_root, expected, rtol=1e-5, atol=1e-7)

    starts = {n: score(run.mean(n, 30), validate=True) for n in range(0, 30, 3)}
    assert run.best_start(30) == min(starts, key=starts.get)
    assert score(run.mean(0, 30)) != starts[0]  # another text
    model, _ = lesson.create(0.0, 0)
    nnx.update(model, run.kept[study.ITERATE, 30])
    pieces = [lesson.draw_batch(validation, n) for n in range(study.VALIDATION)]
    expected = np.mean([lesson.loss(model, batch) for batch in pieces])
    iterate = score(run.kept[study.ITERATE, 30], validate=True)
    np.testing.assert_allclose(iterate, expected, rtol=1e-5)


def test_the_table_and_nothing_trained_twice(texts, tmp_path, capsys, monkeypatch):
    argv = ["--quick", "--seeds=1", f"--text={texts}", f"--runs={tmp_path / 'runs'}"]
    argv.append(f"--output={tmp_path / 'results'}")
    study.main(argv)
    page = (tmp_path / "results" / "after_the_run.md").read_text()
    table = [line.split("|")[1:-1] for line in page.splitlines() if "|" in line]
    assert [cells[0].strip() for cells in table[2:]] == list(study.ROWS)
    assert [cell.strip() for cell in table[0][1:]] == ["15 steps", "30 steps"]
    losses = np.array([[float(c.split()[0]) for c in row[1:]] for row in table[2:]])
    assert ((losses > 4) & (losses < 7)).all()
    assert len(np.unique(losses[:, 1])) > 4
    assert (tmp_path / "results" / "after_the_run.png").stat().st_size > 10_000

    monkeypatch.setattr(lesson, "train_step", None)  # it would be called in vain
    study.main(argv)
    again = (tmp_path / "results" / "after_the_run.md").read_text()
    assert again.splitlines()[:20] == page.splitlines()[:20]


def test_bad_options(capsys):
    for option, value in ("--seeds", "0"), ("--dtype", "int8"), ("--speed", "1"):
        assert option in error_of(study.main, [f"{option}={value}"], capsys)
