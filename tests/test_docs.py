# SPDX-License-Identifier: Apache-2.0
"""The code on the pages runs as it stands there.

A page's ```python blocks run in order, from its own beginning; the README's each by
itself. What is shown and cannot run is fenced as ```py.
"""

import ast
import re
import sys
import types
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
# In lists and in MyST's directives too, whose own fences are longer or of colons.
FENCE = re.compile(r"^( *)(`{3,})python\n(.*?)^\1\2 *$", re.MULTILINE | re.DOTALL)
CORE = {"asgd_optax", "jax", "numpy", "optax"} | set(sys.stdlib_module_names)


class Code(NamedTuple):
    """A block, after as many empty lines as stand above it on its page."""

    page: Path
    line: int
    text: str

    def compiled(self) -> types.CodeType:
        """Errors name the page and its line."""
        return compile("\n" * self.line + self.text, self.page, "exec")


def blocks_of(page: Path) -> list[Code]:
    """The blocks of a page that are to run."""
    text = page.read_text()
    return [
        Code(
            page,
            text.count("\n", 0, fence.start(3)),
            re.sub(f"^{fence[1]}", "", fence[3], flags=re.MULTILINE),
        )
        for fence in FENCE.finditer(text)
    ]


def marks_of(blocks: list[Code]) -> list[pytest.MarkDecorator]:
    """Markers for what the blocks import beyond the core's needs."""
    imported = set()
    for node in (n for block in blocks for n in ast.walk(ast.parse(block.text))):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module)
    packages = {name.partition(".")[0] for name in imported} - CORE
    marks = []
    if "torch" in packages:
        marks.append(pytest.mark.torch)
    if packages - {"torch"} or "asgd_optax.flax" in imported:
        marks.append(pytest.mark.flax)
    return marks


def programs() -> list:
    """What runs in a namespace of its own, as parameters of a test."""
    readme = ROOT / "README.md"
    found = {f"README.md:{b.line + 1}": [b] for b in blocks_of(readme)}
    for page in sorted((ROOT / "docs").rglob("*.md")):
        if blocks := blocks_of(page):
            found[str(page.relative_to(ROOT))] = blocks
    return [pytest.param(b, id=n, marks=marks_of(b)) for n, b in found.items()]


@pytest.mark.parametrize("blocks", programs())
def test_code(blocks, monkeypatch, tmp_path):
    """Without an error or a warning; and what is to be evaluated with is finite."""
    module = types.ModuleType("page")
    # Dataclasses and Flax's modules look for the module that they are defined in.
    monkeypatch.setitem(sys.modules, "page", module)
    monkeypatch.chdir(tmp_path)
    for block in blocks:
        if any(mark.name == "torch" for mark in marks_of([block])):
            pytest.importorskip("torch")
        exec(block.compiled(), vars(module))
        for leaf in jax.tree.leaves(vars(module).get("evaluate_with")):
            assert np.isfinite(leaf).all()


def test_the_pilot_is_an_average():
    """JAX traces a function once: a start that is changed afterwards does nothing."""
    names = {}
    for block in blocks_of(ROOT / "docs" / "guides" / "confidence_intervals.md")[:3]:
        exec(block.compiled(), names)
    (w, (_, scaling)), pilot = names["run"], names["pilot"]
    assert int(scaling.averaged) == 1000
    np.testing.assert_array_equal(pilot, scaling.average.value)
    assert not np.array_equal(pilot, w)
    assert abs(names["estimate"] - 2) < names["half"] < 0.05


def names_in(node, context):
    names = (n for n in ast.walk(node) if isinstance(n, ast.Name))
    return {name.id for name in names if isinstance(name.ctx, context)}


@pytest.mark.parametrize("blocks", programs())
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
    """Whatever opens as one runs above, also where it does not close as it should."""
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    opened = sum(len(re.findall("`{3}python", page.read_text())) for page in pages)
    assert opened == sum(len(program.values[0]) for program in programs())


def test_gallery():
    """There is a card for every lesson, and no other command."""
    modules = ROOT.glob("examples/*.py")
    lessons = {path.stem for path in modules if "__main__" in path.read_text()}
    gallery = (ROOT / "docs" / "gallery.md").read_text()
    assert set(re.findall(r"^`python -m examples\.(\w+)`$", gallery, re.M)) == lessons
