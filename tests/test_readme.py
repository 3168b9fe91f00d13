# SPDX-License-Identifier: Apache-2.0
"""The README's code runs as it stands there."""

import pathlib
import re

import jax
import numpy as np

README = pathlib.Path(__file__).parents[1] / "README.md"


def test_code():
    """Block after block, each on what those before it have defined."""
    blocks = re.findall(r"^```python\n(.*?)^```", README.read_text(), re.M | re.S)
    names = {}
    for block in blocks:
        exec(compile(block, str(README), "exec"), names)
        for leaf in jax.tree.leaves(names["evaluate_with"]):
            assert np.isfinite(leaf).all()
    assert len(blocks) > 1
