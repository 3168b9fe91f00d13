# SPDX-License-Identifier: Apache-2.0
"""Show signatures as written, so that types keep the names of their aliases."""

import ast
import inspect
import re
import textwrap
from typing import Any

from sphinx.application import Sphinx

# Modules of the package that annotations are imported through.
OWN_MODULES = re.compile(r"\b(?:averaging|weightings)\.")


def written_signature(
    app: Sphinx, what: str, name: str, obj: Any, *others: Any
) -> tuple[str, str] | None:
    """Return the arguments and the return type of a function or class.

    The arguments of a class are its fields: ours are named tuples and dataclasses.
    """
    if what not in ("class", "function"):
        return None
    definition = ast.parse(textwrap.dedent(inspect.getsource(obj))).body[0]
    if isinstance(definition, ast.FunctionDef):
        arguments = ast.unparse(definition.args)
        returns = ast.unparse(definition.returns) if definition.returns else ""
    else:
        assert isinstance(definition, ast.ClassDef)
        fields = [n for n in definition.body if isinstance(n, ast.AnnAssign)]
        arguments, returns = ", ".join(map(ast.unparse, fields)), ""
    return f"({OWN_MODULES.sub('', arguments)})", OWN_MODULES.sub("", returns)


def setup(app: Sphinx) -> dict[str, bool]:
    """Connect to autodoc."""
    app.connect("autodoc-process-signature", written_signature)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
