# SPDX-License-Identifier: Apache-2.0
"""The code on the pages, for the tests that run it.

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


def readme_programs() -> list:
    """What runs in a namespace of its own, as parameters of a test: each block."""
    blocks = blocks_of(ROOT / "README.md")
    return as_parameters({f"README.md:{b.line + 1}": [b] for b in blocks})


def page_programs() -> list:
    """The same of the site: each page."""
    pages = sorted((ROOT / "docs").rglob("*.md"))
    return as_parameters({str(p.relative_to(ROOT)): blocks_of(p) for p in pages})


def as_parameters(programs: dict[str, list[Code]]) -> list:
    return [pytest.param(b, id=n, marks=marks_of(b)) for n, b in programs.items() if b]


def run(blocks: list[Code], monkeypatch, tmp_path) -> None:
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
