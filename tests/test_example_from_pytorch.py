# SPDX-License-Identifier: Apache-2.0
"""`examples/from_pytorch.py` shows what it says, and asks for torch in one line."""

import importlib
import sys

import jax
import numpy as np
import pytest

from tests.programs import assert_lesson_refuses, command_line_of, error_of, hide

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def lesson():
    torch = pytest.importorskip("torch")
    before = torch.get_default_dtype(), torch.get_num_threads()
    from examples import from_pytorch

    yield from_pytorch
    torch.set_default_dtype(before[0])
    torch.set_num_threads(before[1])


@pytest.mark.torch
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_the_run_goes_on_as_in_torch_alone(
    dtype, lesson, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(lesson, "EVERY", 2)
    figure = tmp_path / "new" / "figure.png"
    results = lesson.main(figure, dtype, steps=60)
    assert not jax.config.jax_enable_x64

    alone, moved = results["alone"], results["moved"]
    assert alone.shape == (30, 2)
    assert moved.shape == (15, 2)
    # Averaging began at step 15: at the move the average is no longer the iterate.
    assert abs(alone[14, 1] - alone[14, 0]) > 0.01
    assert alone[-1, 0] < 0.7 * alone[0, 0]
    tolerance = 300 * np.finfo(dtype).eps
    np.testing.assert_allclose(moved, alone[15:], tolerance)
    assert all(0 < difference < tolerance for difference in results["largest"])

    assert figure.read_bytes().startswith(PNG_SIGNATURE)
    printed = capsys.readouterr().out
    weights, averages = results["largest"]
    assert f"of weights is {weights:.2g}, of averages {averages:.2g}" in printed


@pytest.mark.torch
def test_the_two_networks_are_one(lesson):
    torch = pytest.importorskip("torch")
    network = lesson.torch_network()
    weights = {n: w.detach().numpy() for n, w in network.named_parameters()}
    images = np.random.default_rng(0).normal(size=(5, 64)).astype(np.float32)
    expected = network(torch.from_numpy(images)).detach().numpy()
    logits = lesson.Network().apply({"params": lesson.to_params(weights)}, images)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5)


def test_without_torch_one_line_says_so(monkeypatch):
    hide("torch", monkeypatch)
    monkeypatch.delitem(sys.modules, "examples.from_pytorch", raising=False)
    with pytest.raises(SystemExit) as ended:
        importlib.import_module("examples.from_pytorch")
    assert ended.value.code == "this needs PyTorch: pip install '.[examples,torch]'"


@pytest.mark.torch
@pytest.mark.usefixtures("lesson")
def test_a_bad_option_is_refused_in_one_line(tmp_path, monkeypatch, capsys):
    run = command_line_of("from_pytorch", monkeypatch)
    assert "--dtype" in error_of(run, ["--dtype=float16"], capsys)
    assert_lesson_refuses("from_pytorch", tmp_path, monkeypatch, capsys)
