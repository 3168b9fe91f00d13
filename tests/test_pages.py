# SPDX-License-Identifier: Apache-2.0
"""The code on the pages of the site runs."""

import numpy as np
import pytest

from tests.pages import ROOT, blocks_of, page_programs, run


@pytest.mark.parametrize("blocks", page_programs())
def test_page_code_runs(blocks, monkeypatch, tmp_path):
    run(blocks, monkeypatch, tmp_path)


def test_pilot_of_confidence_interval_guide_is_an_average():
    names = {}
    for block in blocks_of(ROOT / "docs" / "guides" / "confidence_intervals.md")[:4]:
        exec(block.compiled(), names)
    (w, (_, track)), pilot = names["run"], names["pilot"]
    scaling = track.statistic
    assert int(scaling.averaged) == 1000
    np.testing.assert_array_equal(pilot, scaling.average.value)
    assert not np.array_equal(pilot, w)
    assert abs(names["estimate"] - 2) < names["half"] < 0.05
