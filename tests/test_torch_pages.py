# SPDX-License-Identifier: Apache-2.0
"""The code of the pages on PyTorch runs, and gives PyTorch's numbers.

The site's build has no PyTorch, so it does not run the plain blocks of these pages.
"""

import sys
import types

import jax
import numpy as np
import pytest

from tests.pages import HOW_TO, blocks_of, run

pytestmark = [pytest.mark.torch, pytest.mark.flax]


def run_page(name, monkeypatch, tmp_path):
    """Run all code of a page in order; return the names it defines."""
    module = types.ModuleType("page")
    # Flax modules look up the module in which they are defined.
    monkeypatch.setitem(sys.modules, "page", module)
    monkeypatch.chdir(tmp_path)
    for block in blocks_of(HOW_TO / name):
        run(block, HOW_TO / name, vars(module))
    return vars(module)


@pytest.fixture
def torch():
    return pytest.importorskip("torch")


def test_port_of_a_script_has_the_numbers_of_torch(torch, monkeypatch, tmp_path):
    names = run_page("from_pytorch.md", monkeypatch, tmp_path)
    eps = np.finfo(np.float32).eps
    for theirs, ours in [
        (names["w"].detach(), names["params"]),
        (names["optimizer"].state[names["w"]]["ax"], names["average"]),
        (names["averaged_model"].module.weight.detach()[0], names["ema_params"]),
    ]:
        np.testing.assert_allclose(ours, theirs, rtol=100 * eps)


def test_job_moved_over_and_back_has_the_weights_of_torch(torch, monkeypatch, tmp_path):
    names = run_page("move_a_torch_job.md", monkeypatch, tmp_path)
    order = names["run"]["names"]
    alone, optimizer = names["make_model_and_optimizer"]()
    train, tolerance = names["train_in_torch"], {"rtol": 1e-4, "atol": 1e-5}

    def averages():
        return [optimizer.state[p]["ax"].numpy().copy() for p in alone.parameters()]

    train(alone, optimizer, 0, 30)
    # The nnx.Optimizer holds the average of the checkpoint.
    expected = names["to_params"](dict(zip(order, averages(), strict=True)))
    nnx_state = names["nnx"].state(names["nnx_optimizer"].opt_state)
    held = names["nnx"].to_pure_dict(nnx_state)["ax"]
    jax.tree.map(np.testing.assert_array_equal, held, expected)

    train(alone, optimizer, 30, 60)
    ours = names["from_params"](names["evaluate_with"])
    for name, average in zip(order, averages(), strict=True):
        np.testing.assert_allclose(ours[name], average, **tolerance)

    train(alone, optimizer, 60, 90)
    for name, weight in alone.named_parameters():
        returned = names["returned"][name]
        np.testing.assert_allclose(returned, weight.detach(), **tolerance)

    assert set(names["transforms"]) == {"decayed", "free"}
    steps = [state.inner_state.step for state in names["states"].values()]
    assert steps == [30, 30]
