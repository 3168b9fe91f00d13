# SPDX-License-Identifier: Apache-2.0
"""`examples/pod_plan.py` without a TPU's compiler; with it, see `tests/tpu`."""

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from examples import pod_plan, tpu_compiler
from tests.programs import error_of

# A scheduled program, cut down to what is counted: device memory is the space of no
# number, S(1) vector memory, S(5) the host's.
PROGRAM = """HloModule step, is_scheduled=true

%fused_computation (param_0: f32[8,4]) -> f32[8,4] {
  %param_0 = f32[8,4]{1,0:T(8,128)} parameter(0)
  ROOT %add.1 = f32[8,4]{1,0:T(8,128)} add(%param_0, %param_0)
}

%idle (param.1: (f32[8,4])) -> (f32[8,4]) {
  %param.1 = (f32[8,4]{1,0:T(8,128)}) parameter(0)
  %element = f32[8,4]{1,0:T(8,128)} get-tuple-element(%param.1), index=0
  ROOT %tuple.1 = (f32[8,4]{1,0:T(8,128)}) tuple(%element)
}

%due (param.2: (f32[8,4])) -> (f32[8,4]) {
  %param.2 = (f32[8,4]{1,0:T(8,128)}) parameter(0)
  %element.1 = f32[8,4]{1,0:T(8,128)} get-tuple-element(%param.2), index=0
  %fusion.1 = f32[8,4]{1,0:T(8,128)} fusion(%element.1), calls=%fused_computation
  ROOT %tuple.2 = (f32[8,4]{1,0:T(8,128)}) tuple(%fusion.1)
}

ENTRY %main (p: f32[8,4], a: bf16[16,4], n: pred[]) -> (f32[8,4]) {
  %p = f32[8,4]{1,0:T(8,128)} parameter(0)
  %a = bf16[16,4]{1,0:T(8,128)(2,1)S(5)} parameter(1)
  %n = pred[]{:T(512)S(6)} parameter(2)
  %copy-start = (bf16[16,4]{1,0}, bf16[16,4]{1,0:S(5)}, u32[]{:S(2)}) copy-start(%a)
  %copy-done = bf16[16,4]{1,0:T(8,128)(2,1)} copy-done(%copy-start)
  %slice-start = ((f32[8,4]{1,0}), f32[2,4]{1,0:S(1)}, s32[]{:S(2)}) slice-start(%p)
  %slice-done = f32[2,4]{1,0:S(1)} slice-done(%slice-start)
  %fusion = f32[8,4]{1,0} fusion(%p, %copy-done, %slice-done), calls=%other
  %tuple = (f32[8,4]{1,0:T(8,128)}) tuple(%fusion)
  %branch = (f32[8,4]{1,0}) conditional(%n, %tuple), branch_computations={%idle, %due}
  %result = f32[8,4]{1,0:T(8,128)} get-tuple-element(%branch), index=0
  ROOT %tuple.3 = (f32[8,4]{1,0:T(8,128)}) tuple(%result)
}
"""


def test_traffic_is_counted_once_and_by_memory():
    # The copy writes 128, the slice reads 32, the kernel reads 128 twice and writes it.
    least = tpu_compiler.traffic(PROGRAM, branch=min)
    assert (least["device"], least["host"], least["vector"]) == (544, 128, 64)
    assert least["kernels"] == 1
    # The branch reads 128 and writes it.
    most = tpu_compiler.traffic(PROGRAM)
    assert (most["device"], most["host"], most["vector"]) == (800, 128, 64)
    assert most["kernels"] == 2


def test_a_loop_is_not_counted_as_one_pass():
    with pytest.raises(ValueError, match="cannot count the bytes of a while"):
        tpu_compiler.traffic(PROGRAM.replace(" conditional(", " while("))


def layout(*options, rows=2):
    """The parameters as an option's text has them laid out on CPU devices."""
    devices = np.array(jax.devices()).reshape(rows, -1)
    mesh = Mesh(devices, (pod_plan.ROWS, pod_plan.COLUMNS))
    shapes = pod_plan.weights(pod_plan.parser().parse_args(options))
    return pod_plan.lay_out(shapes, mesh)


@pytest.mark.parametrize(("options", "leaves"), [([], 12), (["--apart"], 9 * 80 + 3)])
def test_the_default_is_a_transformer_of_seventy_billion(options, leaves):
    params = layout(*options)
    assert len(jax.tree.leaves(params)) == leaves
    # https://arxiv.org/abs/2407.21783, table 3: 80 layers, 8192, 28672, 128K tokens.
    assert sum(p.size for p in jax.tree.leaves(params)) == 70_553_706_496
    for path, p in jax.tree_util.tree_leaves_with_path(params):
        copied = "norm" in jax.tree_util.keystr(path)
        assert (p.sharding.spec == PartitionSpec()) == copied
        assert p.size / np.prod(p.sharding.shard_shape(p.shape)) == (1 if copied else 8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--hidden", "8190"], "4 does not divide the 8190 columns of 'embedding'"),
        (["--key-value", "2"], "4 does not divide the 2 columns of 'key'"),
        (["--feed-forward", "8193"], "2 does not divide the 8193 rows of 'down'"),
    ],
)
def test_a_mesh_that_does_not_divide_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        layout(*options)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--topology", "v9:2x2"], "--topology"),
        (["--topology", "v6e"], "--topology"),
        (["--layers", "0"], "--layers"),
        (["--hidden", "wide"], "--hidden"),
        ([], "pip install 'jax[tpu]'"),
    ],
)
def test_a_plan_that_cannot_be_made_is_refused(options, named, capsys, monkeypatch):
    monkeypatch.setattr(tpu_compiler, "installed", lambda: False)
    assert named in error_of(pod_plan.main, options, capsys)
