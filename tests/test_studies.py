# SPDX-License-Identifier: Apache-2.0
"""The arithmetic of the studies, and a short run of those that need no torch.

`.ci/run -s programs` also runs every study of `make studies` with tiny sizes.
"""

import itertools
import random
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from examples import after_the_run as lesson
from studies import (
    after_the_run,
    batch_norm,
    coming_from,
    coverage,
    digits,
    horizon_free,
    horizon_free_text,
    language_model,
    online_inference,
    online_regression,
    posthoc,
    repeated_looks,
    ten_million,
    weightings,
)
from studies.ten_million import RESPONSES, D, Fit, Result, Rows
from tests.programs import PNG_SIGNATURE, error_of

pytestmark = pytest.mark.flax


def leaves(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def test_after_the_run_schedules_branch_off_the_constant_one_and_end_at_zero():
    constant = after_the_run.constant_rate()
    assert constant(lesson.WARMUP) == constant(10_000) == np.float32(lesson.RATE)
    (start, cosine), (branch, linear) = after_the_run.branches(100).values()
    assert (start, branch) == (0, 80)
    assert [linear(n) for n in range(81)] == [constant(n) for n in range(81)]
    np.testing.assert_allclose(linear(90), lesson.RATE / 2, rtol=1e-6)
    assert cosine(100) == pytest.approx(0, abs=1e-9)
    assert linear(100) == 0 < linear(99)


def test_after_the_run_resumes_merges_chooses_and_reports(monkeypatch, tmp_path):
    tiny = {"LAYERS": 1, "WIDTH": 8, "HEADS": 2, "CONTEXT": 8, "BATCH_SIZE": 2}
    tiny |= {"EVERY": 3, "WARMUP": 2, "TRIED": (0.06, 0.12), "DTYPE": "float32"}
    for name, value in tiny.items():
        monkeypatch.setattr(lesson, name, value)
    monkeypatch.setattr(after_the_run, "TINY", {})
    monkeypatch.setattr(after_the_run, "QUICK", after_the_run.Sizes((15,), 15))
    texts = tmp_path / "texts"
    texts.mkdir()
    for n in range(10):
        (texts / f"{n}.py").write_text(f"{n}, " * 20 + "abc" * n)
    argv = ["--quick", "--seeds=1", f"--text={texts}", f"--runs={tmp_path / 'runs'}"]
    after_the_run.main([*argv, f"--output={tmp_path}"])
    page = (tmp_path / "after_the_run.md").read_text()
    table = [line.split("|")[1:-1] for line in page.splitlines() if "|" in line]
    assert [cells[0].strip() for cells in table[2:]] == list(after_the_run.ROWS)
    losses = [float(row[1].split()[0]) for row in table[2:]]
    assert all(4 < loss < 7 for loss in losses)  # log(256) is 5.5
    assert (tmp_path / "after_the_run.png").read_bytes().startswith(PNG_SIGNATURE)

    training, validation, test = lesson.load(texts)
    folder = tmp_path / "runs" / "quick" / "seed_0" / "constant"
    score = after_the_run.scorer(validation, test)
    run = after_the_run.Run(folder, 15, score)
    # A branch resumes bit-for-bit.
    rate = after_the_run.constant_rate()
    resumed = after_the_run.train(training, 0, rate, range(13, 16), folder)
    iterates = [leaves(run.kept[after_the_run.ITERATE, n]) for n in (12, 15)]
    np.testing.assert_array_equal(leaves(resumed), iterates[-1])
    # c_0 = 1 - s(1/2) and c_1 = s(1/2), with s = 1 - x or 1 - sqrt(x).
    for schedule, share in ("linear", 1 / 2), ("minus_sqrt", 1 - np.sqrt(1 / 2)):
        merged = leaves(run.merged(schedule, 15))
        expected = (1 - share) * iterates[0] + share * iterates[1]
        np.testing.assert_allclose(merged, expected, rtol=1e-5, atol=1e-7)
    starts = {n: score(run.mean(n, 15), validate=True) for n in range(0, 15, 3)}
    assert run.best_start(15) == min(starts, key=starts.get)


DESIGN = horizon_free.Design(1.5, 2.5)


def test_horizon_free_expected_risk_is_the_mean_of_simulated_ones():
    seeds = 1000
    sizes = horizon_free.Sizes(d=20, first=4, last=6, seeds=seeds)
    rows, _ = horizon_free.tune(DESIGN, sizes)
    # Small peaks: near divergence a few seeds dominate the mean.
    rows = [row._replace(peak=0.1, alpha=5.0) for row in rows]
    peaks = np.full((2, 3), 0.1)
    measured = horizon_free.simulate(DESIGN, sizes, rows, peaks)
    with horizon_free.enable_x64(True):
        groups = horizon_free.group(DESIGN, 20)
        scheduled = [
            [
                float(horizon_free.expected_scheduled(groups, peaks[0], n, cosine)[0])
                for n in sizes.horizons.tolist()
            ]
            for cosine in (True, False)
        ]
    expected = horizon_free.row_risks(DESIGN, 20, sizes, rows), scheduled
    for simulated, exact in zip(measured, expected, strict=True):
        error = simulated.std(axis=-1) / np.sqrt(seeds)
        assert np.all(np.abs(simulated.mean(axis=-1) - exact) < 5 * error)
        assert np.all(error < 0.05 * np.array(exact))


def test_horizon_free_groups_of_coordinates_are_nearly_exact():
    sizes = horizon_free.Sizes(d=500, first=8, last=11, seeds=2)
    row = horizon_free.Row("t^-0.4", "polynomial", 0.4, 0.2, 1.0)
    (risks,) = horizon_free.row_risks(DESIGN, 500, sizes, [row])
    single = horizon_free.group(DESIGN, 500, ratio=1.0)
    assert len(single.size) == 500 > 3 * len(horizon_free.group(DESIGN, 500).size)
    rates = tuple(np.array([x]) for x in (0.2, 1.0, 0.4))
    with horizon_free.enable_x64(True):
        exact = np.asarray(horizon_free.expected_risks(single, rates, last=11))
    polynomial = horizon_free.READINGS.index("polynomial")
    np.testing.assert_allclose(risks, exact[8:, polynomial, 0], rtol=1e-3)


def test_horizon_free_exponents_meet_at_the_optimum():
    for a, b in horizon_free.DESIGNS:
        design = horizon_free.Design(a, b)
        averaged = design.exponent(design.gamma, "uniform")
        assert averaged == pytest.approx(design.optimum)
        for gamma in (0.1, 0.3, 0.6):
            assert design.exponent(gamma, "uniform") >= averaged - 1e-9
            assert design.exponent(gamma, "last iterate") > averaged
    assert DESIGN.exponent(0.0, "last iterate") == 0
    horizons = 2 ** np.arange(12)
    risks = 3 * horizons[:, None] ** np.array([-0.5, -0.25])
    np.testing.assert_allclose(horizon_free.slopes(horizons, risks), [-0.5, -0.25])


def test_horizon_free_reports_and_uses_its_cache(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(horizon_free, "DESIGNS", [(1.5, 2.5), (2.0, 1.5)])
    argv = ["--quick", f"--output={tmp_path}", f"--cache={tmp_path / 'cache'}"]
    first = horizon_free.main(argv)
    page = (tmp_path / "horizon_free.md").read_text()
    assert page in capsys.readouterr().out
    assert f"{horizon_free.gaps(first[DESIGN])[0, -1]:.2f}" in page
    assert (tmp_path / "horizon_free.png").read_bytes().startswith(PNG_SIGNATURE)
    monkeypatch.setattr(horizon_free, "simulate", None)
    second = horizon_free.main(argv)
    for one, other in zip(first[DESIGN], second[DESIGN], strict=True):
        np.testing.assert_array_equal(one, other)


def test_horizon_free_text_learning_rates():
    constant, root, cosine = (
        horizon_free_text.Rate(kind, 0.01, alpha=100, horizon=250)
        for kind in (
            horizon_free_text.CONSTANT,
            horizon_free_text.ROOT,
            horizon_free_text.COSINE,
        )
    )
    top = lesson.WARMUP
    for rate in constant, root, cosine:
        assert rate(0) == 0
        assert rate(top // 2) == pytest.approx(0.005)
        assert rate(top) == pytest.approx(0.01)
    assert constant(10_000) == pytest.approx(0.01)
    assert root(top + 300) == pytest.approx(0.005)
    assert cosine(top + (250 - top) // 2) == pytest.approx(0.005)
    assert cosine(250) == pytest.approx(0, abs=1e-9)
    cooldown = constant.cooldown(250)
    assert [cooldown(n) for n in range(201)] == [constant(n) for n in range(201)]
    assert cooldown(225) == pytest.approx(0.005)
    assert cooldown(250) == 0


def test_horizon_free_text_climbs_to_the_minimum():
    tried = []

    def measure(peak):
        tried.append(peak)
        return abs(peak - 5) if peak < 10 else np.nan

    assert [horizon_free_text.climb(measure, start) for start in (1, 4, 8)] == [4] * 3
    assert {2, 8} < set(tried)


@pytest.mark.parametrize(
    ("vertex", "chosen"), [(0.1, 4), (0.3, 5.66), (-0.4, 2.83), (np.nan, 4)]
)
def test_horizon_free_text_refines_the_minimum(vertex, chosen):
    def measure(peak):
        return 3 * (np.log2(peak / 4) - vertex) ** 2 + 1

    assert horizon_free_text.refine(measure, 4) == chosen


def test_horizon_free_text_means_of_the_last_steps():
    iterates = np.random.default_rng(0).normal(size=(75, 3))
    uniform = {n: iterates[:n].mean(0) for n in (25, 50, 75)}
    for start, end in (25, 75), (0, 50):
        np.testing.assert_allclose(
            horizon_free_text.mean(uniform, start, end), iterates[start:end].mean(0)
        )


def test_horizon_free_text_trains_reports_and_resumes(monkeypatch, tmp_path):
    tiny = {"LAYERS": 1, "WIDTH": 8, "HEADS": 2, "CONTEXT": 8, "BATCH_SIZE": 2}
    for name, value in (tiny | {"EVERY": 3, "WARMUP": 2}).items():
        monkeypatch.setattr(lesson, name, value)
    monkeypatch.setattr(after_the_run, "TINY", {})
    sizes = horizon_free_text.Sizes((15, 30), 15)
    monkeypatch.setattr(horizon_free_text, "QUICK", sizes)
    texts = tmp_path / "texts"
    texts.mkdir()
    for n in range(10):
        (texts / f"{n}.py").write_text(f"{n}, " * 20 + "abc" * n)
    argv = ["--quick", "--seeds=2", f"--text={texts}", f"--runs={tmp_path / 'runs'}"]
    horizon_free_text.main([*argv, f"--output={tmp_path}"])
    page = (tmp_path / "horizon_free_text.md").read_text()
    rows = [line.split("|")[1:-1] for line in page.splitlines() if "±" in line]
    rows = [[cell.strip() for cell in row] for row in rows if len(row) == 6]
    assert [tuple(row[:2]) for row in rows] == horizon_free_text.ROWS
    assert all(2 < float(row[-1].split()[0]) < 9 for row in rows)  # log(256) is 5.5
    picture = (tmp_path / "horizon_free_text.png").read_bytes()
    assert picture.startswith(PNG_SIGNATURE)

    # The readings of a run are those of the same run in a Python loop.
    training, validation, test = lesson.load(texts)
    rate = horizon_free_text.Rate(horizon_free_text.CONSTANT, 0.003)
    trainer = horizon_free_text.Trainer(
        (training, validation, test), 7, sizes, tmp_path / "others"
    )
    found = trainer.losses(rate, (15,), horizon_free_text.READINGS, (30,))
    model, optimizer = horizon_free_text.create(rate, 7)
    iterates = []
    for n in range(1, 25):
        lesson.train_step(model, optimizer, lesson.draw_batch(training, (7, n)))
        iterates.append(jax.device_get(nnx.state(model)))
    score = after_the_run.scorer(validation, test)
    assert found["last iterate"]["15"] == pytest.approx(score(iterates[14]), rel=1e-5)
    length = found["window"]["15"]
    mean = jax.tree.map(lambda *x: np.mean(x, 0), *iterates[15 - length : 15])
    assert found[horizon_free_text.BEST]["15"] == pytest.approx(score(mean), rel=1e-5)
    weights = np.cumprod([1, *((n + 3) / n for n in range(1, 15))])  # gamma 3
    weights /= weights.sum()
    average = jax.tree.map(lambda *x: np.tensordot(weights, x, 1), *iterates[:15])
    loss = found[horizon_free_text.POLYNOMIAL]["15"]
    assert loss == pytest.approx(score(average), rel=1e-5)
    state = nnx.state((model, optimizer))
    final = trainer.train(rate.cooldown(30), 30, 24, state)
    loss = found[horizon_free_text.STABLE]["30"]
    assert loss == pytest.approx(score(final[0]), rel=1e-5)

    # Finished runs are not repeated.
    monkeypatch.setattr(horizon_free_text.Trainer, "train", None)
    (tmp_path / "horizon_free_text.md").unlink()
    horizon_free_text.main([*argv, f"--output={tmp_path}"])
    assert (tmp_path / "horizon_free_text.md").read_text() == page


@pytest.mark.parametrize(
    ("study", "argv", "printed"),
    [
        (batch_norm, ["--rate=0.3"], "stale"),
        (digits, ["--rate", "0.3", "--schedule=linear", "--noise=0"], "of 2"),
        (weightings, ["--rate=0.02"], "polynomial"),
    ],
)
def test_study_varies_an_example(study, argv, printed, capsys):
    study.main([*argv, "--steps=40", "--seeds=2"])
    out = capsys.readouterr().out
    assert printed in out
    assert "steps 40, seeds 2" in out


# Averages of others in 16 bits; None if they fail.
SIXTEEN_BITS = {
    "`nnx.EMA`": 1.0,
    "`optax.ema` of parameters": 1.0234375,
    "`optax.incremental_update`": 1.0,
    "`hk.EMAParamsTree`": np.nan,
    "`hk.EMAParamsTree`, `warmup_length`": None,
    "Keras `use_ema`": 1.0,
}


def test_coming_from_compares_with_every_installed_library(capsys):
    rows = coming_from.main([], long_steps=2000)
    lines = capsys.readouterr().out.splitlines()[2:]
    assert [line.split(" |")[0][2:] for line in lines] == list(coming_from.PEERS)
    assert {"`optax.ema` of parameters", "`optax.incremental_update`"} <= set(rows)
    for name, row in rows.items():
        assert row.difference < 5e-14
        theirs, ours, true = row.jump
        assert abs(ours - true) < 1e-5
        if SIXTEEN_BITS[name] is None:
            assert theirs is None
        else:
            np.testing.assert_equal(theirs, SIXTEEN_BITS[name])
        assert row.errors[1] < 3e-6
    # In float32 the rounded decay and 1 minus the decay do not add up to 1.
    assert rows["`optax.incremental_update`"].errors[0] > 2e-5


@pytest.mark.parametrize(
    ("method", "design"),
    [
        (coverage.one_run, coverage.linear(5)),
        (coverage.two_runs, coverage.logistic(5)),
        (coverage.one_run, coverage.quantile(0.5, 5)),
    ],
)
def test_coverage_of_the_rule_is_near_the_level(method, design):
    study = method(design, 20_000, 200)
    study = study._replace(starts=[study.start])
    ((row,),), _ = coverage.measure(study, seed=0)
    # Intervals that are a third shorter would have coverage 0.85.
    assert 8 * row.error < 0.95 - 0.85
    assert -0.03 - 4 * row.error < row.coverage - 0.95 < 4 * row.error
    assert 1.0 < row.length < 1.6
    assert 0.8 < row.rmse < 1.3


def test_coverage_extrapolation_removes_the_bias():
    multiples, weights = map(np.array, coverage.EXTRAPOLATED)
    assert weights.sum() == 1
    assert weights @ multiples == 0
    rate = coverage.Rate(4.0, 0.505, 0.4)
    study = coverage.two_runs(coverage.logistic(5), 20_000, 200)
    biases = []
    for method in (coverage.ONE_RUN, coverage.EXTRAPOLATED):
        tried = study._replace(method=method, tried=[rate])
        ((row,),), _ = coverage.measure(tried, seed=1)
        biases.append(row.bias)
    # Noise only gives 0.07.
    assert biases[0] > 0.7
    assert biases[1] < 0.3


@pytest.mark.parametrize("tau", [0.5, 0.9])
def test_coverage_quantile_design_has_this_quantile(tau):
    design = coverage.quantile(tau, 5)
    x, y = coverage.draw(design, 1000, jax.random.key(0))
    np.testing.assert_array_equal(x[:, 0], 1)
    prediction = jnp.einsum("d, tdr -> tr", design.coefficients, x)
    assert abs(np.mean(y <= prediction) - tau) < 4 * np.sqrt(tau * (1 - tau) / y.size)
    slopes = jax.vmap(jax.grad(design.loss))(jnp.arange(3.0), jnp.ones(3))
    np.testing.assert_allclose(slopes, [-tau, 1 - tau, 1 - tau], rtol=1e-6)


def test_coverage_page_has_a_table_per_section_and_marks_the_rule(
    monkeypatch, tmp_path
):
    def sections(n, replications):
        one = coverage.one_run(coverage.linear(5), n, replications)
        two = coverage.two_runs(coverage.logistic(5), n, replications, 1)
        return [[one], [two], [one], []]

    monkeypatch.setattr(coverage, "sections", sections)
    coverage.main(["--quick", f"--output={tmp_path}"])
    page = (tmp_path / "coverage.md").read_text()
    row = re.compile(r"^\| (?:linear|logistic),.*(?= \|.*\|$)", re.MULTILINE)
    parts = [row.findall(part) for part in page.split("\n## ")[1:]]
    assert [len(rows) for rows in parts] == [3, 2, 3, 0]
    first, second, again = (rows[-1] for rows in parts[:3])
    assert "**min(0.2, 0.5 t^-0.505)**, the rule" in first
    assert "**min(0.4, 4 t^-0.505)**, the rule" in second
    # Studies of the same design and length see the same stream.
    assert again == first


def test_repeated_looks_are_spaced_as_described():
    looks = repeated_looks.log_spaced(2_000, 99_000)
    assert (looks[0], looks[-1], len(looks)) == (2_000, 99_000, 30)
    np.testing.assert_allclose(np.diff(np.log(looks)), np.log(49.5) / 29, atol=0.05)


def test_repeated_looks_reader_stops_at_the_first_short_interval():
    # Three looks, one coefficient, three replications; the tolerance is 2.
    half = np.array([[1.0, 3, 3], [2, 1, 4], [3, 3, 3]])[:, None]
    error = np.array([[1.0, 2, 3], [4, 5, 6], [7, 8, 9]])[:, None]
    path = repeated_looks.Path(np.array([1, 2, 3]), error, half)
    np.testing.assert_array_equal(repeated_looks.stopped(path), [[1, 5, 9]])


def test_repeated_looks_cover_with_the_level_only_with_looks(monkeypatch, tmp_path):
    def rules(n, replications):
        study = coverage.one_run(coverage.linear(5), 40_000, 100)
        return [study._replace(tried=[study.rate], starts=[study.start])]

    monkeypatch.setattr(repeated_looks, "rules", rules)
    repeated_looks.main(["--quick", f"--output={tmp_path}"])
    page = (tmp_path / "repeated_looks.md").read_text()
    parts = [
        re.findall(r"^\| linear.*", part, re.M) for part in page.split("\n## ")[1:]
    ]
    assert [len(rows) for rows in parts] == [3, 3, 1]
    # The first look at a tenth of the stream.
    cells = [cell.split(" ±") for cell in parts[0][1].split("|")[1:-1]]
    one, fixed, watched, joint = (float(cell[0]) for cell in cells[4:])
    errors = [float(cell[1]) for cell in cells[4:]]
    assert [cell[0].strip() for cell in cells[:3]] == ["linear, d = 5", "1", "4,000"]
    for share, error in zip(
        (one, watched, joint), (errors[0], *errors[2:]), strict=True
    ):
        assert abs(share - 95) < 4 * error + 1
    assert fixed < 80 < watched


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    """A folder of texts in the form of Penn Treebank's."""
    folder, rng = tmp_path_factory.mktemp("penn"), random.Random(0)
    nouns = ["man", "dog", "house", "market", "company", "<unk>", "share", "year"]
    verbs = ["sees", "buys", "is", "n't", "likes", "rose", "fell"]
    for part, lines in {"train": 300, "valid": 100, "test": 100}.items():
        text = ""
        for _ in range(lines):
            words = ["the", rng.choice(nouns), rng.choice(verbs), "a"]
            words += [rng.choice(nouns), *["of", "$", "N"] * rng.randint(0, 2)]
            text += f" {' '.join([*words, 'mr.', rng.choice(nouns)])} \n"
        (folder / f"ptb.{part}.txt").write_text(text)
    with (folder / "ptb.test.txt").open("a") as file:
        file.write(" the zyzzyva rose \n")
    (folder / "README").write_text("not a part of the text")
    return folder


def test_language_model_compares_runs_as_described(corpora, tmp_path, capsys):
    epochs = 12
    argv = [f"--data={corpora}", f"--output={tmp_path / 'figure.png'}", "--rate=60"]
    argv += [f"--epochs={epochs}", "--hidden=16", "--nonmono=1", "--seeds=1"]
    results = language_model.main(argv)
    curves = {name: curve[:, 0] for name, curve in results.curves.items()}
    last, average = curves["last"], curves["average"]
    np.testing.assert_array_equal(curves["best"], np.minimum.accumulate(last))
    # AWD-LSTM's rule, with the losses at the ends of the epochs.
    trigger = next(n for n in range(2, epochs) if last[n] > last[: n - 1].min()) + 1
    assert results.triggers == [trigger]
    np.testing.assert_array_equal(average[:trigger], last[:trigger])
    assert (average[trigger:] != last[trigger:]).all()
    # The second run leaves the first when its loss gets worse.
    same = np.argmax(last > curves["best"]) + 1
    np.testing.assert_array_equal(curves["divided"][:same], last[:same])
    assert (curves["divided"][same:] != last[same:]).all()
    assert (curves["ema"] != average).all()
    assert average[-1] < last[-1]
    assert results.test["average"] < 10  # of some 20 words
    assert (tmp_path / "figure.png").read_bytes().startswith(PNG_SIGNATURE)
    printed = capsys.readouterr().out
    for name, label in language_model.LABELS.items():
        assert f"{label} " in printed
        assert f"{results.test[name].mean():.2f} ±" in printed

    # The second run has the same recipe: at nearly the same rate it does the same.
    corpus = language_model.load(corpora)
    model = language_model.LanguageModel(len(corpus.words), 16)
    setup = language_model.Setup(model, 60.0, 1, epochs)
    state = language_model.create(setup, 0)
    state = state._replace(rate=np.nextafter(np.float32(60), np.float32(0)))
    windows = map(language_model.cut, (corpus.training, corpus.validation))
    trained = language_model.train_epoch(setup, state, 0, 0, *windows)
    first, second, start = map(leaves, (trained.params, trained.divided, state.params))
    moved = np.abs(first - start).max()
    assert moved > 0.01
    np.testing.assert_allclose(second, first, rtol=0, atol=1e-4 * moved)


def test_language_model_reads_three_files_as_they_are(corpora):
    corpus = language_model.load(corpora)
    text = (corpora / "ptb.train.txt").read_text().replace("\n", " <eos> ")
    assert [corpus.words[i] for i in corpus.training] == text.split()
    # A word that is not in the training text is unknown.
    last = [corpus.words[i] for i in corpus.test[-4:]]
    assert last == ["the", "<unk>", "rose", "<eos>"]


def test_language_model_splits_a_text_without_leaks():
    paragraphs = [f"Paragraph {n}\nof words." for n in range(300)]
    paragraphs[5] = "Title\n====="
    paragraphs[6] = "+---+---+\n| a | b |\n+---+---+"
    repeated = "\n\n".join([*paragraphs, *paragraphs[::-1]])
    parts = language_model.split(repeated)
    numbers = [list(map(int, re.findall(r"\d+", part))) for part in parts]
    assert sorted(itertools.chain(*numbers)) == [
        n for n in range(300) if n not in (5, 6)
    ]
    assert "Title" in parts[0]
    assert not re.search(r"[=+|-]", "".join(parts))
    # Blocks keep a paragraph with the one before.
    for part in numbers:
        assert np.mean(np.diff(part) == 1) > 0.85
    corpus = language_model.load(None)
    sizes = np.array([len(part) for part in corpus[1:]])
    np.testing.assert_allclose(sizes / sizes.sum(), [0.8, 0.1, 0.1], atol=0.03)


@pytest.mark.parametrize("length", [1400, 1401])
def test_language_model_predicts_every_word_once(length):
    tokens = np.arange(length)
    windows = language_model.cut(tokens)
    assert windows.inputs.shape[1:] == (
        language_model.BATCH_SIZE,
        language_model.BPTT,
    )
    kept = windows.weights == 1
    np.testing.assert_array_equal(np.sort(windows.targets[kept]), tokens[1:])
    np.testing.assert_array_equal(windows.targets[kept], windows.inputs[kept] + 1)
    # A line continues in the next window.
    lines = np.concatenate(list(windows.targets), axis=1)
    for line, weights in zip(lines, np.hstack(list(windows.weights)), strict=True):
        assert (np.diff(line[weights == 1]) == 1).all()


def test_online_inference_prints_the_coverage_of_each_estimate(capsys):
    (study,) = online_inference.main(
        ["--observations=2000", "--streams=20", "--rate=2"]
    )
    rows = capsys.readouterr().out.splitlines()[2:]
    for k, estimate in enumerate(("one run", "two runs")):
        share = 100 * study.covered[:, k].mean()
        assert rows[k].startswith(f"| 2   | {estimate:9} | {share:.1f} ± ")


def test_posthoc_reports_exact_and_approximate_averages(tmp_path):
    posthoc.main(["--quick", f"--output={tmp_path}"])
    page = (tmp_path / "posthoc.md").read_text()
    rows = dict(re.findall(r"^\| (\w.*?) +\| (.*)\|$", page, re.MULTILINE))
    assert rows["mean of all"].split("|")[0].strip() == "0 (1)"
    assert rows["width 0.07"].split("|")[3].strip() == "0.013 (1.27)"


N = 40_000
EXACT = {
    "least squares": ten_million.normal_equations,
    "logistic": ten_million.newton,
}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return ten_million.write(tmp_path_factory.mktemp("data"), N)


def errors(regression, fit, center=None):
    """Return distances from the truth or a center, in efficient standard errors."""
    center = ten_million.truth() if center is None else center
    return (fit.estimate - center) / np.sqrt(ten_million.bounds(regression) / N)


@pytest.mark.parametrize("regression", RESPONSES)
def test_ten_million_sgd_finds_the_coefficients(path, regression):
    rows = Rows(path, RESPONSES[regression], N)
    fit = ten_million.ours(regression, "two rates")(rows)
    # The root mean square of 20 numbers N(0, 1) is 1 ± 0.16; zero is 50 away.
    assert ten_million.root_mean_square(errors(regression, fit)) < 2
    covered = (fit.lower <= ten_million.truth()) & (ten_million.truth() <= fit.upper)
    assert np.sum(covered) >= 15


@pytest.mark.parametrize("regression", EXACT)
def test_ten_million_sgd_is_near_the_exact_estimate(path, regression):
    rows = Rows(path, RESPONSES[regression], N)
    exact = EXACT[regression]()(rows)
    assert ten_million.root_mean_square(errors(regression, exact)) < 1.6
    half = (exact.upper - exact.lower) / 2
    efficient = 1.96 * np.sqrt(ten_million.bounds(regression) / N)
    np.testing.assert_allclose(half, efficient, rtol=0.05)
    for contestant in (
        ten_million.ours(regression, "one rate"),
        ten_million.scikit_learn(regression),
    ):
        away = errors(regression, contestant(rows), center=exact.estimate)
        # Estimates from different rows would be sqrt(2) apart.
        assert ten_million.root_mean_square(away) < 1


def test_ten_million_exact_estimates_solve_their_equations(path):
    rows = Rows(path, RESPONSES["least squares"], 5_000, length=700)
    x, y = rows.whole()
    np.testing.assert_array_equal(x, np.load(path)[:5_000, :D])
    expected = np.linalg.lstsq(x, y)[0]
    fit = ten_million.normal_equations()(rows)
    np.testing.assert_allclose(fit.estimate, expected, rtol=1e-9, atol=1e-12)
    rows = rows._replace(response=RESPONSES["logistic"])
    x, y = rows.whole()
    fit = ten_million.newton()(rows)
    gradient = x.T @ (y - 1 / (1 + np.exp(-(x @ fit.estimate))))
    assert np.max(np.abs(gradient)) < 1e-3


def test_ten_million_answer_does_not_depend_on_the_chunks(path):
    fit = ten_million.ours("logistic", "two rates")
    rows = Rows(path, RESPONSES["logistic"], 5_000)
    for one, other in zip(fit(rows), fit(rows._replace(length=1_234)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
    first, second = rows._replace(observations=200, length=100).chunks()
    loss = online_regression.LOSSES["logistic"]
    learner = online_regression.one_rate(loss, D, 10)
    orders = [first, second], [second, first]
    forth, back = (online_regression.learn(learner, order)[0] for order in orders)
    assert np.max(np.abs(forth - back)) > 1e-3


def test_ten_million_measures_a_contestant_in_its_own_process(path):
    rows = Rows(path, RESPONSES["least squares"], N)
    result = ten_million.measure(ten_million.normal_equations, rows)
    assert 0 < result.imported < result.peak
    assert result.seconds > 0 < result.cpu


def test_ten_million_table_shows_what_was_measured():
    n, exact = 10_000, ten_million.truth() + 0.01
    error = 0.01  # an efficient standard error of least squares
    ours = Fit(exact + error / 2, exact - 0.005, exact + 2 * error)
    theirs = Fit(exact, exact - 1.96 * error, exact + 1.96 * error)
    results = {
        (ten_million.ONE, n): Result(ours, 12.34, 5.67, int(180e6), int(1_234e6)),
        ("scikit-learn", n): Result(Fit(exact), 1.0, 1.0, 1, 2),
        (ten_million.STATSMODELS, n): Result(theirs, 1.0, 1.0, 1, 2),
    }
    lines = ten_million.format_rows("least squares", results).splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:]]
    measured = ["10,000", "12.3", "5.7", "1,234", "180"]
    assert cells[0] == [ten_million.ONE, *measured, "0.500", "1.50", "0.64", "0"]
    assert cells[1][6:] == ["0.000", "1.00", "", ""]
    assert cells[2][6:] == ["", "1.00", "1.00", "20"]


@pytest.mark.parametrize(
    ("study", "argument"),
    [
        (after_the_run, "--seeds=0"),
        (batch_norm, "--rate=0"),
        (coming_from, "--speed=1"),
        (coverage, "--observations=1500"),
        (digits, "--noise=nan"),
        (horizon_free, "--speed=1"),
        (horizon_free_text, "--seeds=0"),
        (language_model, "--epochs=1.5"),
        (online_inference, "--observations=1001"),
        (posthoc, "--speed=1"),
        (ten_million, "--observations=9999"),
        (weightings, "--seeds=1"),
    ],
)
def test_study_reports_a_bad_option_in_one_line(study, argument, capsys):
    option, _, _ = argument.partition("=")
    assert option in error_of(study.main, [argument], capsys)
