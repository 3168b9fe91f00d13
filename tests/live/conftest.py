# SPDX-License-Identifier: Apache-2.0
"""A module is not collected where a package that it imports is not installed.

One that is named on the command line is: there what is missing is an error.
"""

import ast
import importlib.util
from pathlib import Path


def packages_of(module: Path) -> set[str]:
    """The top-level packages that a module imports, at its beginning or later."""
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
