# SPDX-License-Identifier: Apache-2.0
"""The code on the pages of the site runs."""

import pytest

from tests.pages import page_programs, run


@pytest.mark.parametrize("blocks", page_programs())
def test_page_code_runs(blocks, monkeypatch, tmp_path):
    run(blocks, monkeypatch, tmp_path)
