# SPDX-License-Identifier: Apache-2.0
"""A release is called the same, and dated the same, wherever that is written."""

import re
from pathlib import Path

import asgd_optax

ROOT = Path(__file__).parents[1]


def test_version_and_date_agree():
    citation = (ROOT / "CITATION.cff").read_text()
    changelog = (ROOT / "CHANGELOG.md").read_text()
    cited = re.search(r"^version: (.+)\ndate-released: (.+)$", citation, re.MULTILINE)
    newest = re.search(r"^## ([\d.]+) - ([\d-]+)$", changelog, re.MULTILINE)
    assert cited.groups() == newest.groups()
    assert cited[1] == asgd_optax.__version__
