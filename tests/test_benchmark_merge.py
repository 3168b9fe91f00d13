# SPDX-License-Identifier: Apache-2.0
"""`benchmarks/merge.py`: every way is measured, nothing is left."""

import pytest

from benchmarks import merge
from tests.programs import error_of


def test_every_way_is_measured(tmp_path, capsys):
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    options = ["--quick", "--checkpoints", "2", "--folder", str(folder)]
    runs = merge.main([*options, "--output", str(tmp_path)])
    assert [len(of_way) for of_way in runs.values()] == [2] * 4
    assert all(run.seconds > 0 for of_way in runs.values() for run in of_way)
    printed = capsys.readouterr().out
    assert (tmp_path / "merge.md").read_text() in printed
    for way in merge.WAYS:
        assert f"| {way} " in printed
    assert "2 checkpoints of 4 MiB" in printed
    assert "read from the disk" in printed
    assert not list(folder.iterdir())


def test_what_is_compared():
    """The faster of Orbax's two ways in each round, and the size of the checkpoints."""
    gib = 2**30
    runs = {
        way: [merge.Run(4.0, 3 * gib), merge.Run(8.0, 3 * gib)] for way in merge.WAYS
    }
    first, second, third, _ = merge.WAYS
    runs[first] = [merge.Run(2.0, gib), merge.Run(9.0, gib)]
    runs[second] = [merge.Run(3.0, gib), merge.Run(2.0, gib)]
    text = merge.describe(runs, gib, 6)
    (row,) = (line for line in text.splitlines() if line.startswith(f"| {third} "))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    # Of Orbax: 2/4 in the one round, 2/8 in the other.
    expected = ["6.00", "5.00 to 7.00", "1.00", "0.38", "3.0 checkpoints"]
    assert cells[1:] == expected


@pytest.mark.parametrize(
    ("option", "value"),
    [("--size", "0"), ("--checkpoints", "x"), ("--rounds", "1"), ("--folder", "none")],
)
def test_bad_options(option, value, capsys):
    line = error_of(merge.main, [option, value], capsys)
    assert f"argument {option}: " in line
