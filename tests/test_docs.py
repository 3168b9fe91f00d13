# SPDX-License-Identifier: Apache-2.0
"""The README's code runs, and the gallery is complete."""

import re

import pytest

from tests.pages import ROOT, blocks_of, run

README = ROOT / "README.md"


def line(block):
    return f"line {len(block) - len(block.lstrip()) + 1}"


@pytest.mark.flax
@pytest.mark.parametrize("block", blocks_of(README), ids=line)
def test_readme_code_runs(block):
    run(block, README, {"__name__": "readme"})


def test_gallery_has_a_card_for_every_example():
    modules = ROOT.glob("examples/*.py")
    examples = {path.stem for path in modules if "__main__" in path.read_text()}
    gallery = (ROOT / "docs" / "reference" / "gallery.md").read_text()
    assert set(re.findall(r"^`python -m examples\.(\w+)`$", gallery, re.M)) == examples
    for name in examples:
        assert (ROOT / "docs" / "reference" / "examples" / f"{name}.md").exists()
