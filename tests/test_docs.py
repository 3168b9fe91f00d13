# SPDX-License-Identifier: Apache-2.0
"""The README's code runs as it stands there, and what holds of all pages.

The code of the site's is run by `test_pages.py`.
"""

import ast
import re

import pytest

from tests.pages import ROOT, page_programs, readme_programs, run

PROGRAMS = readme_programs() + page_programs()


@pytest.mark.parametrize("blocks", readme_programs())
def test_code(blocks, monkeypatch, tmp_path):
    run(blocks, monkeypatch, tmp_path)


def names_in(node, context):
    names = (n for n in ast.walk(node) if isinstance(n, ast.Name))
    return {name.id for name in names if isinstance(name.ctx, context)}


@pytest.mark.parametrize("blocks", PROGRAMS)
def test_no_function_is_used_after_what_it_reads_was_bound_anew(blocks):
    """JAX would go on with the trace of what was bound before."""
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


def test_every_block_is_found():
    """Whatever opens as one is run, also where it does not close as it should."""
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    opened = sum(len(re.findall("`{3}python", page.read_text())) for page in pages)
    assert opened == sum(len(program.values[0]) for program in PROGRAMS)


def test_gallery():
    """There is a card for every lesson, and no other command."""
    modules = ROOT.glob("examples/*.py")
    lessons = {path.stem for path in modules if "__main__" in path.read_text()}
    gallery = (ROOT / "docs" / "gallery.md").read_text()
    assert set(re.findall(r"^`python -m examples\.(\w+)`$", gallery, re.M)) == lessons
