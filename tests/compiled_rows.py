# SPDX-License-Identifier: Apache-2.0
"""A row's step as a TPU's or a GPU's compiler makes it, and what it has to be."""

import jax

from benchmarks import compilers

# The least bytes a parameter that a step moves, by how many arrays of its shape the
# state has: the gradient is read, the parameter and those arrays, all float32, are read
# and written.
LEAST_BYTES = {
    "float32": {1: 20, 2: 28, 5: 52},
    "bfloat16": {1: 14, 2: 22, 5: 46},
}


def compile_row(row, dtype, target, size):
    """The donated step of one leaf.

    Returns:
      The step; the least bytes that it moves; the bytes that one between moves, of a
      row with `every`, None of others; its kernels.
    """
    tx, params = row.make(), compilers.leaf(target, dtype, size)
    state = compilers.state_like(tx, params)
    step = compilers.compile_step(tx, params, state)
    shapes = [x.shape for x in jax.tree.leaves(state)]
    assert shapes.count(params.shape) == row.arrays
    least, width = LEAST_BYTES[dtype][row.arrays], params.dtype.itemsize
    if "every" in row.options:
        # A second kernel, a branch's, reads the iterate that the first wrote.
        return step, (least + width) * size, 3 * width * size, 2
    return step, least * size, None, 1
