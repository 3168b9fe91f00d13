# SPDX-License-Identifier: Apache-2.0
"""`benchmarks/language_model.py`: what it compares, survives and refuses."""

import itertools
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from benchmarks import language_model as example
from examples import language_model as lesson
from tests.programs import (
    assert_explained,
    assert_refuses_outputs,
    contents,
    error_of,
)

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
SIZES = {"train": 300, "valid": 100, "test": 100}  # lines
EPOCHS = 12
OPTIONS = {
    "--hidden": "16",
    "--seeds": "2",
    "--epochs": str(EPOCHS),
    "--rate": "60",
    "--nonmono": "1",
}


def sentences(rng, lines):
    """Lines in the form of Penn Treebank's: words apart, rare ones replaced."""
    nouns = ["man", "dog", "house", "market", "company", "<unk>", "share", "year"]
    verbs = ["sees", "buys", "is", "n't", "likes", "rose", "fell"]
    for _ in range(lines):
        words = ["the", rng.choice(nouns), rng.choice(verbs), "a", rng.choice(nouns)]
        words += ["of", "$", "N"] * rng.randint(0, 2) + ["mr.", rng.choice(nouns)]
        yield f" {' '.join(words)} \n"


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    """A folder as Penn Treebank's."""
    folder = tmp_path_factory.mktemp("penn")
    rng = random.Random(0)
    for part, lines in SIZES.items():
        (folder / f"ptb.{part}.txt").write_text("".join(sentences(rng, lines)))
    with (folder / "ptb.test.txt").open("a") as file:
        file.write(" the zyzzyva rose \n")
    (folder / "README").write_text("no part of it")
    return folder


def arguments(corpora, folder, *options, **changed):
    """The command line of a short run that writes into `folder`."""
    settings = {**OPTIONS, "--data": corpora, "--output": folder / "figure.png"}
    settings |= {f"--{name.replace('_', '-')}": v for name, v in changed.items()}
    return [str(x) for pair in settings.items() for x in pair] + list(options)


@pytest.fixture(scope="module")
def finished(corpora, tmp_path_factory):
    """A run that nothing interrupted: its folder of checkpoints, its results."""
    folder = tmp_path_factory.mktemp("finished")
    argv = arguments(corpora, folder, checkpoint_dir=folder / "saved")
    return folder / "saved", example.main(argv)


@pytest.fixture
def saved(finished, tmp_path):
    """A copy of the finished run's checkpoints."""
    return shutil.copytree(finished[0], tmp_path / "saved")


@pytest.fixture
def no_training(monkeypatch):
    def train_epoch(*args):
        raise AssertionError("trained")

    monkeypatch.setattr(example, "train_epoch", train_epoch)


def assert_same(results, others):
    np.testing.assert_equal(results._asdict(), others._asdict())


def test_what_is_compared(corpora, tmp_path, capsys):
    results = example.main(arguments(corpora, tmp_path))
    assert list(results.curves) == list(results.test) == list(example.LABELS)
    for name in example.LABELS:
        assert results.curves[name].shape == (EPOCHS, 2)
        assert results.test[name].shape == (2,)
    last, average = results.curves["last"], results.curves["average"]
    np.testing.assert_array_equal(
        results.curves["best"], np.minimum.accumulate(last, axis=0)
    )
    assert np.isfinite(results.triggers).all()
    for seed in range(2):
        # AWD-LSTM's rule, with the losses at the epochs' ends.
        seen = []
        for loss in last[:-1, seed]:
            fires = len(seen) > 1 and loss > min(seen[:-1])
            seen.append(loss)
            if fires:
                break
        trigger = len(seen)
        assert results.triggers[seed] == trigger
        np.testing.assert_array_equal(average[:trigger, seed], last[:trigger, seed])
        assert (average[trigger:, seed] != last[trigger:, seed]).all()
        # The second trajectory leaves the first where this gets worse.
        worse = last[:, seed] > results.curves["best"][:, seed]
        same = np.argmax(worse) + 1
        divided = results.curves["divided"][:, seed]
        np.testing.assert_array_equal(divided[:same], last[:same, seed])
        assert (divided[same:] != last[same:, seed]).all()
    assert (results.curves["ema"] != average).all()
    assert average[-1].mean() < last[-1].mean()
    assert results.test["average"].mean() < 10  # of some 20 words

    assert (tmp_path / "figure.png").read_bytes().startswith(PNG_SIGNATURE)
    assert (tmp_path / "figure.png").stat().st_size < 150 * 1024
    printed = capsys.readouterr().out
    for name, label in example.LABELS.items():
        assert f"{label} " in printed
        assert f"{results.test[name].mean():.2f} ±" in printed
    for values in (last[-1], average[-1], results.test["last"]):
        assert all(f"{value:.2f}" in printed for value in values)
    below = np.sum(average[-1] < last[-1])
    assert f"in {below} of 2 seeds" in printed
    assert results.sample in printed
    assert example.UNKNOWN not in results.sample


