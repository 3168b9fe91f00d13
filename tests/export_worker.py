# SPDX-License-Identifier: Apache-2.0
"""Goes on with an exported train step, for `test_export.py`.

    python tests/export_worker.py FOLDER

takes the leaves of given.npz, and then its data step by step, through the program in
the folder, and writes the leaves that come out to result.npz. Run as a script: JAX and
NumPy are to be at hand, and nothing else that could help.
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
    # NumPy's files do not know bfloat16; the program does.
    *avals, _ = exported.in_avals
    leaves = [x.view(aval.dtype) for x, aval in zip(leaves, avals, strict=True)]
    for x in data:
        leaves = step(leaves, x)
    np.savez(folder / "result.npz", *leaves)


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
    assert not {"asgd_optax", "optax"} & set(sys.modules)
