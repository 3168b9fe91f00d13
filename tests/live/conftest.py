# SPDX-License-Identifier: Apache-2.0
"""Do not collect a module if a package that it imports is not installed.

A module named on the command line is collected, and fails if a package is missing.
"""

import ast
import importlib.util
from pathlib import Path


def packages_of(module: Path) -> set[str]:
    """Return the top-level packages that a module imports anywhere."""
    names = set()
    for node in ast.walk(ast.parse(module.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
    return {name.partition(".")[0] for name in names}


collect_ignore = [
    module.name
    for module in Path(__file__).parent.glob("test_*.py")
    if not all(map(importlib.util.find_spec, packages_of(module)))
]
