# SPDX-License-Identifier: Apache-2.0
"""Fail the build if a public symbol has no entry in the documentation."""

import ast
from collections.abc import Iterator
from pathlib import Path

from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util import logging

PACKAGE = Path(__file__).parents[2] / "asgd_optax"
logger = logging.getLogger(__name__)


def public_symbols(package: Path = PACKAGE) -> Iterator[str]:
    """Yield the public symbols of all public modules, at any depth.

    As for type checkers, these are definitions and `from x import y as y`. The sources
    are parsed, not imported, so no optional dependency is needed.
    """
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package.parent).with_suffix("").parts
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        if any(part.startswith("_") for part in parts):
            continue
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                names = [node.name]
            elif isinstance(node, ast.ImportFrom):
                names = [a.name for a in node.names if a.name == a.asname]
            else:
                continue
            yield from (".".join([*parts, n]) for n in names if not n.startswith("_"))


def check(app: Sphinx, env: BuildEnvironment) -> None:
    """Warn of each symbol without an entry; `-W` turns the warning into an error."""
    documented = {name for name, *_ in env.domains["py"].get_objects()}
    for symbol in sorted(set(public_symbols()) - documented):
        logger.warning("%s is public but not documented on any page", symbol)


def setup(app: Sphinx) -> dict[str, bool]:
    """Connect the check to Sphinx."""
    app.connect("env-check-consistency", check)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
