# SPDX-License-Identifier: Apache-2.0
"""The average wins in the first programs of the README and of the framework pages."""

import pytest

from examples import first_ema
from studies import decay_sweep, page_seeds

pytestmark = pytest.mark.flax


def test_first_ema_beats_the_last_iterate(tmp_path, capsys):
    results = first_ema.main(tmp_path / "figure.png")
    last, ema = results.losses["last iterate"], results.losses["EMA"]
    assert results.steps[-1] == 3000
    assert len(results.steps) == len(last) == len(ema)
    assert 2 * ema[-1] < last[-1]
    assert f"EMA:          {ema[-1]:.5f}" in capsys.readouterr().out
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


@pytest.mark.parametrize("name", page_seeds.PAGES)
def test_page_program_shows_that_the_ema_wins(name):
    page = page_seeds.PAGES[name]
    assert "key(1)" in page_seeds.program(page, seed=1)
    last, ema = page_seeds.losses(page, seed=0)
    assert ema < last


def test_decay_sweep_counts_wins_and_writes_its_report(tmp_path, capsys):
    results = decay_sweep.main(["--quick", f"--output={tmp_path}"])
    losses = results["constant"]
    page = (tmp_path / "decay_sweep.md").read_text()
    assert f"{losses['EMA 0.99'].mean():.5f}" in page
    assert page in capsys.readouterr().out
    assert (tmp_path / "decay_sweep.png").stat().st_size > 10_000
    lower = losses["EMA 0.9"] < losses["last iterate"]
    assert decay_sweep.wins(losses, "EMA 0.9") == lower.sum()


def test_decay_sweep_averages_beat_the_last_iterate_at_a_constant_learning_rate():
    constant = {"constant": decay_sweep.schedules(1000)["constant"]}
    losses = decay_sweep.train(constant, steps=1000, seeds=4)["constant"]
    for name, values in losses.items():
        if name != "last iterate":
            assert values.mean() < 0.7 * losses["last iterate"].mean(), name
