# SPDX-License-Identifier: Apache-2.0
"""`benchmarks/ten_million.py`: what is estimated, by chunks, and what is told of it."""

import jax
import numpy as np
import pytest

from benchmarks import online_regression, ten_million
from benchmarks.ten_million import CHUNK, RESPONSES, D, Fit, Result, Rows
from tests.programs import error_of, hide

N = 40_000
EXACT = {
    "least squares": ten_million.normal_equations,
    "logistic": ten_million.newton,
}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return ten_million.write(tmp_path_factory.mktemp("data"), N)


def rows_of(path, regression, observations=N, length=CHUNK):
    return Rows(path, RESPONSES[regression], observations, length)


def errors(regression, fit, n=N, center=None):
    """Distances from the truth, or another center, in efficient standard errors."""
    center = ten_million.truth() if center is None else center
    return (fit.estimate - center) / np.sqrt(ten_million.bounds(regression) / n)


@pytest.mark.parametrize("method", ["one rate", "two rates"])
@pytest.mark.parametrize("regression", RESPONSES)
def test_sgd_finds_the_coefficients(path, regression, method):
    fit = ten_million.ours(regression, method)(rows_of(path, regression))
    # Of 20 numbers near N(0, 1) the root mean square is 1 ± 0.16; zero is 50 away.
    assert ten_million.root_mean_square(errors(regression, fit)) < 2
    assert np.all(fit.lower < fit.estimate)
    assert np.all(fit.estimate < fit.upper)
    held = (fit.lower <= ten_million.truth()) & (ten_million.truth() <= fit.upper)
    assert np.sum(held) >= 15


@pytest.mark.parametrize("regression", EXACT)
def test_sgd_is_near_the_exact_estimate_of_the_same_rows(path, regression):
    rows = rows_of(path, regression)
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
        # Two estimates of different rows were sqrt(2) apart.
        assert ten_million.root_mean_square(away) < 1


def test_the_exact_estimates_solve_their_equations(path):
    rows = rows_of(path, "least squares", 5_000, 700)
    x, y = rows.whole()
    expected = np.linalg.lstsq(x, y)[0]
    fit = ten_million.normal_equations()(rows)
    np.testing.assert_allclose(fit.estimate, expected, rtol=1e-9, atol=1e-12)
    rows = rows_of(path, "logistic", 5_000, 700)
    x, y = rows.whole()
    fit = ten_million.newton()(rows)
    gradient = x.T @ (y - 1 / (1 + np.exp(-(x @ fit.estimate))))
    assert np.max(np.abs(gradient)) < 1e-3


@pytest.mark.parametrize("length", [700, 2_000, 10_000])
def test_chunks_of_any_length_have_every_row_once(path, length):
    whole = np.load(path)[:4_500]
    rows = rows_of(path, "logistic", 4_500, length)
    chunks = list(rows.chunks())
    assert [len(y) for _, y in chunks[:-1]] == [length] * (len(chunks) - 1)
    x, y = map(np.concatenate, zip(*chunks, strict=True))
    np.testing.assert_array_equal(x, whole[:, :D])
    np.testing.assert_array_equal(y, whole[:, D + 1])
    x, y = rows.whole()
    np.testing.assert_array_equal(x, whole[:, :D])
    np.testing.assert_array_equal(y, whole[:, D + 1])