def test_the_second_trajectory_is_the_first_ones_recipe(corpora):
    # At a rate next to the first's it is trained by itself.
    corpus = example.load(corpora)
    setup = example.Setup(example.LanguageModel(len(corpus.words), 16), 60.0, 1, EPOCHS)
    state = example.create(setup, 0)
    state = state._replace(rate=np.nextafter(np.float32(60), np.float32(0)))
    windows = example.cut(corpus.training), example.cut(corpus.validation)
    trained = example.train_epoch(setup, state, 0, 0, *windows)
    trees = trained.params, trained.divided, state.params
    for first, second, start in zip(*map(jax.tree.leaves, trees), strict=True):
        moved = np.abs(first - start).max()
        assert moved > 0.01
        np.testing.assert_allclose(second, first, rtol=0, atol=1e-4 * moved)


def test_the_run_is_killed_and_started_again(corpora, finished, tmp_path):
    folder = tmp_path / "saved"
    argv = arguments(corpora, tmp_path, checkpoint_dir=folder)
    root = Path(example.__file__).parents[1]
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.language_model", *argv],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while process.poll() is None and not (folder / "2").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (folder / str(EPOCHS)).exists()

    assert_same(example.main(argv), finished[1])
    left = [str(EPOCHS - 1), str(EPOCHS)]
    assert sorted(path.name for path in folder.iterdir()) == sorted(left)


def test_a_save_that_was_killed_leaves_the_checkpoint_before(
    corpora, finished, saved, tmp_path
):
    newest = saved / str(EPOCHS)
    newest.rename(newest.with_name(f"{newest.name}.orbax-checkpoint-tmp"))
    argv = arguments(corpora, tmp_path, checkpoint_dir=saved)
    assert_same(example.main(argv), finished[1])
    left = [str(EPOCHS - 1), str(EPOCHS)]
    assert sorted(path.name for path in saved.iterdir()) == sorted(left)


def test_without_the_newest_checkpoint_the_one_before_serves(
    corpora, finished, saved, tmp_path
):
    shutil.rmtree(saved / str(EPOCHS))
    argv = arguments(corpora, tmp_path, checkpoint_dir=saved)
    assert_same(example.main(argv), finished[1])


@pytest.mark.usefixtures("no_training")
def test_a_finished_run_is_only_evaluated(corpora, finished, saved, tmp_path):
    before = contents(saved)
    argv = arguments(corpora, tmp_path, checkpoint_dir=saved)
    assert_same(example.main(argv), finished[1])
    assert contents(saved) == before


def assert_refused(corpora, saved, tmp_path, capsys, reason, **changed):
    """A line names folder and reason, and nothing in there has been touched."""
    before = contents(saved)
    argv = arguments(corpora, tmp_path, checkpoint_dir=saved, **changed)
    line = error_of(example.main, argv, capsys, code=1)
    assert str(saved) in line
    assert reason in line
    assert contents(saved) == before


@pytest.mark.usefixtures("no_training")
def test_a_damaged_checkpoint_is_refused(corpora, saved, tmp_path, capsys):
    (saved / str(EPOCHS) / "state" / "_METADATA").unlink()
    assert_refused(corpora, saved, tmp_path, capsys, f"/{EPOCHS}")


def test_a_disk_that_is_full_is_one_line(
    corpora, finished, tmp_path, capsys, monkeypatch
):
    folder = tmp_path / "saved"
    argv = arguments(corpora, tmp_path, checkpoint_dir=folder)
    save = example.save

    def full(manager, step, *rest):
        if step == 2:
            raise OSError(28, "No space left on device")
        save(manager, step, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(example, "save", full)
        with pytest.raises(SystemExit) as ended:
            example.main(argv)
    assert ended.value.code == 1
    printed = capsys.readouterr().err
    assert f"cannot save in {folder}: [Errno 28] No space left on device\n" in printed
    assert "Traceback" not in printed
    assert_same(example.main(argv), finished[1])
    assert f"resumed: {folder}, epoch 1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("hidden", 8),
        ("rate", 50),
        ("nonmono", 2),
        ("seeds", 1),
        ("epochs", EPOCHS + 1),
    ],
)
@pytest.mark.usefixtures("no_training")
def test_a_checkpoint_of_other_options_is_refused(
    name, value, corpora, saved, tmp_path, capsys
):
    reason = f"made with another {name}"
    assert_refused(corpora, saved, tmp_path, capsys, reason, **{name: value})


