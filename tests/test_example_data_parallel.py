# SPDX-License-Identifier: Apache-2.0
"""`examples/data_parallel.py`: two ways, one result, an eighth of the memory."""

import numpy as np

from examples import data_parallel
from tests.programs import command_line_of, error_of


def test_both_ways_end_in_the_same_weights(capsys):
    outcomes = data_parallel.main(steps=12)
    assert list(outcomes) == ["pmap", "jit"]
    pmap, jit = outcomes.values()
    np.testing.assert_allclose(jit[:2], pmap[:2], rtol=1e-4)
    assert pmap.average_loss != pmap.last_loss
    # Eight devices hold an eighth each, but for a last bias of ten numbers.
    for field in ("params_bytes", "state_bytes"):
        whole, eighth = (getattr(outcome, field) for outcome in outcomes.values())
        assert whole / 8 <= eighth < whole / 8 + 100
    assert pmap.params_bytes == 4 * (64 * 512 + 512 + 512 * 10 + 10)
    assert pmap.params_bytes < pmap.state_bytes < pmap.params_bytes + 100
    printed = capsys.readouterr().out
    for how, outcome in outcomes.items():
        (row,) = (line for line in printed.splitlines() if f"| {how} " in line)
        assert f"{outcome.average_loss:.6f}" in row
        assert f"{outcome.state_bytes / 1e3:.1f}" in row


def test_it_takes_no_options(monkeypatch, capsys):
    run = command_line_of("data_parallel", monkeypatch)
    assert "--speed" in error_of(run, ["--speed", "1"], capsys)
