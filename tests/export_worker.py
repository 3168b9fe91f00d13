# SPDX-License-Identifier: Apache-2.0
"""Resume training with an exported train step, for `test_export.py`.

    python tests/export_worker.py FOLDER

reads leaves and data from given.npz, passes them step by step through the program in
the folder and writes the final leaves to result.npz. It runs as a script, so that only
JAX and NumPy can be imported.
"""

import pathlib
import sys

import jax
import numpy as np
from jax import export


def main(folder: pathlib.Path) -> None:
    exported = export.deserialize((folder / "program").read_bytes())
    step = jax.jit(exported.call)
    with np.load(folder / "given.npz") as arrays:
        *leaves, data = arrays.values()
    # npz files do not keep bfloat16, but the program does.
    *avals, _ = exported.in_avals
    leaves = [x.view(aval.dtype) for x, aval in zip(leaves, avals, strict=True)]
    for x in data:
        leaves = step(leaves, x)
    np.savez(folder / "result.npz", *leaves)


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
    assert not {"asgd_optax", "optax"} & set(sys.modules)
