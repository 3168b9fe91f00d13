# SPDX-License-Identifier: Apache-2.0
"""The version and date of the release are the same in all files."""

import re
from pathlib import Path

import asgd_optax

ROOT = Path(__file__).parents[1]


def test_version_and_date_agree_in_all_files():
    citation = (ROOT / "CITATION.cff").read_text()
    changelog = (ROOT / "CHANGELOG.md").read_text()
    cited = re.search(r"^version: (.+)\ndate-released: (.+)$", citation, re.MULTILINE)
    newest = re.search(r"^## ([\d.]+) - ([\d-]+)$", changelog, re.MULTILINE)
    assert cited.groups() == newest.groups()
    assert cited[1] == asgd_optax.__version__
