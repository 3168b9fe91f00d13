# SPDX-License-Identifier: Apache-2.0
"""`examples/pod_plan.py` without a TPU's compiler; with it, see `tests/tpu`."""

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from benchmarks import compilers
from examples import pod_plan
from tests.programs import command_line_of, error_of


@pytest.mark.parametrize(("apart", "leaves"), [(False, 12), (True, 9 * 80 + 3)])
def test_it_is_a_transformer_of_seventy_billion(apart, leaves):
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("rows", "columns"))
    params = pod_plan.lay_out(mesh, layers=80, apart=apart)
    assert len(jax.tree.leaves(params)) == leaves
    # https://arxiv.org/abs/2407.21783, table 3: 80 layers, 8192, 28672, 128K tokens.
    total = sum(p.size for p in jax.tree.leaves(params))
    assert total == 70_553_706_496
    norms = 0
    for path, p in jax.tree_util.tree_leaves_with_path(params):
        copied = "norm" in jax.tree_util.keystr(path)
        assert p.sharding.is_fully_replicated == copied
        assert p.size / np.prod(p.sharding.shard_shape(p.shape)) == (1 if copied else 8)
        norms += copied * p.size
    # Two bytes each, of an eighth of the matrices and all of the norms.
    assert pod_plan.on_a_chip(params) == 2 * ((total - norms) // 8 + norms)
    assert pod_plan.on_a_chip(params, 1) == (total - norms) // 8 + norms


def test_a_missing_compiler_is_said_in_one_line(monkeypatch):
    monkeypatch.setattr(compilers, "installed", lambda platform: False)
    with pytest.raises(SystemExit, match=r"pip install 'jax\[tpu\]'"):
        pod_plan.main()


def test_it_takes_no_options(monkeypatch, capsys):
    run = command_line_of("pod_plan", monkeypatch)
    assert "--speed" in error_of(run, ["--speed", "1"], capsys)
