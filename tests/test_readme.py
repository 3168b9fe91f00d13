# SPDX-License-Identifier: Apache-2.0
"""The README's code runs as it stands there."""

import pathlib
import re

import jax
import numpy as np
import pytest

README = pathlib.Path(__file__).parents[1] / "README.md"


@pytest.mark.parametrize(
    "code", re.findall(r"^```python\n(.*?)^```", README.read_text(), re.M | re.S)
)
def test_code(code):
    names = {}
    exec(compile(code, str(README), "exec"), names)
    for leaf in jax.tree.leaves(names["evaluate_with"]):
        assert np.isfinite(leaf).all()
