# SPDX-License-Identifier: Apache-2.0
"""The README's code runs, and all pages follow their conventions.

`test_pages.py` runs the code of the site's pages.
"""

import ast
import re

import pytest

from tests.pages import ROOT, page_programs, readme_programs, run

PROGRAMS = readme_programs() + page_programs()


@pytest.mark.parametrize("blocks", readme_programs())
def test_readme_code_runs(blocks, monkeypatch, tmp_path):
    run(blocks, monkeypatch, tmp_path)


def names_in(node, context):
    names = (n for n in ast.walk(node) if isinstance(n, ast.Name))
    return {name.id for name in names if isinstance(name.ctx, context)}


@pytest.mark.parametrize("blocks", PROGRAMS)
def test_functions_are_not_called_after_their_globals_change(blocks):
    """JAX would use the trace of the old values."""
    body = [node for block in blocks for node in ast.parse(block.text).body]
    for i, function in enumerate(body):
        if not isinstance(function, ast.FunctionDef):
            continue
        own = names_in(function, ast.Store)
        own |= {node.arg for node in ast.walk(function) if isinstance(node, ast.arg)}
        reads, changed = names_in(function, ast.Load) - own, set()
        for node in body[i + 1 :]:
            if isinstance(node, ast.FunctionDef):
                continue
            if function.name in names_in(node, ast.Load):
                assert not changed, f"{function.name}: {ast.unparse(node)}"
            if function.name in names_in(node, ast.Store):
                break
            changed |= names_in(node, ast.Store) & reads


def test_every_code_block_is_found():
    """Blocks that are not closed properly count too."""
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    opened = sum(len(re.findall("`{3}python", page.read_text())) for page in pages)
    assert opened == sum(len(program.values[0]) for program in PROGRAMS)


def test_gallery_has_a_card_for_every_example():
    modules = ROOT.glob("examples/*.py")
    examples = {path.stem for path in modules if "__main__" in path.read_text()}
    gallery = (ROOT / "docs" / "gallery.md").read_text()
    assert set(re.findall(r"^`python -m examples\.(\w+)`$", gallery, re.M)) == examples
