# SPDX-License-Identifier: Apache-2.0
"""`benchmarks/command_line.py`, in the programs that no test runs to their end."""

import importlib
import sys

import pytest

from benchmarks import average_every, harness, step_bytes
from tests.programs import error_of, hide


@pytest.mark.parametrize("program", [average_every, step_bytes])
def test_without_options_there_is_help(program, capsys):
    assert "--speed" in error_of(program.main, ["--speed", "1"], capsys)
    with pytest.raises(SystemExit) as ended:
        program.main(["--help"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith("usage: ")


@pytest.mark.parametrize("name", ["step_cost", "training_loop", "rate_sweep"])
def test_without_torch_a_benchmark_says_so_in_one_line(name, monkeypatch):
    hide("torch", monkeypatch)
    for module in (name, "step_cost"):
        monkeypatch.delitem(sys.modules, f"benchmarks.{module}", raising=False)
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(f"benchmarks.{name}")
    assert ended.value.code == "this needs torch: pip install '.[bench]'"


def test_without_its_peer_the_harness_says_so_in_one_line(monkeypatch):
    hide("google_benchmark", monkeypatch)
    hide("torch", monkeypatch)
    for call, missing in (
        (lambda: harness.measure({}, 2), "google_benchmark"),
        (lambda: harness.choose_torch_threads(lambda: None), "torch"),
    ):
        with pytest.raises(SystemExit) as ended:
            call()
        assert ended.value.code == f"this needs {missing}: pip install '.[bench]'"
