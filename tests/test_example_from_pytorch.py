# SPDX-License-Identifier: Apache-2.0
"""`examples/from_pytorch.py` shows what it says; bad options are one line."""

import argparse

import jax
import numpy as np
import pytest
from flax import nnx

from examples import from_pytorch
from tests.programs import assert_explained, assert_refuses_outputs, error_of

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def test_the_conversions_are_inverse_to_each_other():
    model = nnx.eval_shape(lambda: from_pytorch.Network(nnx.Rngs(0)))
    shapes = nnx.to_pure_dict(nnx.state(model))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.normal(size=x.shape), shapes)
    weights = from_pytorch.from_params(params)
    assert weights["conv.weight"].shape == (8, 1, 3, 3)
    assert weights["linear.weight"].shape == (10, 512)
    back = from_pytorch.to_params(weights)
    assert jax.tree.structure(back) == jax.tree.structure(params)
    for found, expected in zip(*map(jax.tree.leaves, (back, params)), strict=True):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.torch
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_the_run_goes_on_as_in_torch_alone(dtype, tmp_path, capsys):
    torch = pytest.importorskip("torch")
    before = torch.get_default_dtype(), torch.get_num_threads()
    figure = tmp_path / "new" / "figure.png"
    options = ["--steps", "60", "--switch", "30", "--dtype", dtype]
    results = from_pytorch.main([*options, "--output", str(figure)])
    assert (torch.get_default_dtype(), torch.get_num_threads()) == before
    assert not jax.config.jax_enable_x64

    assert results.steps.tolist() == list(range(1, 61))
    assert results.in_torch.iterate.shape == (60,)
    assert results.moved.iterate.shape == (30,)
    # Averaging began at step 15: at the move the average is no longer the iterate.
    assert abs(results.in_torch.average[29] - results.in_torch.iterate[29]) > 0.01
    assert results.in_torch.iterate[-1] < 0.3 * results.in_torch.iterate[0]
    tolerance = 300 * np.finfo(dtype).eps
    for alone, moved in zip(results.in_torch, results.moved, strict=True):
        np.testing.assert_allclose(moved, alone[30:], tolerance)
    assert 0 < results.weights_difference < tolerance
    assert 0 < results.averages_difference < tolerance

    assert figure.read_bytes().startswith(PNG_SIGNATURE)
    assert figure.stat().st_size < 150 * 1024
    printed = capsys.readouterr().out
    assert f"weights   {results.weights_difference:.2g}\n" in printed
    assert f"averages  {results.averages_difference:.2g}\n" in printed
    assert str(figure) in printed


@pytest.mark.torch
def test_the_shortest_run(tmp_path):
    pytest.importorskip("torch")
    figure = tmp_path / "figure.png"
    results = from_pytorch.main(["--steps", "2", "--output", str(figure)])
    assert results.moved.iterate.shape == (1,)
    assert results.weights_difference < 1e-14
    assert figure.read_bytes().startswith(PNG_SIGNATURE)


def test_runs_that_do_not_differ_at_all_are_drawn(tmp_path):
    losses = from_pytorch.Losses(np.array([2.0, 1.0]), np.array([2.0, 1.5]))
    moved = from_pytorch.Losses(np.array([1.0]), np.array([1.5]))
    figure = tmp_path / "figure.png"
    options = argparse.Namespace(steps=2, switch=1, dtype="float64", output=figure)
    results = from_pytorch.Results(np.array([1, 2]), losses, moved, 0.0, 0.0)
    from_pytorch.draw(results, options)
    assert figure.read_bytes().startswith(PNG_SIGNATURE)


def test_without_torch_one_line_says_so(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(from_pytorch, "torch", None)
    output = tmp_path / "new" / "figure.png"
    line = error_of(from_pytorch.main, ["--output", str(output)], capsys)
    assert "pip install '.[examples,torch]'" in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--steps", "1"),
        ("--steps", "1.5"),
        ("--switch", "0"),
        ("--switch", "many"),
        ("--switch", "2000"),
        ("--dtype", "float16"),
        ("--speed", "1"),
    ],
)
def test_a_bad_option_is_refused_in_one_line(option, value, tmp_path, capsys):
    figure = tmp_path / "figure.png"
    figure.write_bytes(b"an older figure")
    argv = [option, value, "--output", str(figure)]
    assert option in error_of(from_pytorch.main, argv, capsys)
    assert figure.read_bytes() == b"an older figure"


def test_an_output_that_cannot_be_written_is_refused(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(from_pytorch, "torch", "never used")
    assert_refuses_outputs(from_pytorch.main, tmp_path, capsys)


def test_help_explains_every_option_with_its_default(capsys):
    options = ("--steps", "--switch", "--dtype", "--output")
    assert_explained(from_pytorch.main, options, capsys)