@pytest.mark.parametrize(
    ("part", "line", "reason"),
    [
        ("train", " a quokka rose \n", "vocabulary"),
        ("train", " the year rose \n", "text"),
        ("test", " the quokka rose \n", "text"),
    ],
)
@pytest.mark.usefixtures("no_training")
def test_a_checkpoint_of_another_text_is_refused(
    part, line, reason, corpora, saved, tmp_path, capsys
):
    other = shutil.copytree(corpora, tmp_path / "other")
    with (other / f"ptb.{part}.txt").open("a") as file:
        file.write(line)
    assert_refused(other, saved, tmp_path, capsys, f"another {reason}")


@pytest.mark.usefixtures("no_training")
def test_a_checkpoint_of_another_recipe_is_refused(
    corpora, saved, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(lesson, "DROPOUT", 0.5)
    assert_refused(corpora, saved, tmp_path, capsys, "another model")


@pytest.mark.usefixtures("no_training")
def test_a_file_is_no_checkpoint_folder(corpora, tmp_path, capsys):
    (tmp_path / "file").write_text("kept")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        argv = arguments(corpora, tmp_path, checkpoint_dir=path)
        assert str(path) in error_of(example.main, argv, capsys, code=1)
    assert (tmp_path / "file").read_text() == "kept"


def test_a_folder_of_three_files_is_read_as_it_is(corpora):
    corpus = example.load(corpora)
    text = (corpora / "ptb.train.txt").read_text().replace("\n", " <eos> ")
    assert [corpus.words[i] for i in corpus.training] == text.split()
    assert len(set(corpus.words)) == len(corpus.words)
    # A word that training has not is an unknown one.
    last = [corpus.words[i] for i in corpus.test[-4:]]
    assert last == ["the", "<unk>", "rose", "<eos>"]


def test_wikitexts_names_and_blank_lines_are_read(corpora, tmp_path):
    for part in SIZES:
        text = (corpora / f"ptb.{part}.txt").read_text()
        (tmp_path / f"wiki.{part}.tokens").write_text(f" \n = title = \n \n{text}")
    corpus = example.load(tmp_path)
    begin = [corpus.words[i] for i in corpus.training[:6]]
    assert begin == ["<eos>", "=", "title", "=", "<eos>", "<eos>"]
    assert len(corpus.training) == len(example.load(corpora).training) + 6


def test_a_file_of_text_is_set_in_words(tmp_path):
    file = tmp_path / "book.txt"
    line = "Don't panic (yet); see *page 42*."
    pages = [f"Page {n} of it.\n{line}" for n in range(900)]
    file.write_text("\n\n".join(pages), encoding="utf-8-sig")
    corpus = example.load(file)
    begin = " ".join(corpus.words[i] for i in corpus.training[:18])
    assert begin == "Page <unk> of it . <eos> Don ' t panic ( yet ) ; see * page 42"


def test_pythons_help_is_split_without_a_leak():
    corpus = example.load(None)
    sizes = np.array([len(part) for part in corpus[1:]])
    np.testing.assert_allclose(sizes / sizes.sum(), [0.8, 0.1, 0.1], atol=0.03)
    for part in corpus[1:]:
        assert np.mean(part == corpus.words.index("<unk>")) < 0.15
    counts = np.bincount(corpus.training, minlength=len(corpus.words))
    assert (counts[1:] >= example.MIN_COUNT).all()


def test_a_text_is_split_by_blocks_of_paragraphs():
    paragraphs = [f"Paragraph {n}\nof words." for n in range(300)]
    paragraphs[5] = "Title\n====="
    paragraphs[6] = "+---+---+\n| a | b |\n+---+---+"
    paragraphs[7] = "===  ===\na    b\n===  ==="
    repeated = "\n\n".join([*paragraphs, *paragraphs[::-1]])
    parts = example.split(repeated)
    numbers = [list(map(int, re.findall(r"\d+", part))) for part in parts]
    assert sorted(itertools.chain(*numbers)) == [
        n for n in range(300) if n not in (5, 6, 7)
    ]
    assert list(map(len, numbers)) == [239, 30, 28]
    assert "Title" in parts[0]
    assert not re.search(r"[=+|-]", "".join(parts))
    # In blocks, so that a paragraph is seldom torn from the one before.
    for part in numbers:
        assert np.mean(np.diff(part) == 1) > 0.85


@pytest.mark.parametrize("length", [701, 1400, 1401, 2345])
def test_every_word_is_predicted_once(length):
    tokens = np.arange(length)
    windows = example.cut(tokens)
    assert windows.inputs.shape == windows.targets.shape == windows.weights.shape
    assert windows.inputs.shape[1:] == (example.BATCH_SIZE, example.BPTT)
    kept = windows.weights == 1
    np.testing.assert_array_equal(np.sort(windows.targets[kept]), tokens[1:])
    np.testing.assert_array_equal(windows.targets[kept], windows.inputs[kept] + 1)
    # A line goes on in the next window.
    lines = np.concatenate(list(windows.targets), axis=1)
    for line, weights in zip(lines, np.hstack(list(windows.weights)), strict=True):
        assert (np.diff(line[weights == 1]) == 1).all()


@pytest.mark.usefixtures("no_training")
class TestBadData:
    """One line that names the option, and nothing is written."""

    def refused(self, data, tmp_path, capsys):
        line = error_of(example.main, arguments(data, tmp_path / "new"), capsys)
        assert line.count("--data") == 1
        assert not (tmp_path / "new").exists()
        return line

    def test_nothing_there(self, tmp_path, capsys):
        line = self.refused(tmp_path / "missing", tmp_path, capsys)
        assert str(tmp_path / "missing") in line

    @pytest.mark.parametrize("part", SIZES)
    def test_a_file_is_missing(self, part, corpora, tmp_path, capsys):
        data = shutil.copytree(corpora, tmp_path / "data")
        (data / f"ptb.{part}.txt").unlink()
        line = self.refused(data, tmp_path, capsys)
        assert str(data) in line
        assert repr(part) in line

    def test_a_file_too_many(self, corpora, tmp_path, capsys):
        data = shutil.copytree(corpora, tmp_path / "data")
        shutil.copy(data / "ptb.train.txt", data / "ptb.char.train.txt")
        line = self.refused(data, tmp_path, capsys)
        assert "ptb.char.train.txt, ptb.train.txt" in line

    @pytest.mark.parametrize("content", [b"", b" \n\n", b"a\0b", b"\xff\xfe", b"a b\n"])
    def test_a_file_of_something_else(self, content, corpora, tmp_path, capsys):
        reasons = {b"": "empty", b" \n\n": "empty", b"a b\n": "too little text"}
        reason = reasons.get(content, "is not text")
        data = shutil.copytree(corpora, tmp_path / "data")
        (data / "ptb.valid.txt").write_bytes(content)
        for path in (data, data / "ptb.valid.txt"):
            line = self.refused(path, tmp_path, capsys)
            assert reason in line
            assert reason == "too little text" or str(data / "ptb.valid.txt") in line


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--nonmono", "0"),
        ("--nonmono", "1.5"),
        ("--rate", "0"),
        ("--rate", "inf"),
        ("--rate", "nan"),
        ("--epochs", "0"),
        ("--hidden", "0"),
        ("--seeds", "none"),
        ("--speed", "1"),
    ],
)
@pytest.mark.usefixtures("no_training")
def test_a_bad_option_is_named(option, value, corpora, saved, tmp_path, capsys):
    before = contents(saved)
    argv = arguments(corpora, tmp_path / "new", checkpoint_dir=saved)
    assert option in error_of(example.main, [*argv, option, value], capsys)
    assert contents(saved) == before
    assert not (tmp_path / "new").exists()


@pytest.mark.usefixtures("no_training")
def test_a_bad_output_is_named(tmp_path, capsys):
    assert_refuses_outputs(example.main, tmp_path, capsys, ["--seeds", "1"])


def test_a_training_that_diverges_is_shown_as_such(tmp_path):
    curves = dict.fromkeys(example.LABELS, np.full((3, 2), np.nan))
    test = dict.fromkeys(example.LABELS, np.array([np.inf, np.nan]))
    results = example.Results(curves, test, np.full(2, np.inf), "")
    assert "nan" in example.table(results)
    assert "in 0 of 2 seeds" in example.table(results)
    example.draw(results, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(PNG_SIGNATURE)


def test_help_explains_every_option(capsys):
    options = [*OPTIONS, "--data", "--checkpoint-dir", "--output"]
    assert_explained(example.main, options, capsys)
