# SPDX-License-Identifier: Apache-2.0
"""The code on the site's pages runs as it stands there."""

import numpy as np
import pytest

from tests.pages import ROOT, blocks_of, page_programs, run


@pytest.mark.parametrize("blocks", page_programs())
def test_code(blocks, monkeypatch, tmp_path):
    run(blocks, monkeypatch, tmp_path)


def test_the_pilot_is_an_average():
    """JAX traces a function once: a start that is changed afterwards does nothing."""
    names = {}
    for block in blocks_of(ROOT / "docs" / "guides" / "confidence_intervals.md")[:3]:
        exec(block.compiled(), names)
    (w, (_, track)), pilot = names["run"], names["pilot"]
    scaling = track.statistic
    assert int(scaling.averaged) == 1000
    np.testing.assert_array_equal(pilot, scaling.average.value)
    assert not np.array_equal(pilot, w)
    assert abs(names["estimate"] - 2) < names["half"] < 0.05
