# SPDX-License-Identifier: Apache-2.0
"""The compiled step of a row on TPUs or GPUs, and the bytes it should move."""

import jax

from benchmarks import compilers

# The least bytes per parameter that a step can move, by the number of arrays in the
# state: it reads the gradient, and reads and writes the parameter and those arrays,
# which are float32.
LEAST_BYTES = {
    "float32": {1: 20, 2: 28, 5: 52},
    "bfloat16": {1: 14, 2: 22, 5: 46},
}


def compile_row(row, dtype, target, size):
    """Compile the donated step of one leaf.

    Returns:
      The step; the least bytes that it can move; for a row with `every`, the bytes of
      a step between two averaged iterates, else None; the number of its kernels.
    """
    tx, params = row.make(), compilers.leaf(target, dtype, size)
    state = compilers.state_like(tx, params)
    step = compilers.compile_step(tx, params, state)
    shapes = [x.shape for x in jax.tree.leaves(state)]
    assert shapes.count(params.shape) == row.arrays
    width = params.dtype.itemsize
    least = LEAST_BYTES[dtype][row.arrays] - 2 * row.narrow_arrays * (4 - width)
    if "every" in row.options:
        # The kernel of a branch reads the iterate that the first kernel wrote.
        return step, (least + width) * size, 3 * width * size, 2
    return step, least * size, None, 1
