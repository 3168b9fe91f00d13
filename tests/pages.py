# SPDX-License-Identifier: Apache-2.0
"""Code blocks of the documentation, for the tests that run them.

The ```python blocks of a page run in order, in one namespace; each block of the README
has its own. Code that cannot run is fenced as ```py.
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
# Also inside lists and MyST directives, whose fences are longer or made of colons.
FENCE = re.compile(r"^( *)(`{3,})python\n(.*?)^\1\2 *$", re.MULTILINE | re.DOTALL)
CORE = {"asgd_optax", "jax", "numpy", "optax"} | set(sys.stdlib_module_names)


class Code(NamedTuple):
    """A code block, and the number of lines above it on its page."""

    page: Path
    line: int
    text: str

    def compiled(self) -> types.CodeType:
        """Compile the block such that errors name the page and the line."""
        return compile("\n" * self.line + self.text, self.page, "exec")


def blocks_of(page: Path) -> list[Code]:
    """Return the blocks of a page that are run."""
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
    """Return pytest markers for optional packages that the blocks import."""
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
    """Return the blocks of the README, one program each, as parameters of a test."""
    blocks = blocks_of(ROOT / "README.md")
    return as_parameters({f"README.md:{b.line + 1}": [b] for b in blocks})


def page_programs() -> list:
    """Return the pages of the site, one program each, as parameters of a test."""
    pages = sorted((ROOT / "docs").rglob("*.md"))
    return as_parameters({str(p.relative_to(ROOT)): blocks_of(p) for p in pages})


def as_parameters(programs: dict[str, list[Code]]) -> list:
    return [pytest.param(b, id=n, marks=marks_of(b)) for n, b in programs.items() if b]


def run(blocks: list[Code], monkeypatch, tmp_path) -> None:
    """Run a program; `evaluate_with` must be finite after every block."""
    module = types.ModuleType("page")
    # Dataclasses and Flax modules look up the module in which they are defined.
    monkeypatch.setitem(sys.modules, "page", module)
    monkeypatch.chdir(tmp_path)
    for block in blocks:
        if any(mark.name == "torch" for mark in marks_of([block])):
            pytest.importorskip("torch")
        exec(block.compiled(), vars(module))
        for leaf in jax.tree.leaves(vars(module).get("evaluate_with")):
            assert np.isfinite(leaf).all()
