# SPDX-License-Identifier: Apache-2.0
"""A build fails that lacks an entry for a public symbol."""

import ast
from collections.abc import Iterator
from pathlib import Path

from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util import logging

PACKAGE = Path(__file__).parents[2] / "asgd_optax"
logger = logging.getLogger(__name__)


def public_symbols(package: Path = PACKAGE) -> Iterator[str]:
    """What type checkers take for public: `from x import y as y`, and what is defined.

    Read and not imported, so that no module needs what it imports.
    """
    for path in sorted(package.glob("*.py")):
        if path.stem.startswith("_") and path.stem != "__init__":
            continue
        module = f"{package.name}.{path.stem}".removesuffix(".__init__")
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                names = [node.name]
            elif isinstance(node, ast.ImportFrom):
                names = [a.name for a in node.names if a.name == a.asname]
            else:
                continue
            yield from (f"{module}.{n}" for n in names if not n.startswith("_"))


def check(app: Sphinx, env: BuildEnvironment) -> None:
    """Warns of each missing one; `-W` makes the warning an error."""
    documented = {name for name, *_ in env.domains["py"].get_objects()}
    for symbol in sorted(set(public_symbols()) - documented):
        logger.warning("%s is public and stands on no page", symbol)


def setup(app: Sphinx) -> dict[str, bool]:
    """For Sphinx."""
    app.connect("env-check-consistency", check)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