@pytest.mark.parametrize("method", ["one rate", "two rates"])
def test_the_answer_does_not_depend_on_the_chunks(path, method):
    fit = ten_million.ours("logistic", method)
    whole = fit(rows_of(path, "logistic", 5_000))
    for length in (1_234, 5_000):
        pieces = fit(rows_of(path, "logistic", 5_000, length))
        for one, other in zip(whole, pieces, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_the_chunks_are_learned_from_in_their_order(path):
    learner = online_regression.one_rate(online_regression.LOSSES["median"], D, 10)
    first, second = rows_of(path, "median", 200, 100).chunks()
    forth = online_regression.learn(learner, [first, second])[0]
    back = online_regression.learn(learner, [second, first])[0]
    assert np.max(np.abs(forth - back)) > 1e-3
    for loss in online_regression.LOSSES.values():
        # Slopes fall to the left of the response and rise to its right.
        assert loss.slope(jax.numpy.float32(-9), 0.5) < 0
        assert loss.slope(jax.numpy.float32(9), 0.5) > 0


def test_the_file_is_written_once_and_only_whole(tmp_path, monkeypatch):
    path = ten_million.write(tmp_path / "new", 1_000)
    assert list(path.parent.iterdir()) == [path]
    written, before = path.read_bytes(), path.stat().st_mtime_ns
    assert ten_million.write(tmp_path / "new", 1_000) == path
    assert path.stat().st_mtime_ns == before
    assert ten_million.write(tmp_path / "new", 1_001) != path

    def interrupted(*args, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ten_million, "truth", interrupted)
        with pytest.raises(KeyboardInterrupt):
            ten_million.write(tmp_path / "other", 1_000)
    assert not list((tmp_path / "other").glob("*.npy"))
    again = ten_million.write(tmp_path / "other", 1_000)
    assert again.read_bytes() == written


def test_a_process_counts_one_chunk_of_the_file(tmp_path):
    path = ten_million.write(tmp_path, 400_000)
    rows = rows_of(path, "least squares", 400_000, 10_000)
    result = ten_million.measure(ten_million.normal_equations, rows)
    assert 0 < result.peak - result.imported < path.stat().st_size / 2
    whole = rows._replace(length=400_000)
    other = ten_million.measure(ten_million.normal_equations, whole)
    assert other.peak - other.imported > path.stat().st_size
    np.testing.assert_allclose(result.fit.estimate, other.fit.estimate, rtol=1e-9)
    assert result.seconds > 0 < result.cpu


def test_the_table_tells_what_was_measured():
    n, exact = 10_000, ten_million.truth() + 0.01
    error = 0.01  # an efficient standard error of least squares
    results = {
        (ten_million.ONE, n): Result(
            Fit(exact + error / 2, exact - 0.005, exact + 2 * error),
            seconds=12.34,
            cpu=5.67,
            imported=int(180e6),
            peak=int(1_234e6),
        ),
        ("scikit-learn", n): Result(Fit(exact), 1.0, 1.0, 1, 2),
        (ten_million.STATSMODELS, n): Result(
            Fit(exact, exact - 1.96 * error, exact + 1.96 * error), 1.0, 1.0, 1, 2
        ),
    }
    lines = ten_million.format_rows("least squares", results).splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:]]
    measured = ["10,000", "12.3", "5.7", "1,234", "180"]
    assert cells[0] == [ten_million.ONE, *measured, "0.500", "1.50", "0.64", "0"]
    assert cells[1][6:] == ["0.000", "1.00", "", ""]
    assert cells[2][6:] == ["", "1.00", "1.00", "20"]
    page = ten_million.format_page(dict.fromkeys(RESPONSES, results), n, int(880e3))
    assert lines[2] in page
    assert page.count(" 12.3 ") == 3
    assert "QuantReg has the first 1,000 only" in page


@pytest.mark.parametrize(
    ("option", "value"), [("--observations", "9999"), ("--speed", "1")]
)
def test_a_bad_option_is_refused_in_one_line(option, value, capsys):
    assert option in error_of(ten_million.main, [option, value], capsys)


def test_without_its_peer_it_says_so_before_it_writes(tmp_path, monkeypatch):
    hide("statsmodels", monkeypatch)
    with pytest.raises(SystemExit) as ended:
        ten_million.main(["--quick", f"--data={tmp_path / 'data'}"])
    assert str(ended.value.code).startswith("this needs statsmodels")
    assert not (tmp_path / "data").exists()
